"""`make book`: every notebook with its results, readable on a phone, without a network."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from checkout import PROJECT

pytest.importorskip("myst_nb", reason="the extra `book` is not installed: make book installs it")
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
def pages(tmp_path_factory) -> dict[Path, Page]:
    """The book of notebooks/executed, as it is published."""
    workdir = tmp_path_factory.mktemp("book")
    command = [sys.executable, str(PROJECT / "scripts" / "make_book.py"), str(workdir)]
    run = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert run.returncode == 0 and "WARNING" not in run.stderr and "ERROR" not in run.stderr, run.stderr
    return {path: Page(path) for path in sorted((workdir / "outputs" / "book").rglob("*.html"))}


def test_links_lead_somewhere_and_pictures_say_what_they_show(pages):
    """Renderers leave links to .ipynb, which are dead, and drop the texts that notebooks give to pictures."""
    for path, page in pages.items():
        assert all(len(text) > 20 and ".png" not in text for text in page.pictures), path
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme not in ("https", "data", "mailto"):
                target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                assert target.exists(), f"{path.name}: {link}"
                if parts.fragment and target in pages:
                    assert unquote(parts.fragment) in pages[target].ids, f"{path.name}: {link}"
    assert any(
        "training loss" in text for path in pages if path.stem == "04_train" for text in pages[path].pictures
    )


@pytest.mark.browser
def test_the_book_on_a_phone(pages, browser):
    """A wide table makes it scroll sideways; a script from elsewhere fails where there is no network."""
    wrong = []
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
    page.on("request", lambda r: urlsplit(r.url).scheme in ("file", "data") or wrong.append(r.url))
    left = "net::ERR_ABORTED"  # its icon was still to come when the test went on to the next page
    page.on("requestfailed", lambda r: r.failure == left or wrong.append(f"{r.failure}: {r.url}"))
    for path in pages:
        page.goto(path.as_uri())
        too_wide = page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
        assert too_wide <= 0 and not page.evaluate(WIDE), f"{path.name}: {page.evaluate(WIDE)}"
    page.close()
    assert not wrong, wrong
