"""Copies of the notebooks to practise from: headings, code and the tasks of the exercises, no explanations.

`make clean-notebooks` writes them to outputs/clean/; `--short` leaves out the cells tagged `extra`. A copy
that is there already may hold somebody's work: it is left alone.
"""

import re
import sys
from pathlib import Path

import nbformat

PROJECT = Path(__file__).resolve().parent.parent


def headings(text: str) -> str:
    """The heading lines of a Markdown text; what looks like one in a block of code is none."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n\n".join(re.findall(r"^#{1,6} .+$", text, re.MULTILINE))


def clean(notebook: nbformat.NotebookNode, short: bool = False) -> nbformat.NotebookNode:
    """`notebook` with Markdown cells cut to their headings, or left out where they have none."""
    cells = []
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown" and "exercise" not in tags:
            cell = nbformat.from_dict({**cell, "source": headings(cell.source)})
        if cell.source and not (short and "extra" in tags):
            cells.append(cell)
    return nbformat.from_dict({**notebook, "cells": cells})


def main(folder: Path = PROJECT / "outputs" / "clean", short: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((PROJECT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        copy = folder / path.name
        said = "is there already; delete it for a fresh copy" if copy.exists() else "written"
        if not copy.exists():
            nbformat.write(clean(nbformat.read(path, 4), short), copy)
        print(f"{folder.name}/{copy.name}: {said}")


if __name__ == "__main__":
    main(short="--short" in sys.argv)
