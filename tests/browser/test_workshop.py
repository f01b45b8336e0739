"""The real notebooks 00 to 05 in a real browser: the laptop profile's real model, a few short steps.

Each test asks for the notebooks it builds on; they are run once, in the browser too. Every test leaves a
screenshot in outputs/screenshots.
"""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from browser import Notebook
from panel_watch import SEEN, WATCH, at_step
from real_notebooks import NAMES, place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SHORT = (
    "{max_steps: 6, batch_size: 4, max_length: 160, train_rows: 32, eval_rows: 4, eval_steps: 2, "
    "sample_steps: 2, max_new_tokens: 16}"
)
LONG = SHORT.replace("max_steps: 6", "max_steps: 8")
COST = {"cost": "print('cost', panel.drawing_seconds, panel.seconds)"}
PANEL = ".fiqa-panel"
STOPPED = re.compile(r"stopped at step (\d+) of (\d+) \((.*?)\)")


@pytest.fixture(scope="session")
def workshop(served, lab, browser):
    """workshop("03"): the workdir with notebooks 00 to 03 run in the browser, once in this session."""
    workdir, done = served / "workshop", {}

    def run_up_to(number: str) -> Path:
        for earlier in sorted(NAMES):
            if earlier > number:
                break
            if earlier not in done:
                done[earlier] = "failed"  # until it is known better: a second test must not wait for it again
                done[earlier] = run(earlier)
            assert done[earlier] == [], f"{NAMES[earlier]}: {done[earlier]}"
        return workdir

    def run(number: str) -> list[str]:
        page = browser.new_page(viewport={"width": 1360, "height": 1080})
        notebook = Notebook(page, *lab, place(served, workdir, number, overrides=SHORT))
        notebook.run_all()
        notebook.wait_until_done(900)
        notebook.shot(f"notebook-{number}", of=".jp-OutputArea-output :is(img, svg, table)")
        errors, unrun = notebook.errors(), [cell["id"] for cell in notebook.cells() if not cell["count"]]
        notebook.close()
        return errors + [f"cell {cell} was not run" for cell in unrun]

    return run_up_to


@pytest.fixture
def training(served, lab, page, workshop):
    """training(name): notebook 04 running, in a workdir of its own that holds what 00 to 03 left."""

    def start(name: str, **parameters) -> tuple[Notebook, Path]:
        workdir = served / f"training-{name}"
        shutil.copytree(workshop("03"), workdir, ignore=shutil.ignore_patterns("checkpoints"))
        notebook = Notebook(page, *lab, place(served, workdir, "04", COST, **parameters))
        notebook.run_all()
        page.wait_for_selector(".fiqa-panel svg", timeout=300_000)
        notebook.show(PANEL)
        return notebook, workdir

    return start


def train_cell(notebook: Notebook) -> dict:
    source = next(cell for cell in notebook.sources() if "with panel:" in cell["source"])
    return next(cell for cell in notebook.cells() if cell["id"] == source["id"])


@pytest.mark.parametrize("number", [number for number in NAMES if number != "04"])
def test_run_all(workshop, number):
    """A notebook could end in an error or a dialog in JupyterLab although it runs under papermill."""
    workshop(number)


