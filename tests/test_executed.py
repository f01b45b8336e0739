"""notebooks/executed/, for people who run nothing: each copy is of its source and tells of no machine."""

import re
import runpy
import shutil
from pathlib import Path

import nbformat
import pytest

from fiqa_helpers.base import WorkshopError, Workspace

PROJECT = Path(__file__).resolve().parent.parent
COPIES = PROJECT / "notebooks" / "executed"
PRIVATE = re.compile(r"(?<![\w.~:/-])/(?:root|home|Users|tmp|work|mnt|media|opt|srv|var|private)/\S+")
script = runpy.run_path(str(PROJECT / "scripts" / "executed.py"))


def texts(notebook: nbformat.NotebookNode) -> str:
    """All that is read in a notebook: sources and outputs, without pictures."""
    found = [cell.source for cell in notebook.cells]
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            parts = {**output, **output.get("data", {})}
            found += [text for kind, text in parts.items() if kind.startswith("text")]
    return "\n".join(found)


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
    assert sum(path.stat().st_size for path in COPIES.glob("*")) < 1_300_000, (
        "a clone grows with each of them"
    )


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project with one notebook, and the run of it that papermill left."""
    folder = tmp_path / "a project"
    run = folder / "outputs" / "executed"
    run.mkdir(parents=True)
    (folder / "notebooks").mkdir()
    text = "# One\n\n[two](02_two.ipynb) ![a](figures/a.svg) [b](../README.md#c) [d](https://e.org) [f](#g)"
    code = nbformat.v4.new_code_cell("print(1)", id="code")
    lesson = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text, id="text"), code])
    nbformat.write(lesson, folder / "notebooks" / "01_one.ipynb")
    said = f"{folder}/data, {Path.home()}/.cache/x"
    code.execution_count = 2
    code.outputs = [nbformat.v4.new_output("stream", text=said)]
    code.outputs += [nbformat.v4.new_output("display_data", {"text/html": said, "image/png": "/tmp/AAAA"})]
    lesson.cells.insert(1, nbformat.v4.new_code_cell(f'workdir = "{folder}"', id="injected"))
    lesson.metadata["papermill"] = {"output_path": str(run)}
    nbformat.write(lesson, run / "01_one.ipynb")
    monkeypatch.setitem(script["main"].__globals__, "project_root", lambda: folder)
    return folder


def test_a_run_becomes_a_page_to_read(project):
    """Outputs lost, a picture changed by scrubbing, what papermill put in, links of the folder above."""
    script["main"](str(project))
    path = project / "notebooks" / "executed" / "01_one.ipynb"
    copy = nbformat.read(path, 4)
    assert [cell.id for cell in copy.cells] == ["text", "executed-copy", "code", "fiqa-attribution"]
    stream, picture = copy.cells[2].outputs
    assert stream.text == picture.data["text/html"] == "./data, ~/.cache/x"
    assert picture.data["image/png"] == "/tmp/AAAA" and str(project) not in path.read_text()
    assert links(copy)[:3] == ["02_two.ipynb", "../figures/a.svg", "../../README.md"]
    assert "[d](https://e.org) [f](#g)" in copy.cells[0].source


def test_a_change_of_text_needs_no_new_run_and_one_of_code_does(project):
    """Twelve minutes for a comma, and outputs beside code that never made them."""
    script["main"](str(project))
    shutil.rmtree(project / "outputs")
    source, copy = (project / "notebooks" / folder / "01_one.ipynb" for folder in ("", "executed"))
    for old, new in (("# One", "# Two"), ("print(1)", "print(2)")):
        source.write_text(source.read_text().replace(old, new))
        if old == "# One":
            script["main"](str(project))
    with pytest.raises(WorkshopError, match=r"Cell code did not run (.|\n)*`make run ONLY=01`"):
        script["main"](str(project))
    assert copy.read_text().count("# Two") == 1 and "./data" in copy.read_text()


@pytest.mark.parametrize("fault", ["error", "unfinished", "no run"])
def test_a_failed_run_is_not_shown(project, fault):
    """A traceback in the middle of a page, or results that just end, would be handed to readers."""
    path = project / "outputs" / "executed" / "01_one.ipynb"
    run = nbformat.read(path, 4)
    run.cells[2].execution_count = None if fault == "unfinished" else 2
    if fault == "error":
        run.cells[2].outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
    nbformat.write(run, path)
    if fault == "no run":
        path.unlink()
    with pytest.raises(WorkshopError, match="run `make run"):
        script["with_outputs"](project / "notebooks" / "01_one.ipynb", Workspace(str(project)))
