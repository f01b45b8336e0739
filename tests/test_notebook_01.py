"""Notebooks 01 and 02 on rows of somebody else: hostile text stays text, other formats and sizes work."""

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


def test_rows_of_somebody_else(tmp_path, project, fiqa_rows):
    """A post runs code or loads a picture; a test reference is cut to its topic; a plot has no words."""
    mine = [
        *fiqa_rows[:40],
        {"question": f"Why? {HOSTILE}", "ground_truths": [f"{HOSTILE} " * 300]},
        {"question": f"How? {HOSTILE}", "ground_truths": ["<script>alert(4)</script>"]},
        {"question": fiqa_rows[0]["question"].upper(), "ground_truths": ["The same question again."]},
    ]
    (tmp_path / "mine.json").write_text(json.dumps(mine), encoding="utf-8")
    overrides = f"{{data: {tmp_path / 'mine.json'}, training: topical}}"
    parameters = {"profile": "laptop", "overrides": overrides, "workdir": str(tmp_path)}
    (tmp_path / "parameters.yaml").write_text(json.dumps(parameters))
    command = [sys.executable, "-m", "papermill", str(project / "notebooks" / "01_explore_fiqa.ipynb")]
    command += [str(tmp_path / "01.ipynb"), "-f", str(tmp_path / "parameters.yaml"), "--no-progress-bar"]
    run = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]

    notebook = nbformat.read(tmp_path / "01.ipynb", 4)
    shown = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
    pages = "".join(o["data"].get("text/html", "") for o in shown)
    assert "&lt;script&gt;alert(1)" in pages and "&lt;script&gt;alert(4)" in pages  # it was shown
    assert "<script>" not in pages and "<img" not in pages
    assert not [o for o in shown if "text/markdown" in o["data"] or "text/latex" in o["data"]]
    everything = json.dumps(notebook.cells, ensure_ascii=False)
    assert "\x1b" not in everything and "\\u001b" not in everything and "\u202e" not in everything

    card = json.loads((tmp_path / "outputs" / "run_cards" / "01.json").read_text())
    assert card["facts"]["rows"] == {"train": 34, "validation": 4, "test": 4}
    assert "34 train, 4 validation, 4 test rows; 1 left out" in card["facts"]["source"]

    pictures = [o for o in shown if "image/png" in o["data"]]
    assert len(pictures) == 4 and all(len(o["metadata"]["image/png"]["alt"]) > 30 for o in pictures)

    names = ("train", "val", "test")
    rows = {name: json.loads((tmp_path / "data" / f"{name}_processed.json").read_text()) for name in names}
    assert 5 < len(rows["train"]) < 34
    assert max(len(row["answer"].split()) for row in rows["train"]) <= 120  # no sentence here is longer
    whole = {row["ground_truths"][0].strip() for row in mine}
    assert all(row["answer"] in whole or "alert" in row["answer"] for row in rows["val"] + rows["test"])
    assert all(row["answer"] == row["ground_truths"][0] for row in rows["train"])


@pytest.mark.parametrize("text", ["12 $ 7 % \U0001f4b8", "7", "\u682a"], ids=["numbers", "one", "letter"])
def test_rows_without_words_have_groups_too(project, text):
    """A list of tickers, or of numbers, has no word that comes twice: k-means had nothing to weigh."""
    notebook = nbformat.read(project / "notebooks" / "01_explore_fiqa.ipynb", 4)
    code = {cell["id"]: cell.source for cell in notebook.cells}
    rows = {"question": [f"{text} {i}" for i in range(12)], "answer": [text] * 12}
    names = {"profile": SimpleNamespace(seed=1), "rows": pd.DataFrame(rows)}
    imports = [line for line in code["01-04"].splitlines() if "pandas" in line or "sklearn" in line]
    exec("\n".join([*imports, code["01-28"]]), names)
    assert names["sizes"].sum() == 12


def test_no_more_is_lost_than_there_is(project, capsys):
    """Questions alone fill the limit: 02 counted their tokens too, and 200 % of the answers were lost."""
    notebook = nbformat.read(project / "notebooks" / "02_format_prompts.ipynb", 4)
    (source,) = [cell.source for cell in notebook.cells if cell.id == "02-32x"]
    whole = {"input_ids": [[1] * 60], "labels": [[-100] * 50 + [1] * 10]}
    names = {"whole": whole, "lengths": [60], "profile": SimpleNamespace(max_length=40)}
    exec(source, names | {"REFERENCE": SimpleNamespace(max_length=55)})
    said = capsys.readouterr().out
    assert "100.0% of all answer tokens" in said and " 50.0% of all answer tokens" in said
