"""The workshop's notebooks, put where JupyterLab serves them, with parameters as papermill injects them."""

import json
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = {path.name[:2]: path.name for path in sorted(NOTEBOOKS.glob("0[0-6]_*.ipynb"))}


def place(folder: Path, workdir: Path, number: str, last=None, first=None, name="", **parameters) -> str:
    """Copy notebook `number` into `folder` as `name`; gives its name there.

    `first` and `last` are cells to add (id -> source), after the parameters and at the end: what a test
    arranges in the kernel, and what it wants to read from there.
    """
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    values = {"profile": "laptop", "workdir": str(workdir), **parameters}
    notebook = parameterize_notebook(load_notebook_node(str(NOTEBOOKS / NAMES[number])), values)
    at = 1 + next(
        i for i, cell in enumerate(notebook.cells) if "injected-parameters" in cell.metadata.get("tags", [])
    )
    notebook.cells[at:at] = cells(first)
    notebook.cells += cells(last)
    name = name or f"{workdir.name}_{NAMES[number]}"
    (folder / name).write_text(json.dumps(notebook), encoding="utf-8")
    return name


def cells(sources: dict | None) -> list:
    """Code cells from id -> source."""
    return [nbformat.v4.new_code_cell(source, id=name) for name, source in (sources or {}).items()]