def test_training_is_watched_in_one_place(training, page, served):
    """The curve could stand still, flicker or jump; the samples never change; widgets stay in the file.

    This is the laptop profile as it is, without overrides, and so the place to measure what drawing costs.
    """
    notebook, workdir = training("watched", overrides="")
    page.evaluate(WATCH)
    at_step(page, 15, 900)
    page.wait_for_selector(".fiqa-panel .samples .h:has-text('at step 12')")
    assert notebook.running
    notebook.shot("training-live", of=PANEL)
    notebook.shot("training-live-panel", only=PANEL)
    print("the panel in the picture:", " | ".join(page.locator(PANEL).inner_text().split("\n")))
    notebook.wait_until_done(900)
    seen = page.evaluate(SEEN)
    assert seen["curves"] >= 3 and seen["texts"] >= 3, seen
    assert seen["nodes"] == 1 and len(seen["heights"]) == 1, seen
    assert notebook.errors() == []
    saved = notebook.save(served)
    outputs = train_cell(notebook)["outputs"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert not [output for output in outputs if any("widget" in kind for kind in output.get("data", {}))]
    assert "widgets" not in saved["metadata"]
    assert (workdir / "outputs/plots/04_training.png").is_file()
    drawing, seconds = (float(word) for word in notebook.text("cost").split()[1:])
    print(f"drawing {drawing:.2f} s, {drawing / seconds:.2%} of {seconds:.0f} s")
    assert drawing <= 0.01 * seconds
    notebook.shot("training-finished", of="img[alt*='finished']")


@pytest.mark.parametrize(("how", "first"), [("Stop button", 3), ("interrupted", 1)])
def test_training_can_be_ended(training, page, how, first):
    """Stop could wait for the end of the training, lose the adapter, or keep later cells from running.

    The interrupt comes before the first sample and the first evaluation of a trained model.
    """
    name = how.split()[0].lower()
    notebook, workdir = training(name, overrides=LONG)
    at = at_step(page, first)
    began = time.monotonic()
    if how == "interrupted":
        notebook.command("notebook:interrupt-kernel", wait=False)
    else:
        page.locator(".jupyter-button", has_text="Stop").click()
    page.locator(".fiqa-panel").wait_for(state="detached", timeout=60_000)
    took = time.monotonic() - began
    notebook.wait_until_done(120)
    text = "\n".join(notebook.text(cell["id"]) for cell in notebook.cells())
    step, total, reason = STOPPED.search(text).groups()
    print(f"{how}: {took:.1f} s, at step {step} of {total}")
    assert reason == how and int(step) <= at + 2 and total == "8"
    assert notebook.errors() == []
    assert all(cell["count"] for cell in notebook.cells())
    assert (workdir / "checkpoints/final_model/adapter_model.safetensors").is_file()
    card = json.loads((workdir / "outputs/run_cards/04.json").read_text())
    assert f"stopped at step {step}" in json.dumps(card)
    notebook.shot(f"training-{name}", of="img[alt*='stopped at step']")


def test_a_restarted_kernel_resumes(training, page):
    """After a kernel's death the run could begin anew over its checkpoints, or lose curve and samples."""
    notebook, workdir = training("restarted", overrides=LONG)
    at_step(page, 5)
    notebook.command("notebook:restart-kernel", wait=False)
    page.locator(".jp-Dialog .jp-mod-accept").click()
    page.locator(".jp-Dialog").wait_for(state="detached")
    notebook.wait_for_kernel()
    newest = max(
        int(path.name.partition("-")[2]) for path in (workdir / "checkpoints/run").glob("checkpoint-*")
    )
    notebook.command("notebook:clear-all-cell-outputs")
    notebook.run_all()
    page.wait_for_selector(".fiqa-panel .when:has-text('resumed at step')", timeout=300_000)
    notebook.show(PANEL)
    assert f"resumed at step {newest}" in page.locator(".fiqa-panel .when").inner_text()
    at_step(page, newest + 1)
    notebook.shot("training-resumed", of=PANEL)
    notebook.wait_until_done(600)
    assert notebook.errors() == []
    text = "\n".join(notebook.text(cell["id"]) for cell in notebook.cells())
    assert f"resumed at step {newest}" in text and "finished 8 steps" in text


def test_run_all_after_a_finished_run_trains_nothing(workshop, served, lab, page):
    """Run All once more could train over a good adapter without a word."""
    workdir = workshop("04")
    adapter = workdir / "checkpoints/final_model/adapter_model.safetensors"
    before = adapter.read_bytes(), adapter.stat().st_mtime_ns
    notebook = Notebook(page, *lab, place(served, workdir, "04", overrides=SHORT))
    notebook.run_all()
    notebook.wait_until_done(300)
    assert notebook.errors() == []
    assert "nothing was trained again" in "\n".join(notebook.text(cell["id"]) for cell in notebook.cells())
    assert (adapter.read_bytes(), adapter.stat().st_mtime_ns) == before


def test_the_playground_with_the_keyboard_alone_and_with_the_mouse(workshop, served, lab, page):
    """The box could be dead, take keys for notebook commands, block the page, or show one answer twice."""
    workdir = workshop("04")
    notebook = Notebook(page, *lab, place(served, workdir, "05", overrides=SHORT))
    notebook.run_all()
    notebook.wait_until_done(600)
    assert notebook.errors() == []
    page.locator(".widget-textarea textarea").focus()
    notebook.show(".widget-textarea")
    page.keyboard.press("Control+a")
    page.keyboard.type("Is a <b>bond</b> safer than a stock?")
    page.keyboard.press("Tab")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.locator(".widget-readout").first.inner_text() == "0.3"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("End")  # the longest answers that can be asked for
    assert page.locator(".widget-readout").last.inner_text() == "64"
    page.evaluate(WATCH_ANSWERS)
    tab_to(page, "Answer")
    page.keyboard.press("Space")
    page.get_by_text(re.compile(r"^Done after [\d.]+ s")).wait_for(timeout=120_000)
    assert page.evaluate(FOCUS) == "Answer"  # a person without a mouse was not thrown out
    answers = page.locator(ANSWERS).all_inner_texts()
    assert len(answers) == 2 and all(answers) and answers[0] != answers[1]
    assert page.evaluate("() => window.written.size") >= 6  # it appeared in steps
    notebook.shot("playground", of=ANSWERS)
    page.locator(".jupyter-button", has_text="Answer").click()
    page.get_by_text("model is writing").first.wait_for(timeout=60_000)
    page.locator(".jupyter-button", has_text="Stop").click()
    page.get_by_text(re.compile(r"^Stopped after [\d.]+ s")).wait_for(timeout=15_000)


FOCUS = "() => document.activeElement.textContent.trim()"
ANSWERS = ".widget-vbox table td"
WATCH_ANSWERS = """() => {
  window.written = new Set();
  const look = () => window.written.add(document.querySelector('.widget-vbox table')?.textContent);
  const box = document.querySelector('.widget-vbox');
  new MutationObserver(look).observe(box, {childList: true, subtree: true});
}"""


def tab_to(page, label: str) -> None:
    """Press the Tab key until the button with this label has the focus."""
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.evaluate(FOCUS) == label:
            return
    raise AssertionError(f"the Tab key does not reach {label}")
