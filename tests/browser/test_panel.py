"""The live panel in a real browser, over a small real training run with steps of a known length."""

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
from fiqa_helpers.live import LivePanel
model = t.make_model()
panel = LivePanel(t.QUESTIONS, t.sampler(model), sample_steps=4, title="A small model", png={png!r})
trainer = t.make_trainer({run!r}, [panel], model=model, steps={steps}, seconds={seconds}, eval_on_start=True)
print("made")
"""


def write_notebook(folder: Path, name: str, steps: int, seconds: float) -> Path:
    """A notebook like 04 in small: cells `make`, `train` and `after`."""
    tests = str(Path(__file__).resolve().parents[1])
    run = folder / name
    values = {
        "tests": tests,
        "png": str(run / "picture.png"),
        "run": str(run),
        "steps": steps,
        "seconds": seconds,
    }
    sources = {
        "make": TRAIN.format(**values).strip(),
        "train": "with panel:\n    trainer.train()",
        "after": "print('after:', panel.outcome, '|', trainer.state.global_step)",
    }
    cells = [nbformat.v4.new_code_cell(source, id=name) for name, source in sources.items()]
    path = folder / f"{name}.ipynb"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


@pytest.fixture
def start(served, lab, page):
    """start(name, steps, seconds): the notebook open, Run All pressed, the panel on the page."""

    def start(name: str, steps: int, seconds: float) -> Notebook:
        write_notebook(served, name, steps, seconds)
        notebook = Notebook(page, *lab, f"{name}.ipynb")
        notebook.run_all()
        page.wait_for_selector(".fiqa-panel svg", timeout=120_000)
        return notebook

    return start


def stopped_at(notebook: Notebook) -> int:
    return int(re.search(r"stopped at step (\d+) of", notebook.text("after"))[1])


def test_the_panel_redraws_in_place_and_leaves_one_picture(start, served, page):
    """The output could be replaced (flicker), change its height (jump), or leave widgets in the file."""
    notebook = start("watched", steps=16, seconds=0.4)
    page.evaluate(WATCH)
    page.wait_for_selector(".fiqa-panel .samples .h:has-text('at step 8')", timeout=60_000)
    assert notebook.running
    notebook.shot("panel-small-running")
    notebook.wait_until_done(120)
    seen = page.evaluate(SEEN)
    assert seen["curves"] >= 3 and seen["texts"] >= 3
    assert seen["nodes"] == 1 and len(seen["heights"]) == 1, seen
    assert notebook.errors() == []
    assert "finished 16 steps | 16" in notebook.text("after")
    saved = notebook.save(served)
    train = next(cell for cell in saved["cells"] if cell["id"] == "train")
    kinds = [set(output["data"]) for output in train["outputs"]]
    assert kinds == [{"text/plain"}, {"text/plain", "image/png", "text/html"}]
    assert "widgets" not in saved["metadata"]
    picture = page.locator(".jp-OutputArea-output img[alt*='finished 16 steps']")
    assert picture.count() == 1
    notebook.shot("panel-small-finished")


@pytest.mark.parametrize("how", ["Stop button", "interrupted"])
def test_training_ends_within_one_step(start, page, how):
    """ipykernel 7.4 sends clicks to the busy thread, an interrupt leaves a traceback: neither may be."""
    notebook = start(how.split()[0].lower(), steps=100, seconds=2.0)
    step = at_step(page, 2)
    began = time.monotonic()
    if how == "interrupted":
        notebook.command("notebook:interrupt-kernel", wait=False)
    else:
        page.locator(".jupyter-button", has_text="Stop").click()
    page.get_by_text(re.compile(rf"^after: stopped at step \d+ of 100 \({how}\)")).wait_for(timeout=60_000)
    print(f"{how}: {time.monotonic() - began:.1f} s with steps of 2 s")
    notebook.wait_until_done(30)
    assert stopped_at(notebook) <= step + 2  # the one that ran when it was pressed; one more if it just ended
    assert notebook.errors() == []
    notebook.shot(f"panel-small-{how.split()[0].lower()}")


def test_sample_now_is_answered_after_the_step(start, page):
    """The second button could be dead, or be heard only at the next regular sample."""
    notebook = start("sample", steps=100, seconds=1.0)
    at_step(page, 9)
    page.locator(".jupyter-button", has_text="Sample now").click()
    head = page.locator(".fiqa-panel .samples .h", has_text=re.compile(r"at step (?!4$|8$|12$|16$|20$)\d+$"))
    head.wait_for(timeout=20_000)
    page.locator(".jupyter-button", has_text="Stop").click()
    notebook.wait_until_done(60)
    assert notebook.errors() == []


def test_generated_text_is_not_rendered(start, page):
    """A question or an answer with HTML in it could become markup in the reader's page."""
    notebook = start("escaped", steps=40, seconds=0.3)
    page.wait_for_selector(".fiqa-panel .samples .h:has-text('at step 4')", timeout=60_000)
    assert page.locator(".fiqa-panel .samples p b").count() == 0
    assert "What is a <b>bond</b>?" in page.locator(".fiqa-panel .samples .q").first.inner_text()
    notebook.command("notebook:interrupt-kernel")
    notebook.wait_until_done(30)


def test_the_panel_is_readable_in_the_dark_theme(tmp_path, browser):
    """Ink taken from no theme would be black on black."""
    write_notebook(tmp_path, "dark", steps=12, seconds=0.4)
    with jupyterlab(tmp_path, theme="JupyterLab Dark") as lab:
        page = browser.new_page(viewport={"width": 1360, "height": 1080})
        notebook = Notebook(page, *lab, "dark.ipynb")
        notebook.run_all()
        page.wait_for_selector(".fiqa-panel .samples .h:has-text('at step 8')", timeout=120_000)
        ink, paper = page.evaluate(
            """() => {
              const light = c => c.match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 765;
              const style = name => getComputedStyle(document.querySelector(name));
              return [style('.fiqa-panel svg .t').fill, style('.jp-Notebook').backgroundColor].map(light) }"""
        )
        notebook.shot("panel-small-dark")
        notebook.wait_until_done(60)
        page.close()
    assert paper < 0.2 and ink > 0.7, (ink, paper)
