"""The live panel in a real browser, over a small real training run with steps of a known length.

The first test is the browser's part of `make test`; the others, and the real notebooks, are slow.
"""

import re
import time
from pathlib import Path

import nbformat
import pytest
from browser import Notebook, jupyterlab
from panel_watch import SEEN, WATCH, at_step

TRAIN = """
import sys; sys.path.insert(0, {tests!r})
import panel_training as t
from fiqa_helpers.machinery.live import LivePanel
from fiqa_helpers.show import style_page
style_page()
model = t.make_model()
panel = LivePanel(t.QUESTIONS, t.sampler(model), {sample_steps}, title="Small", png={run!r} + "/picture.png")
trainer = t.make_trainer({run!r}, [panel], model=model, steps={steps}, seconds={seconds}, eval_on_start=True)
"""
SAVED = "widget-view+json"  # what a file holds once the panel was saved in it
PANEL = ".fiqa-panel"


def open_small(folder: Path, lab, page, name: str, steps: int, seconds: float, sample_steps=4) -> Notebook:
    """A notebook like 04 in small, Run All pressed, the panel on the page."""
    run, tests = str(folder / name), str(Path(__file__).resolve().parents[1])
    make = TRAIN.format(tests=tests, run=run, steps=steps, seconds=seconds, sample_steps=sample_steps)
    sources = {"make": make.strip(), "train": "with panel:\n    trainer.train()"}
    sources["after"] = "print('after:', panel.outcome, '|', trainer.state.global_step)"
    cells = [nbformat.v4.new_code_cell(source, id=name) for name, source in sources.items()]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / f"{name}.ipynb")
    notebook = Notebook(page, *lab, f"{name}.ipynb")
    notebook.run_all()
    page.wait_for_selector(".fiqa-panel svg", timeout=120_000)
    return notebook


@pytest.fixture
def start(served, lab, page):
    return lambda name, *args, **more: open_small(served, lab, page, name, *args, **more)


def press(page, label: str) -> None:
    page.locator(".fiqa-panel .jupyter-button", has_text=label).click()


def wait_for_sample(page, step: str) -> None:
    """Until the right column's head says at which step its answers were given."""
    head = page.locator(".fiqa-panel .samples .h", has_text=re.compile(rf"at step {step}$"))
    head.wait_for(timeout=120_000)


def wait_for_file(path: Path, text: str) -> None:
    """Wait until a file that another process writes is there and holds `text`."""
    end = time.monotonic() + 60
    while not path.is_file() or text not in path.read_text(encoding="utf-8", errors="replace"):
        assert time.monotonic() < end, f"{path.name}: no {text!r}"
        time.sleep(0.2)


def test_the_panel_redraws_in_place_and_leaves_one_picture(start, served, page):
    """The output could be replaced (flicker), change its height (jump), or leave widgets in the file."""
    notebook = start("watched", 16, 0.4)
    page.evaluate(WATCH)
    wait_for_sample(page, "8")
    assert notebook.running
    notebook.shot("panel-small-running")
    notebook.wait_until_done(120)
    seen = page.evaluate(SEEN)
    assert seen["curves"] >= 3 and seen["texts"] >= 3
    assert seen["nodes"] == 1 and len(seen["heights"]) == 1, seen
    assert notebook.errors() == [] and "finished 16 steps | 16" in notebook.text("after")
    saved = notebook.save(served)
    train = next(cell for cell in saved["cells"] if cell["id"] == "train")
    kinds = [set(output["data"]) for output in train["outputs"]]
    assert kinds == [{"text/plain"}, {"text/plain", "image/png", "text/html"}]
    assert "widgets" not in saved["metadata"]
    assert page.locator(".jp-OutputArea-output img[alt*='finished 16 steps']").count() == 1
    breaks = "() => getComputedStyle(document.querySelector('.jp-OutputArea-output pre')).wordBreak"
    assert page.evaluate(breaks) == "normal"  # not inside words and numbers
    notebook.shot("panel-small-finished")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Stop button", "interrupted"])
def test_training_ends_within_one_step(start, page, how):
    """ipykernel 7.4 sends clicks to the busy thread, an interrupt leaves a traceback: neither may be."""
    notebook = start(how.split()[0].lower(), 100, 2.0)
    at_step(page, 1)
    if how == "interrupted":
        notebook.command("notebook:interrupt-kernel", wait=False)
    else:
        press(page, "Sample now")
        wait_for_sample(page, "[123]")  # after the step at hand, not at the next regular sample
        press(page, "Stop")
    step = at_step(page, 1)
    ended = page.get_by_text(re.compile(rf"^after: stopped at step (\d+) of 100 \({how}\)"))
    ended.wait_for(timeout=60_000)
    notebook.wait_until_done(30)
    # the one that ran when it was pressed; one more if it just ended
    assert int(re.search(r"at step (\d+) of", notebook.text("after"))[1]) <= step + 2
    assert notebook.errors() == []


