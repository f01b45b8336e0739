"""notebooks/executed/, for people who run nothing: each copy is of its source and tells of no machine."""

import re
import runpy
import shutil
from pathlib import Path

import nbformat
import pytest

from fiqa_helpers.base import WorkshopError

PROJECT = Path(__file__).resolve().parent.parent
COPIES = PROJECT / "notebooks" / "executed"
PRIVATE = re.compile(r"(?<![\w.~:/-])/(?:root|home|Users|tmp|work|mnt|media|opt|srv|var|private)/\S+")
script = runpy.run_path(str(PROJECT / "scripts" / "executed.py"))


def texts(notebook: nbformat.NotebookNode) -> str:
    """All that is read in a notebook: sources and outputs, without pictures."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    parts = [part.items() for output in outputs for part in (output, output.get("data", {}))]
    said = [text for part in parts for kind, text in part if kind.startswith("text")]
    return "\n".join([cell.source for cell in notebook.cells] + said)


def links(notebook: nbformat.NotebookNode) -> list[str]:
    """Relative links of the Markdown cells, pictures as well."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    found = re.findall(r'(?:\]\(|src="|href=")([^)"\s#]+)', text)
    return [link for link in found if not re.match(r"\w+:", link)]


@pytest.mark.skipif(not COPIES.is_dir(), reason="no notebooks/executed: `make run`, then `make executed`")
@pytest.mark.parametrize("source", sorted((PROJECT / "notebooks").glob("0*.ipynb")), ids=lambda p: p.stem)
def test_a_copy_is_of_its_source(source):
    """Results beside another text than the one that ran; a dead link, or a path of somebody's machine."""
    copy = nbformat.read(COPIES / source.name, 4)
    nbformat.validate(copy)
    assert copy.metadata["source_sha256"] == script["hash_of"](nbformat.read(source, 4)), "make executed"
    assert all(cell.execution_count for cell in copy.cells if cell.cell_type == "code")
    assert PRIVATE.findall(texts(copy)) == []
    assert [link for link in links(copy) if not (COPIES / link).exists()] == []
    assert "CC-BY-SA-4.0" in copy.cells[-1].source
    assert sum(path.stat().st_size for path in COPIES.glob("*")) < 1_300_000, "a clone grows with each"


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project with one notebook, and the run of it that papermill left."""
    run = tmp_path / "outputs" / "executed"
    run.mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    text = "# One\n\n[two](02_two.ipynb) ![a](figures/a.svg) [b](../README.md#c) [d](https://e.org)"
    code = nbformat.v4.new_code_cell("print(1)", id="code")
    lesson = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text, id="text"), code])
    nbformat.write(lesson, tmp_path / "notebooks" / "01_one.ipynb")
    said = {"text/html": f"{tmp_path}/data, {Path.home()}/.cache/x", "image/png": "/tmp/AAAA"}
    code.execution_count, code.outputs = 2, [nbformat.v4.new_output("display_data", said)]
    lesson.cells.insert(1, nbformat.v4.new_code_cell(f'workdir = "{tmp_path}"', id="injected"))
    nbformat.write(lesson, run / "01_one.ipynb")
    monkeypatch.setitem(script["main"].__globals__, "project_root", lambda: tmp_path)
    return tmp_path


def test_a_run_becomes_a_page_to_read(project):
    """Outputs lost, a place of this machine, a dead link; a new run for a comma, and none for new code."""
    script["main"](str(project))
    copy = nbformat.read(project / "notebooks" / "executed" / "01_one.ipynb", 4)
    assert [cell.id for cell in copy.cells] == ["text", "executed-copy", "code", "fiqa-attribution"]
    assert copy.cells[2].outputs[0].data == {"text/html": "./data, ~/.cache/x", "image/png": "/tmp/AAAA"}
    assert links(copy)[:3] == ["02_two.ipynb", "../figures/a.svg", "../../README.md"]
    shutil.rmtree(project / "outputs")
    source = project / "notebooks" / "01_one.ipynb"
    source.write_text(source.read_text().replace("# One", "# Two"))
    script["main"](str(project))
    source.write_text(source.read_text().replace("print(1)", "print(2)"))
    with pytest.raises(WorkshopError, match=r"Cell code did not run (.|\n)*`make run ONLY=01`"):
        script["main"](str(project))
