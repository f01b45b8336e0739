"""JupyterLab as `make lab` opens it, and the live panel in it over a small run with steps of a known length.

Two tests are the browser's part of `make test`; the others, and the real notebooks, are slow.
"""

import re
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import psutil
import pytest
from browser import PANEL, READY, Notebook, at_step, make_lab, press
from checkout import PROJECT
from panel_training import write_notebook

pytestmark = pytest.mark.browser  # the fixture of that name skips where Chromium is missing
SAVED = "widget-view+json"  # what a file holds once the panel was saved in it


def open_lab(page, address: str, token: str) -> None:
    page.goto(f"{address}/?token={token}")
    page.wait_for_selector(".jp-NotebookPanel .jp-Notebook", timeout=120_000)
    page.evaluate(READY)


def wait_for_file(path: Path, text: str) -> None:
    """Wait until a file that another process writes is there and holds `text`."""
    end = time.monotonic() + 60
    while not path.is_file() or text not in path.read_text(encoding="utf-8", errors="replace"):
        assert time.monotonic() < end, f"{path.name}: no {text!r}"
        time.sleep(0.2)


def test_it_opens_on_the_first_notebook_with_its_contents(lab, served, page):
    """Without a layout it opens a list of files and asks about news; or it spoils what is not its own."""
    with pytest.raises(urllib.error.HTTPError, match="403"):  # without its token
        urllib.request.urlopen(f"{lab[0]}/api/contents?token=no")
    port = int(lab[0].rpartition(":")[2])
    listening = {place.laddr for place in psutil.net_connections() if place.status == "LISTEN"}
    assert [place.ip for place in listening if place.port == port] == ["127.0.0.1"]
    called = []
    page.on("request", lambda request: called.append(request.url))
    open_lab(page, *lab)
    where = page.evaluate("() => jupyterapp.shell.currentWidget.context.path")
    assert where == "notebooks/00_start_here.ipynb"
    page.locator(".jp-TableOfContents:visible").get_by_text("Checkpoint").wait_for(timeout=30_000)
    assert page.locator(".jp-toast-message, .Toastify__toast").count() == 0  # "would you like news"
    page.goto("about:blank")
    elsewhere = [url for url in called if "//127.0.0.1" not in url and not url.startswith(("data:", "blob:"))]
    assert not elsewhere, elsewhere
    assert list((served / "outputs" / "jupyterlab").glob("workshop-*"))  # its layout is kept in the project
    assert not [
        path for path in served.with_name("home").joinpath(".jupyter").rglob("lab/**/*") if path.is_file()
    ]
    for path in (PROJECT / "notebooks").glob("*.ipynb"):  # no widget state or trust marks in them
        assert (served / "notebooks" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_an_idle_kernel_ends_and_what_was_typed_stays(tmp_path_factory, page):
    """Kernels of notebooks that were left pile up to much memory; ending them could lose what was typed."""
    with make_lab(tmp_path_factory.mktemp("lab") / "idle", "IDLE=5") as lab:
        open_lab(page, *lab)
        first = "jupyterapp.shell.currentWidget.content.model.cells.get(2).sharedModel"
        page.evaluate(f"() => {first}.setSource('my_answer = 42')")
        page.get_by_text("No Kernel").first.wait_for(timeout=60_000)
        assert page.locator(".jp-Dialog").count() == 0
        assert page.get_by_text("my_answer = 42").is_visible()


@pytest.fixture
def start(served, lab, page):
    """start(name, steps, seconds, every): a notebook with the panel, which is on the page."""

    def open_small(name: str, *how) -> Notebook:
        write_notebook(served / f"{name}.ipynb", *how)
        notebook = Notebook(page, *lab, f"{name}.ipynb")
        notebook.run_all()
        page.wait_for_selector(f"{PANEL} svg", timeout=120_000)
        return notebook

    return open_small


def wait_for_sample(page, step: str) -> None:
    """Until the right column's head says at which step its answers were given."""
    head = page.locator(f"{PANEL} .samples .h", has_text=re.compile(rf"at step {step}$"))
    head.wait_for(timeout=120_000)


WATCH = """() => {
  window.seen = {curves: new Set(), heights: new Set(), texts: new Set(), nodes: new Set()};
  const look = () => {
    const panel = document.querySelector('.fiqa-panel'); if (!panel) return;
    const node = panel.closest('.jp-OutputArea-child');
    seen.nodes.add(node);
    seen.heights.add(Math.round(node.getBoundingClientRect().height));
    seen.curves.add([...panel.querySelectorAll('.charts path')].map(e => e.outerHTML).join());
    seen.texts.add(panel.querySelector('.samples').innerText);
  };
  look();
  const page = document.querySelector('.jp-Notebook');
  new MutationObserver(look).observe(page, {childList: true, subtree: true});
}"""
SEEN = "() => Object.fromEntries(Object.entries(seen).map(([name, set]) => [name, set.size]))"


def test_the_panel_redraws_in_place_and_leaves_one_picture(start, served, page):
    """The output could be replaced (flicker), change its height (jump), or leave widgets in the file."""
    notebook = start("watched", 16, 0.4)
    page.evaluate(WATCH)
    wait_for_sample(page, "8")
    assert page.evaluate("() => window.ran === undefined")  # the cell is still running
    notebook.wait_until_done(120)
    seen = page.evaluate(SEEN)
    assert seen["curves"] >= 3 and seen["texts"] >= 3 and seen["nodes"] == seen["heights"] == 1, seen
    assert notebook.errors() == [] and "after: finished 16 steps" in notebook.text("after")
    kinds = [set(output["data"]) for output in notebook.outputs("train")]
    assert kinds == [{"text/plain"}, {"text/plain", "image/png", "text/html"}]
    notebook.command("docmanager:save")
    assert "widgets" not in nbformat.read(served / notebook.name, 4).metadata
    assert page.locator(".jp-OutputArea-output img[alt*='finished 16 steps']").count() == 1
    breaks = "() => getComputedStyle(document.querySelector('.jp-OutputArea-output pre')).wordBreak"
    assert page.evaluate(breaks) == "normal"  # not inside words and numbers


# The lightness of the panel's text and of the page, from 0 to 1; what sticks out of the panel.
LIGHT = """() => {
  const light = c => c.match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 765;
  const style = name => getComputedStyle(document.querySelector(name));
  return [style('.fiqa-panel b').color, style('.jp-Notebook').backgroundColor].map(light);
}"""
OUTSIDE = """() => {
  const panel = document.querySelector('.fiqa-panel'), edge = panel.getBoundingClientRect();
  const outside = box => box.width > 0 && (box.right > edge.right || box.left < edge.left);
  return [...panel.querySelectorAll('button, .bar, .when, .tiles div, text, p, .h, small, .key')]
    .filter(e => outside(e.getBoundingClientRect())).map(e => e.outerHTML.slice(0, 80));
}"""
READ = """() => {
  window.read = document.querySelectorAll('.fiqa-panel .samples p[tabindex]')[1];
  read.focus(); getSelection().selectAllChildren(read);
}"""
KEPT = "() => [read.isConnected, document.activeElement === read, getSelection().toString().length > 9]"


@pytest.mark.slow
def test_what_a_person_does_with_the_panel(start, served, page):
    """Reads an answer, looks at it on a phone and in the dark, reloads, asks for a sample, stops.

    A drawing could scroll the answer away, the edge cut the panel, ink be black on black; F5 could leave
    "Loading widget...", no way to stop, and at the end neither panel nor picture.
    """
    notebook = start("person", 300, 0.5, 1000)
    page.wait_for_selector(f"{PANEL} .samples small", timeout=60_000)
    page.evaluate(WATCH)
    page.evaluate(READ)
    page.wait_for_function("() => window.seen.curves.size >= 3")
    assert page.evaluate(KEPT) == [True] * 3
    for width in (760, 720, 420):
        page.set_viewport_size({"width": width, "height": 1300})
        page.wait_for_function(f"() => document.querySelector('.fiqa-panel').clientWidth < {width}")
        notebook.shot(f"panel-small-{width}", of=PANEL)
        assert page.evaluate(OUTSIDE) == [], width
    notebook.command("apputils:change-theme", theme="JupyterLab Dark")
    page.wait_for_function(f"() => (({LIGHT})())[1] < 0.2 && (({LIGHT})())[0] > 0.7")
    wait_for_file(served / notebook.name, SAVED)
    page.reload()
    page.wait_for_selector(f"{PANEL} svg", timeout=60_000)
    at_step(page, at_step(page, 4) + 2)  # it moves
    press(page, "Sample now")
    wait_for_sample(page, r"\d+")
    press(page, "Stop")
    picture = page.locator(f"{PANEL} img[alt*='(Stop button)']")
    picture.wait_for(timeout=60_000)
    assert page.get_by_text("Run All Cells fills in the rest").is_visible()
    assert page.locator(f"{PANEL} .jupyter-button").count() == 0
    assert picture.evaluate("e => getComputedStyle(e).filter").startswith("invert")  # no white block
    notebook.shot("panel-small-reloaded", of=PANEL)


@pytest.mark.slow
def test_a_page_that_was_away_at_the_end_finds_the_picture(start, served, page):
    """Closed while it trains and opened when it is over, the page could show "model not found"."""
    notebook = start("away", 12, 0.5)
    wait_for_file(served / notebook.name, SAVED)
    address = page.url
    page.goto("about:blank")
    wait_for_file(served / "away" / "picture.png", "IEND")
    page.goto(address)
    page.locator(f"{PANEL} img[alt*='finished 12 steps']").wait_for(timeout=60_000)
    assert page.get_by_text("Run All Cells fills in the rest").is_visible()
