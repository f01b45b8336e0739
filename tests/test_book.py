"""`make book`: every notebook with its results, readable on a phone, without JavaScript or a network."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

PROJECT = Path(__file__).resolve().parent.parent
pytest.importorskip("myst_nb", reason="the extra `book` is not installed: make book installs it")
NOTEBOOKS = sorted(path.stem for path in (PROJECT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
WIDE = """() => {
  const scrolls = e => e
    && (/auto|scroll|hidden/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  return [...document.querySelectorAll('article *')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e.parentElement))
    .map(e => e.outerHTML.slice(0, 200));
}"""


def whole_run(test):
    """A test that needs every notebook executed; the first one waits for that (see `executed`)."""
    return pytest.mark.notebooks(pytest.mark.timeout(3000)(test))


def make_book(workdir: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROJECT / "scripts" / "make_book.py"), str(workdir)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def book(executed, tmp_path_factory) -> Path:
    """The book of the notebooks that the tests have executed."""
    workdir = tmp_path_factory.mktemp("book")
    (workdir / "outputs").mkdir()
    (workdir / "outputs" / "executed").symlink_to(executed)
    run = make_book(workdir)
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr and "ERROR" not in run.stderr, run.stderr
    return workdir / "outputs" / "book"


class Page(HTMLParser):
    """What a page links to and shows."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.ids, self.pictures = [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids |= {values.get("id"), values.get("name")}
        self.links += [values[name] for name in ("href", "src") if values.get(name)]
        if tag == "img":
            self.pictures.append(values)


@pytest.fixture(scope="module")
def pages(book) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(book.rglob("*.html"))}


@whole_run
def test_every_picture_has_an_alternative_text(book, pages):
    """myst-nb leaves out the text that the notebooks give: to a blind reader a plot would be a file name."""
    for path, page in pages.items():
        for picture in page.pictures:
            said = picture.get("alt", "")
            assert len(said) > 20 and ".png" not in said, f"{path.name}: {picture}"
    training = [picture["alt"] for picture in pages[book / "notebooks" / "04_train.html"].pictures]
    assert any("training loss" in said for said in training), training
    assert len(pages[book / "notebooks" / "06_evaluate.html"].pictures) >= 2


@whole_run
def test_every_link_of_the_book_leads_somewhere(pages):
    """Links between notebooks end in .ipynb: a renderer that leaves them so gives dead ones."""
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("https", "data", "mailto"):
                continue
            assert not parts.scheme, link
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{path.name}: {link}"


@whole_run
@pytest.mark.browser
@pytest.mark.parametrize("javascript", [True, False], ids=["scripts on", "scripts off"])
def test_the_book_in_a_browser(book, pages, browser, javascript):
    """A wide table makes a phone scroll sideways; a script from elsewhere fails where there is no network."""
    wrong = []
    context = browser.new_context(viewport={"width": 390, "height": 844}, java_script_enabled=javascript)
    page = context.new_page()
    page.on("console", lambda message: wrong.append(f"{page.url}: {message.type} {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
    page.on(
        "request",
        lambda request: urlsplit(request.url).scheme in ("file", "data") or wrong.append(request.url),
    )
    page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
    for path in pages:
        page.goto(path.as_uri())
        if not javascript:
            assert page.locator("article").inner_text().strip() or path.stem == "search"
            continue
        too_wide = page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
        assert too_wide <= 0 and not page.evaluate(WIDE), f"{path.name}: {page.evaluate(WIDE)}"
        broken = page.evaluate("() => [...document.images].filter(i => !i.naturalWidth).map(i => i.src)")
        assert not broken, broken
    context.close()
    assert not wrong, wrong


def executed_notebook(folder: Path, *cells: nbformat.NotebookNode) -> Path:
    """A workspace in which one notebook was executed."""
    workdir = folder / "outputs" / "executed"
    workdir.mkdir(parents=True)
    title = nbformat.v4.new_markdown_cell("# A notebook")
    nbformat.write(nbformat.v4.new_notebook(cells=[title, *cells]), workdir / f"{NOTEBOOKS[0]}.ipynb")
    return folder


def test_without_a_run_it_says_what_to_run(tmp_path):
    """The first thing people try; Sphinx's own complaint would be about a missing file."""
    run = make_book(tmp_path)
    assert run.returncode == 1
    assert run.stderr.splitlines() == [
        f"There is no executed notebook in {tmp_path / 'outputs' / 'executed'}: run `make run` first."
    ]


@pytest.mark.parametrize("fault", ["error", "unfinished"])
def test_a_failed_run_is_no_book(tmp_path, fault):
    """A traceback in the middle of a page, or results that just end, would be handed to readers."""
    outputs = [nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[])]
    cell = nbformat.v4.new_code_cell("1 / 0", execution_count=1, outputs=outputs)
    if fault == "unfinished":
        cell = nbformat.v4.new_code_cell("1 + 1")
    run = make_book(executed_notebook(tmp_path, cell))
    assert run.returncode == 1
    assert "did not run to its end (A notebook): run `make run ONLY=00` first." in run.stderr
    assert not (tmp_path / "outputs" / "book").exists()
