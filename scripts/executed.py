"""Write notebooks/executed/: the notebooks with what a run printed and drew, for people who only read.

`make executed`, or `executed.py [WORKDIR]`, takes them from a run in WORKDIR. A notebook that did not run
there keeps the outputs that its copy has, so that a change of text alone needs no new run.
"""

import hashlib
import json
import platform
import re
import sys
from pathlib import Path

import nbformat

from fiqa_helpers.base import WorkshopError, Workspace, project_root

NOTE = "> A copy to read, with what one run printed and drew. To run it yourself, open [{name}](../{name})."
FIQA = """---
Questions and people's answers on this page are from
[FiQA](https://huggingface.co/datasets/explodinggradients/fiqa) (Maia et al. 2018), CC-BY-SA-4.0; text derived
from them keeps that licence. Answers of a model are generated. Nothing here is financial advice."""


def with_outputs(source: Path, workspace: Workspace) -> nbformat.NotebookNode:
    """The notebook `source` with the outputs of a run in `workspace`, or else of its copy; FiQA is named.

    Raises:
        WorkshopError: there is neither, or a cell failed, was not reached or has changed since.
    """
    run = workspace.root / "outputs" / "executed" / source.name
    executed = run if run.is_file() else source.parent / "executed" / source.name
    if not executed.is_file():
        raise WorkshopError(f"There is no executed notebook {run}: run `make run` first.")
    notebook = nbformat.read(source, 4)
    ran = {cell.id: cell for cell in nbformat.read(executed, 4).cells}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            done = ran.get(cell.id, {"source": None})
            failed = any(output.output_type == "error" for output in done.get("outputs", []))
            if failed or done["source"] != cell.source or done.execution_count is None:
                raise WorkshopError(
                    f"Cell {cell.id} did not run to its end in {executed}, or has changed since: "
                    f"run `make run ONLY={source.name[:2]}` first."
                )
            cell.execution_count = done.execution_count
            cell.outputs = [without_places(output, workspace) for output in done.outputs]
    notebook.cells.append(nbformat.v4.new_markdown_cell(FIQA, id="fiqa-attribution"))
    return notebook


def without_places(output: nbformat.NotebookNode, workspace: Workspace) -> nbformat.NotebookNode:
    """A cell's output without folders of this machine, its name and that of its kernel."""
    places = {workspace.root: ".", project_root(): ".", Path(sys.prefix): ".venv", Path.home(): "~"}
    named = {str(place): name for place, name in places.items()} | {f"-{platform.release()}": ""}
    if not platform.node().isalpha():  # a machine called "laptop" is named by every sentence about laptops
        named[platform.node()] = "this-machine"
    for part in (output, output.get("data", {})):
        for kind in [kind for kind in part if kind.startswith("text")]:
            for place in sorted(named, key=len, reverse=True):  # a folder before the one it is in
                part[kind] = re.sub(rf"{re.escape(place)}(?!\w)", named[place], part[kind])
    return output


def hash_of(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of what somebody wrote into the cells of a notebook: their kinds and sources."""
    cells = [[cell.cell_type, cell.source] for cell in notebook.cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def one_deeper(text: str) -> str:
    """Markdown with relative links as they must be in a folder below; those between notebooks stay."""
    return re.sub(r'(\]\(|src="|href=")(?!\w+:|[#/]|\d\d_\w+\.ipynb)', r"\1../", text)


def main(workdir: str = "") -> None:
    notebooks = project_root() / "notebooks"
    for source in sorted(notebooks.glob("[0-9][0-9]_*.ipynb")):
        notebook, copy = with_outputs(source, Workspace(workdir)), notebooks / "executed" / source.name
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = one_deeper(cell.source)
        note = nbformat.v4.new_markdown_cell(NOTE.format(name=source.name), id="executed-copy")
        notebook.cells.insert(1, note)
        notebook.metadata["source_sha256"] = hash_of(nbformat.read(source, 4))
        copy.parent.mkdir(exist_ok=True)
        nbformat.write(notebook, copy)
        print(f"notebooks/executed/{copy.name}: {copy.stat().st_size:,} bytes")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except WorkshopError as error:
        sys.exit(str(error))
