"""Clean twins: the notebooks without their explanations, to work through again from memory."""

import runpy
from pathlib import Path

import nbformat
import pytest

PROJECT = Path(__file__).resolve().parent.parent
LESSONS = sorted((PROJECT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
script = runpy.run_path(str(PROJECT / "scripts" / "clean_notebooks.py"))


@pytest.fixture
def copies(tmp_path) -> Path:
    script["main"](tmp_path / "clean")
    return tmp_path / "clean"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_copy_has_the_code_the_headings_and_the_tasks(copies, path):
    """A comment taken for a heading, a lost cell, or an explanation that gives the result away."""
    lesson, copy = nbformat.read(path, 4), nbformat.read(copies / path.name, 4)
    nbformat.validate(copy)
    code, copied = ([c for c in notebook.cells if c.cell_type == "code"] for notebook in (lesson, copy))
    assert copied == code
    text = "\n".join(cell.source for cell in copy.cells if cell.cell_type == "markdown")
    wanted = [line for cell in lesson.cells for line in cell.source.splitlines() if line.startswith("## ")]
    assert [line for line in text.splitlines() if line.startswith("## ")] == wanted
    kept = [c for c in lesson.cells if "exercise" in c.metadata.get("tags", [])]
    assert kept and all(cell in copy.cells for cell in kept)
    others = [c.source for c in copy.cells if c.cell_type == "markdown" and c not in kept]
    assert all(line.startswith("#") for source in others for line in source.splitlines() if line)
    assert "**Predict:**" not in text


def test_work_in_a_copy_is_kept(copies, capsys):
    """Whoever calls it again must not lose an hour of notes."""
    mine = copies / LESSONS[3].name
    mine.write_text("notes")
    (copies / LESSONS[0].name).unlink()
    capsys.readouterr()
    script["main"](copies)
    said = capsys.readouterr().out.splitlines()
    assert mine.read_text() == "notes"
    assert said[0].endswith("written") and "delete it for a fresh copy" in said[3]
