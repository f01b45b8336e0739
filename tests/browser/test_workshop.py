"""The real notebooks in a real browser: the laptop profile's real model, a few short steps.

Each test asks for the notebooks it builds on; they are run once, in the browser too. Screenshots are left in
outputs/screenshots.
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


def unrun(notebook: Notebook) -> list[str]:
    """Errors of a notebook, and the cells that were not run."""
    return notebook.errors() + [cell["id"] for cell in notebook.cells() if not cell["count"]]


def test_from_link_to_link(served, lab, page):
    """A reader follows "next" and presses Run All: a link could lead nowhere, a cell fail, the panel miss."""
    folder = served / "walk"
    folder.mkdir()
    for number, name in NAMES.items():
        place(folder, served / "walked", number, name=name, profile="tiny")
    notebook = Notebook(page, *lab, f"walk/{NAMES['00']}")
    for number, name in NAMES.items():
        if number > "00":
            page.locator(f".jp-NotebookPanel:visible a[href*='{name}']").last.click()
            there = f"() => jupyterapp.shell.currentWidget?.context?.path === 'walk/{name}'"
            page.wait_for_function(there, timeout=60_000)
            notebook.wait_for_kernel()
        notebook.run_all()
        if number == "04":
            page.wait_for_selector(f"{PANEL} svg", timeout=120_000)
        notebook.wait_until_done(600)
        assert unrun(notebook) == [], name
    page.evaluate("async () => await jupyterapp.serviceManager.sessions.shutdownAll()")


@pytest.fixture(scope="session")
def workshop(served, lab, browser):
    """workshop("03"): the workdir with notebooks 00 to 03 run in the browser, once in this session."""
    workdir, done = served / "workshop", {}

    def run_up_to(number: str) -> Path:
        for earlier in [name for name in sorted(NAMES) if name <= number]:
            if earlier not in done:
                done[earlier] = "failed"  # a second test must not wait for it again
                page = browser.new_page(viewport={"width": 1360, "height": 1080})
                notebook = Notebook(page, *lab, place(served, workdir, earlier, overrides=SHORT))
                notebook.run_all(900)
                notebook.shot(f"notebook-{earlier}", of=".jp-OutputArea-output :is(img, svg, table)")
                done[earlier] = unrun(notebook)
                notebook.close()
            assert done[earlier] == [], f"{NAMES[earlier]}: {done[earlier]}"
        return workdir

    return run_up_to


@pytest.fixture
def training(served, lab, page, workshop):
    """training(name): notebook 04 running, in a workdir of its own that holds what 00 to 03 left."""

    def start(name: str, overrides: str = LONG) -> tuple[Notebook, Path]:
        workdir = served / f"training-{name}"
        shutil.copytree(workshop("03"), workdir, ignore=shutil.ignore_patterns("checkpoints"))
        notebook = Notebook(page, *lab, place(served, workdir, "04", COST, overrides=overrides))
        notebook.run_all()
        page.wait_for_selector(".fiqa-panel svg", timeout=300_000)
        notebook.show(PANEL)
        return notebook, workdir

    return start


def test_training_is_watched_in_one_place(training, page, served):
    """The curve could stand still, flicker or jump; the samples never change; widgets stay in the file.

    This is the laptop profile as it is, without overrides, and so the place to measure what drawing costs.
    """
    notebook, _ = training("watched", overrides="{}")
    page.evaluate(WATCH)
    at_step(page, 15, 900)
    page.wait_for_selector(".fiqa-panel .samples .h:has-text('at step 12')")
    assert notebook.running
    notebook.shot("training-live", of=PANEL)
    notebook.shot("training-live-panel", only=PANEL)
    notebook.wait_until_done(900)
    seen = page.evaluate(SEEN)
    assert seen["curves"] >= 3 and seen["texts"] >= 3, seen
    assert seen["nodes"] == 1 and len(seen["heights"]) == 1, seen
    assert notebook.errors() == []
    train = next(cell for cell in notebook.cells() if "with panel:" in cell["source"])
    kinds = [kind for output in train["outputs"] for kind in output.get("data", {})]
    assert kinds.count("image/png") == 1 and not [kind for kind in kinds if "widget" in kind]
    assert "widgets" not in notebook.save(served)["metadata"]
    drawing, seconds = (float(word) for word in notebook.text("cost").split()[1:])
    print(f"drawing {drawing:.2f} s, {drawing / seconds:.2%} of {seconds:.0f} s")
    assert drawing <= 0.01 * seconds
    notebook.shot("training-finished", of="img[alt*='finished']")


@pytest.mark.parametrize(("how", "first"), [("Stop button", 3), ("interrupted", 1)])
def test_training_can_be_ended(training, page, how, first):
    """Stop could wait for the end of the training, lose the adapter, or keep later cells from running.

    The interrupt comes before the first sample and the first evaluation of a trained model.
    """
    notebook, workdir = training(how.split()[0].lower())
    at, began = at_step(page, first), time.monotonic()
    if how == "interrupted":
        notebook.command("notebook:interrupt-kernel", wait=False)
    else:
        page.locator(".jupyter-button", has_text="Stop").click()
    page.locator(PANEL).wait_for(state="detached", timeout=60_000)
    print(f"{how}: {time.monotonic() - began:.1f} s")
    notebook.wait_until_done(120)
    step, total, reason = re.search(r"stopped at step (\d+) of (\d+) \((.*?)\)", notebook.text()).groups()
    assert reason == how and int(step) <= at + 2 and total == "8"
    assert unrun(notebook) == []
    assert (workdir / "checkpoints/final_model/adapter_model.safetensors").is_file()
    card = json.loads((workdir / "outputs/run_cards/04.json").read_text())
    assert f"stopped at step {step}" in json.dumps(card)


def test_a_restarted_kernel_resumes(training, page):
    """After a kernel's death the run could begin anew over its checkpoints, or lose curve and samples."""
    notebook, workdir = training("restarted")
    at_step(page, 5)
    notebook.command("notebook:restart-kernel", wait=False)
    page.locator(".jp-Dialog .jp-mod-accept").click()
    page.locator(".jp-Dialog").wait_for(state="detached")
    notebook.wait_for_kernel()
    found = (workdir / "checkpoints/run").glob("checkpoint-*")
    newest = max(int(path.name.partition("-")[2]) for path in found)
    notebook.command("notebook:clear-all-cell-outputs")
    notebook.run_all()
    page.wait_for_selector(f".fiqa-panel .when:has-text('resumed at step {newest}')", timeout=300_000)
    at_step(page, newest + 1)
    notebook.shot("training-resumed", of=PANEL)
    notebook.wait_until_done(600)
    assert notebook.errors() == []
    assert f"resumed at step {newest}" in notebook.text() and "finished 8 steps" in notebook.text()


