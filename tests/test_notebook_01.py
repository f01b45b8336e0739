"""Notebook 01 on rows that somebody else wrote: hostile text stays text, other formats and sizes work."""

import json
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest

pytestmark = pytest.mark.notebooks

HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(2)> ![x](https://example.org/x.png) "
    "$\\href{javascript:alert(3)}{x}$ \x1b[31mred \u202etxt.exe السند"
)


@pytest.fixture(scope="module")
def executed(tmp_path_factory, project, fiqa_rows):
    """The notebook on 40 real rows and two hostile ones, the longest and the shortest; training: topical."""
    folder = tmp_path_factory.mktemp("notebook01")
    mine = [
        *fiqa_rows[:40],
        {"question": f"Why? {HOSTILE}", "ground_truths": [f"{HOSTILE} " * 300]},
        {"question": f"How? {HOSTILE}", "ground_truths": ["<script>alert(4)</script>"]},
        {"question": fiqa_rows[0]["question"].upper(), "ground_truths": ["The same question again."]},
    ]
    (folder / "rows").mkdir()
    (folder / "rows" / "mine.json").write_text(json.dumps(mine), encoding="utf-8")
    overrides = f"{{data: {folder / 'rows'}, training: topical}}"
    parameters = {"profile": "laptop", "overrides": overrides, "workdir": str(folder)}
    (folder / "parameters.yaml").write_text(json.dumps(parameters))
    command = [sys.executable, "-m", "papermill", str(project / "notebooks" / "01_explore_fiqa.ipynb")]
    command += [str(folder / "01.ipynb"), "-f", str(folder / "parameters.yaml"), "--no-progress-bar"]
    run = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


def test_hostile_text_is_shown_as_text(executed):
    """A forum post must not run code, load a picture, write formulas or turn the line around."""
    notebook = nbformat.read(executed / "01.ipynb", 4)
    data = [o["data"] for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    pages = "".join(d.get("text/html", "") for d in data)
    assert "&lt;script&gt;alert(1)" in pages and "&lt;script&gt;alert(4)" in pages  # it was shown
    assert "<script>" not in pages and "<img" not in pages
    assert not [d for d in data if "text/markdown" in d or "text/latex" in d]
    everything = json.dumps(notebook.cells, ensure_ascii=False)
    assert "\x1b" not in everything and "\\u001b" not in everything and "\u202e" not in everything


def test_repairs_are_in_the_notebook_and_its_card(executed):
    """What was put right must be read by the person and by the next notebook."""
    card = json.loads((executed / "outputs" / "run_cards" / "01.json").read_text())
    assert card["facts"]["rows"] == {"train": 34, "validation": 4, "test": 4}
    assert sum(card["facts"]["repairs"]["mine.json"].values()) == 3  # two with control characters
    text = (executed / "01.ipynb").read_text()
    assert "Repaired: 1 rows with a question that the split already has" in text


def test_training_answers_are_on_their_topic_and_others_whole(executed, fiqa_rows):
    """A test reference cut to what MiniLM likes would be measured by MiniLM: a gain out of nothing."""
    written = {row["ground_truths"][0] for row in fiqa_rows}
    rows = {
        name: json.loads((executed / "data" / f"{name}_processed.json").read_text())
        for name in ("train", "val", "test")
    }
    assert 5 < len(rows["train"]) < 34
    assert all(row["answer"] == row["ground_truths"][0] for row in rows["train"])
    assert max(len(row["answer"].split()) for row in rows["train"]) <= 120  # no sentence here is longer
    assert all(len(rows[name]) == 4 for name in ("val", "test"))
    whole = [row["answer"] for name in ("val", "test") for row in rows[name] if "alert" not in row["answer"]]
    assert whole and set(whole) <= written


def test_plots_are_small_pictures_with_words(executed):
    """A picture without alternative text says nothing to some readers; megabytes make a slow notebook."""
    plots = sorted((executed / "outputs" / "plots").glob("01_*.png"))
    assert len(plots) == 4 and all(plot.stat().st_size < 100_000 for plot in plots)
    notebook = nbformat.read(executed / "01.ipynb", 4)
    shown = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    pictures = [o for o in shown if "image/png" in o.get("data", {})]
    assert len(pictures) == 4
    assert all(len(o["metadata"]["image/png"]["alt"]) > 30 for o in pictures)


@pytest.mark.parametrize(
    "text", ["12 $ 7 % \U0001f4b8", "7", "? !", "\u682a"], ids=["numbers", "one", "signs", "letter"]
)
def test_rows_without_words_have_groups_too(project, text):
    """A list of tickers, or of numbers, has no word that comes twice: k-means had nothing to weigh."""
    notebook = nbformat.read(project / "notebooks" / "01_explore_fiqa.ipynb", 4)
    code = {cell["id"]: cell.source for cell in notebook.cells}
    rows = {"question": [f"{text} {i}" for i in range(12)], "answer": [text] * 12}
    names = {"profile": SimpleNamespace(seed=1), "rows": pd.DataFrame(rows)}
    imports = [line for line in code["01-04"].splitlines() if "pandas" in line or "sklearn" in line]
    exec("\n".join([*imports, code["01-28"]]), names)
    assert names["sizes"].sum() == 12