@pytest.mark.slow
def test_a_reloaded_page_finds_the_panel_and_its_buttons(start, served, page):
    """F5 could leave "Loading widget...", no way to stop, and at the end neither panel nor picture."""
    notebook = start("reloaded", 200, 0.5)
    at_step(page, 2)
    wait_for_file(served / "reloaded.ipynb", SAVED)
    page.reload()
    page.wait_for_selector(".fiqa-panel svg", timeout=60_000)
    at_step(page, at_step(page, 4) + 2)  # it moves
    notebook.shot("panel-small-reloaded", of=PANEL)
    press(page, "Stop")
    page.locator(".fiqa-panel img[alt*='(Stop button)']").wait_for(timeout=60_000)
    assert page.get_by_text("Run All Cells fills in the rest").is_visible()
    assert page.locator(".fiqa-panel .jupyter-button").count() == 0


@pytest.mark.slow
def test_a_page_that_was_away_at_the_end_finds_the_picture(start, served, page):
    """Closed while it trains and opened when it is over, the page could show "model not found"."""
    notebook = start("away", 12, 0.5)
    wait_for_file(served / "away.ipynb", SAVED)
    address = page.url
    page.goto("about:blank")
    wait_for_file(served / "away" / "picture.png", "IEND")
    page.goto(address)
    page.locator(".fiqa-panel img[alt*='finished 12 steps']").wait_for(timeout=60_000)
    assert page.get_by_text("Run All Cells fills in the rest").is_visible()
    notebook.shot("panel-small-away", of=PANEL)


@pytest.mark.slow
def test_an_answer_that_is_read_is_left_alone(start, page):
    """Each new drawing could scroll an answer back, lose the marked text, or throw the keyboard out."""
    notebook = start("read", 100, 0.3, sample_steps=50)
    page.wait_for_selector(".fiqa-panel .samples small", timeout=60_000)
    page.evaluate(WATCH)
    page.evaluate("""() => {
      window.read = document.querySelectorAll('.fiqa-panel .samples p[tabindex]')[1];
      read.focus(); getSelection().selectAllChildren(read);
    }""")
    page.wait_for_function("() => window.seen.curves.size >= 4", timeout=60_000)
    kept = "() => [read.isConnected, document.activeElement === read, getSelection().toString().length > 9]"
    assert page.evaluate(kept) == [True] * 3
    page.locator(".jupyter-button", has_text="Stop").press("Enter")  # with the keyboard
    notebook.wait_until_done(60)
    assert "stopped at step" in notebook.text("after") and notebook.errors() == []


@pytest.mark.slow
def test_the_panel_in_half_a_window_and_on_a_phone(start, page):
    """Beside the text of a course, a wide panel would be cut off or need sideways scrolling."""
    notebook = start("narrow", 100, 0.5)
    wait_for_sample(page, "4")
    for name, width in {"half": 760, "narrow": 720, "phone": 420}.items():
        page.set_viewport_size({"width": width, "height": 1300})
        page.wait_for_function(f"() => document.querySelector('.fiqa-panel').clientWidth < {width}")
        notebook.shot(f"panel-small-{name}", of=PANEL)
        assert page.evaluate(OUTSIDE) == []
        assert page.evaluate(SMALLEST_LETTERS) >= 8.5, name  # pixels
    notebook.command("notebook:interrupt-kernel")
    notebook.wait_until_done(30)


# What sticks out of the panel, and the height of the smallest letters (an SVG is scaled)
OUTSIDE = """() => {
  const panel = document.querySelector('.fiqa-panel'), edge = panel.getBoundingClientRect();
  const outside = box => box.width > 0 && (box.right > edge.right || box.left < edge.left);
  return [...panel.querySelectorAll('button, .bar, .when, .tiles div, text, p, .h, small, .key')]
    .filter(e => outside(e.getBoundingClientRect())).map(e => e.outerHTML.slice(0, 80));
}"""
SMALLEST_LETTERS = """() => Math.min(...[...document.querySelectorAll('.fiqa-panel text')]
  .filter(e => e.getBoundingClientRect().width)
  .map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a))"""


@pytest.mark.slow
def test_the_panel_is_readable_in_the_dark_theme(tmp_path, browser):
    """Ink taken from no theme would be black on black."""
    with jupyterlab(tmp_path, theme="JupyterLab Dark") as lab:
        page = browser.new_page(viewport={"width": 1360, "height": 1080})
        notebook = open_small(tmp_path, lab, page, "dark", 12, 0.4)
        wait_for_sample(page, "8")
        ink, paper = page.evaluate(LIGHT)
        notebook.shot("panel-small-dark")
        notebook.wait_until_done(60)
        notebook.shot("panel-small-dark-finished", of="img.fiqa-picture")
        picture = page.evaluate("() => getComputedStyle(document.querySelector('img.fiqa-picture')).filter")
        page.close()
    assert picture.startswith("invert")  # the picture is no white block
    assert paper < 0.2 and ink > 0.7, (ink, paper)


LIGHT = """() => {
  const light = c => c.match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 765;
  const style = name => getComputedStyle(document.querySelector(name));
  return [style('.fiqa-panel b').color, style('.jp-Notebook').backgroundColor].map(light);
}"""
