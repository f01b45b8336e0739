"""Clean twins: the notebooks without their explanations, to work through again from memory."""

import runpy
from pathlib import Path

import nbformat

PROJECT = Path(__file__).resolve().parent.parent
LESSONS = sorted((PROJECT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
script = runpy.run_path(str(PROJECT / "scripts" / "clean_notebooks.py"))


def test_a_copy_has_the_code_the_headings_and_the_tasks(tmp_path):
    """A comment taken for a heading, a lost cell, or an explanation that gives the result away."""
    script["main"](tmp_path)
    for path in LESSONS:
        lesson, copy = nbformat.read(path, 4), nbformat.read(tmp_path / path.name, 4)
        nbformat.validate(copy)
        kept = [c for c in lesson.cells if c.cell_type == "code" or "exercise" in c.metadata.get("tags", [])]
        headings = [cell for cell in copy.cells if cell not in kept]
        assert [cell for cell in copy.cells if cell in kept] == kept
        assert all(line.startswith("#") for cell in headings for line in cell.source.splitlines() if line)
        lines = [[line for cell in n.cells for line in cell.source.splitlines()] for n in (lesson, copy)]
        wanted, found = ([line for line in text if line.startswith("## ")] for text in lines)
        assert found == wanted


def test_the_short_way_leaves_out_what_is_extra(tmp_path):
    """Practising for an hour, nobody wants the cells that not everybody needs."""
    script["main"](tmp_path, short=True)
    cells = [cell for path in LESSONS for cell in nbformat.read(tmp_path / path.name, 4).cells]
    assert len(cells) > 100 and not [cell.id for cell in cells if "extra" in cell.metadata.get("tags", [])]


def test_work_in_a_copy_is_kept(tmp_path, capsys):
    """Whoever calls it again must not lose an hour of notes."""
    mine = tmp_path / LESSONS[3].name
    mine.write_text("notes")
    script["main"](tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert mine.read_text() == "notes"
    assert said[0].endswith("written") and "delete it for a fresh copy" in said[3]
