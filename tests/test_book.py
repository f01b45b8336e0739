"""`make book`: every notebook with its results, readable on a phone, without JavaScript or a network."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

PROJECT = Path(__file__).resolve().parent.parent
pytest.importorskip("myst_nb", reason="the extra `book` is not installed: make book installs it")
pytestmark = [pytest.mark.notebooks, pytest.mark.timeout(3000)]  # the first test waits for `executed`
WIDE = """() => {
  const scrolls = e => e
    && (/auto|scroll|hidden/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  return [...document.querySelectorAll('article *')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e.parentElement))
    .map(e => e.outerHTML.slice(0, 200));
}"""


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
            self.pictures.append(values.get("alt", ""))


@pytest.fixture(scope="module")
def pages(executed, tmp_path_factory) -> dict[Path, Page]:
    """The book of the notebooks that the tests have executed."""
    workdir = tmp_path_factory.mktemp("book")
    (workdir / "outputs").mkdir()
    (workdir / "outputs" / "executed").symlink_to(executed)
    command = [sys.executable, str(PROJECT / "scripts" / "make_book.py"), str(workdir)]
    run = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert run.returncode == 0 and "WARNING" not in run.stderr and "ERROR" not in run.stderr, run.stderr
    return {path: Page(path) for path in sorted((workdir / "outputs" / "book").rglob("*.html"))}


def test_every_picture_has_an_alternative_text(pages):
    """myst-nb leaves out the text that the notebooks give: to a blind reader a plot would be a file name."""
    pictures = {}
    for path, page in pages.items():
        pictures["/".join(path.parts[-2:])] = page.pictures
        assert all(len(text) > 20 and ".png" not in text for text in page.pictures), path
    assert any("training loss" in text for text in pictures["notebooks/04_train.html"])
    assert len(pictures["notebooks/06_evaluate.html"]) >= 2


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


@pytest.mark.browser
@pytest.mark.parametrize("javascript", [True, False], ids=["scripts on", "scripts off"])
def test_the_book_in_a_browser(pages, browser, javascript):
    """A wide table makes a phone scroll sideways; a script from elsewhere fails where there is no network."""
    wrong = []
    context = browser.new_context(viewport={"width": 390, "height": 844}, java_script_enabled=javascript)
    page = context.new_page()
    page.on("console", lambda message: wrong.append(f"{page.url}: {message.type} {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
    page.on("request", lambda r: urlsplit(r.url).scheme in ("file", "data") or wrong.append(r.url))
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