def test_run_all_after_a_finished_run_trains_nothing(workshop, served, lab, page):
    """Run All once more could train over a good adapter without a word."""
    workdir = workshop("04")
    adapter = workdir / "checkpoints/final_model/adapter_model.safetensors"
    before = adapter.read_bytes(), adapter.stat().st_mtime_ns
    notebook = Notebook(page, *lab, place(served, workdir, "04", overrides=SHORT))
    notebook.run_all(300)
    assert notebook.errors() == [] and "nothing was trained again" in notebook.text()
    assert (adapter.read_bytes(), adapter.stat().st_mtime_ns) == before


ANSWERS = ".widget-vbox table td"
WATCH_ANSWERS = """() => {
  window.written = new Set();
  const look = () => window.written.add(document.querySelector('.widget-vbox table')?.textContent);
  const box = document.querySelector('.widget-vbox');
  new MutationObserver(look).observe(box, {childList: true, subtree: true});
}"""


def test_the_playground_with_the_keyboard_alone_and_with_the_mouse(workshop, served, lab, page):
    """The box could be dead, take keys for notebook commands, block the page, or show one answer twice."""
    notebook = Notebook(page, *lab, place(served, workshop("04"), "05", overrides=SHORT))
    notebook.run_all(600)
    assert notebook.errors() == []
    page.locator(".widget-textarea textarea").focus()
    notebook.show(".widget-textarea")
    page.keyboard.press("Control+a")
    page.keyboard.type("Is a <b>bond</b> safer than a stock?")
    for key in ("Tab", "ArrowRight", "ArrowRight", "ArrowRight", "Tab", "Tab", "End"):
        page.keyboard.press(key)
    readouts = page.locator(".widget-readout")
    assert (readouts.first.inner_text(), readouts.last.inner_text()) == ("0.3", "64")
    page.evaluate(WATCH_ANSWERS)
    focus = "() => document.activeElement.textContent.trim()"
    for _ in range(8):
        if page.evaluate(focus) != "Answer":
            page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.get_by_text(re.compile(r"^Done after [\d.]+ s")).wait_for(timeout=120_000)
    assert page.evaluate(focus) == "Answer"  # a person without a mouse was not thrown out
    answers = page.locator(ANSWERS).all_inner_texts()
    assert len(answers) == 2 and all(answers) and answers[0] != answers[1]
    assert page.evaluate("() => window.written.size") >= 6  # it appeared in steps
    notebook.shot("playground", of=ANSWERS)
    page.locator(".jupyter-button", has_text="Answer").click()
    page.get_by_text("model is writing").first.wait_for(timeout=60_000)
    page.locator(".jupyter-button", has_text="Stop").click()
    page.get_by_text(re.compile(r"^Stopped after [\d.]+ s")).wait_for(timeout=15_000)
