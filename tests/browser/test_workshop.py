"""The real notebooks in a real browser. Screenshots are left in outputs/screenshots."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import NAMES, PANEL, READY, Notebook, at_step, place, press

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_from_link_to_link(served, lab, page):
    """A reader follows "next", presses Run All, and Stop in 04: a link could lead nowhere, a cell fail."""
    folder, values = served / "walk", {"profile": "tiny", "overrides": "{max_steps: 400, epochs: 200}"}
    folder.mkdir()
    for number, name in NAMES.items():
        place(folder, served / "walked", number, name=name, **values)
    notebook = Notebook(page, *lab, f"walk/{NAMES['00']}")
    for number, name in NAMES.items():
        if number > "00":
            page.locator(f".jp-NotebookPanel:visible a[href*='{name}']").last.click()
            there = f"() => jupyterapp.shell.currentWidget?.context?.path === 'walk/{name}'"
            page.wait_for_function(there, timeout=60_000)
            page.evaluate(READY)
        notebook.run_all()
        if number == "04":
            at_step(page, 5)
            press(page, "Stop")
        notebook.wait_until_done(600)
        assert notebook.errors() == [], name
        if number == "04":
            step = re.search(r"stopped at step (\d+) of 400 \(Stop button\)", notebook.text())[1]
            assert f"stopped at step {step}" in (served / "walked/outputs/run_cards/04.json").read_text()


ANSWERS = ".widget-vbox table td"  # of the playground


def test_a_training_and_its_playground_on_a_laptop(served, lab, page):
    """Drawing could cost more than a hundredth of the time; the box be dead, block the page, take keys."""
    workdir = served / "laptop"
    command = [sys.executable, "-m", "fiqa_helpers", "run", "--profile", "laptop", "--only", "01-03"]
    subprocess.run([*command, "--workdir", str(workdir)], check=True)
    cost = "print(panel.drawing_seconds, panel.seconds)"
    short = "{max_steps: 16, batch_size: 4, max_new_tokens: 32}"
    notebook = Notebook(page, *lab, place(served, workdir, "04", last=cost, overrides=short))
    notebook.run_all()
    at_step(page, 15, 900)
    page.wait_for_selector(f"{PANEL} .samples .h:has-text('at step 12')")
    notebook.shot("training-live", of=PANEL)
    notebook.shot("training-live-panel", only=PANEL)
    notebook.wait_until_done(900)
    assert notebook.errors() == []
    drawing, seconds = map(float, notebook.text("last").split())
    print(f"drawing {drawing:.2f} s, {drawing / seconds:.2%} of {seconds:.0f} s")
    assert drawing <= 0.01 * seconds

    notebook = Notebook(page, *lab, place(served, workdir, "05"))
    notebook.run_all(600)
    assert notebook.errors() == []
    page.locator(".widget-textarea textarea").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("Is a <b>bond</b> safer than a stock?")
    for key in ("Tab", "ArrowRight", "ArrowRight", "ArrowRight", "Tab"):
        page.keyboard.press(key)
    assert float(page.locator(".widget-readout").first.inner_text()) == 0.3
    focus = "() => document.activeElement.textContent.trim()"
    for _ in range(8):
        if page.evaluate(focus) != "Answer":
            page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.get_by_text(re.compile(r"^Done after [\d.]+ s")).wait_for(timeout=120_000)
    assert page.evaluate(focus) == "Answer"  # a person without a mouse was not thrown out
    answers = page.locator(ANSWERS).all_inner_texts()
    assert len(answers) == 2 and all(answers) and answers[0] != answers[1]
    notebook.shot("playground", of=ANSWERS)
    page.locator(".jupyter-button", has_text="Answer").click()
    page.get_by_text("model is writing").first.wait_for(timeout=60_000)
    page.locator(".jupyter-button", has_text="Stop").click()
    page.get_by_text(re.compile(r"^Stopped after [\d.]+ s")).wait_for(timeout=15_000)


NOWHERE = "http://127.0.0.1:9/"
SCRIPT = "<script>window.hacked = 1</script>"
HOSTILE = (
    f"{SCRIPT}<img src='{NOWHERE}a.png' onerror='window.hacked = 2'>![b]({NOWHERE}b.png) "
    f"<a href='javascript:window.hacked = 3'>c</a> **bold** from $80 to $95 \x1b[31mred\x1b[0m "
    f"\x1b]8;;{NOWHERE}d\x07link\x1b]8;;\x07 </p></td></table></div><style>*{{display:none}}</style>"
)
OVERRIDES = "{{data: {folder}, max_new_tokens: 32, max_length: 512, tokens_per_batch: 2048}}"
FORCE = f"""  # answers, and tokens in 02; a single id in 05 is no text of anybody
import numpy, transformers
transformers.PreTrainedTokenizerBase.decode = lambda _, ids, **__: {HOSTILE!r} if numpy.ndim(ids) else "token"
"""
# Links, pictures, formulas and colours out of the text. JupyterLab makes a link of an address in plain text:
# one that leads where it says does no harm.
RENDERED = f"""() => [...document.querySelectorAll('.jp-OutputArea-output *')]
  .filter(e => e.matches('a, img, mjx-container, .ansi-red-fg'))
  .filter(e => e.tagName === 'A'
    ? /^javascript|^http:..127.0.0.1:9/.test(e.href) && e.getAttribute('href') !== e.textContent
    : e.tagName !== 'IMG' || e.src.startsWith('{NOWHERE}'))
  .map(e => e.outerHTML)"""


def hostile_rows(folder: Path) -> None:
    """Splits in which every question and every answer is hostile."""
    folder.mkdir()
    for split, count in {"train": 40, "validation": 8, "test": 12}.items():
        answers = [f"{HOSTILE} Answer {i} " + "money " * i for i in range(count)]
        rows = [{"question": f"{split} {i}: {HOSTILE}", "ground_truths": [a]} for i, a in enumerate(answers)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_hostile_rows_and_answers_are_shown_as_text(served, lab, page):
    """One row or answer could run a script, load a picture (and so tell who reads), or hide the page."""
    hostile_rows(served / "rows")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    values = {"profile": "tiny", "overrides": OVERRIDES.format(folder=served / "rows"), "first": FORCE}
    for number in ("01", "02", "03", "04", "05"):
        notebook = Notebook(page, *lab, place(served, served / "hostile", number, **values))
        notebook.run_all(300)
        assert notebook.errors() == [], number
        if number == "05":
            page.locator(".jupyter-button", has_text="Answer").click()
            page.get_by_text(re.compile(r"^Done after [\d.]+ s")).wait_for(timeout=60_000)
            assert page.locator(ANSWERS).last.inner_text().startswith(SCRIPT)
        assert page.evaluate("() => window.hacked") is None, number
        assert [url for url in asked if url.startswith(NOWHERE)] == [], number
        assert page.evaluate(RENDERED) == [], number
        assert page.locator(".jp-NotebookPanel-toolbar").is_visible()  # no <style> took effect
        assert page.locator(".jp-OutputArea-output").get_by_text(SCRIPT).count(), number
