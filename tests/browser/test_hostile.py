"""Rows and generated answers that try to become markup, commands or requests, in the real notebooks.

The rows are a folder of data; the answers are made by the model's real `generate`, forced token by token.
"""

import json
import re
from pathlib import Path

import pytest
from browser import Notebook
from real_notebooks import place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ANSWERS = ".widget-vbox table td"  # of the playground
NOWHERE = "http://127.0.0.1:9/"
SCRIPT = "<script>window.hacked = 1</script>"
HOSTILE = (
    f"{SCRIPT}<img src='{NOWHERE}a.png' onerror='window.hacked = 2'>![b]({NOWHERE}b.png) "
    f"<a href='javascript:window.hacked = 3'>c</a> **bold** from $80 to $95 \x1b[31mred\x1b[0m "
    f"\x1b]8;;{NOWHERE}d\x07link\x1b]8;;\x07 </p></td></table></div><style>*{{display:none}}</style>"
)
OVERRIDES = "{{data: {folder}, max_new_tokens: 200, max_length: 512, tokens_per_batch: 2048}}"
FORCE = f"""
import torch, transformers
from fiqa_helpers import model as _model, profiles as _profiles

_ids = _model.load_tokenizer(_profiles.load_profile("tiny"))
_ids = [*_ids({HOSTILE!r})["input_ids"], _ids.eos_token_id]
_generate = transformers.GenerationMixin.generate


def _forced(self, *args, **kwargs):
    if "input_ids" not in kwargs:  # notebook 05's own call, held against its greedy loop
        return _generate(self, *args, **kwargs)

    def force(so_far, scores):
        forced = torch.full_like(scores, -float("inf"))
        forced[:, _ids[min(so_far.shape[1] - kwargs["input_ids"].shape[1], len(_ids) - 1)]] = 0
        return forced

    return _generate(self, *args, **kwargs, logits_processor=[force])


transformers.GenerationMixin.generate = _forced
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
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def look_at(number: str, folder: Path, lab: tuple[str, str], browser) -> int:
    """Run a notebook over the hostile rows; gives how many outputs show the script as text."""
    page, asked = browser.new_page(viewport={"width": 1360, "height": 1080}), []
    page.on("request", lambda request: asked.append(request.url))
    values = {"profile": "tiny", "overrides": OVERRIDES.format(folder=folder / "rows")}
    name = place(folder, folder / "hostile", number, first={"force": FORCE}, **values)
    notebook = Notebook(page, *lab, name)
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
    shown = page.locator(".jp-OutputArea-output").get_by_text(SCRIPT).count()
    notebook.close()
    return shown


def test_hostile_rows_and_answers_are_shown_as_text(served, lab, browser):
    """One row or answer could run a script, load a picture (and so tell who reads), or hide the page."""
    hostile_rows(served / "rows")
    shown = {number: look_at(number, served, lab, browser) for number in ("01", "02", "03", "04", "05")}
    assert all(shown.values()), shown
