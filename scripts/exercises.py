"""Write the exercises into the notebooks. Their one source are the solutions: `make exercises`.

A solution notebook holds tasks, empty answers, hints and checks, and beside them what the reader is to
find: solutions, reasons and a set-up of its own. Cells with a tag of EXERCISE go as they are into the lesson
of the same name; the rest stays.
"""

from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
EXERCISE = {"exercise", "answer", "hint", "check"}
HEAD = """## Exercises

Put your answer in place of each `...`, run the cell, then the check below it, which says what is wrong and
never stops the notebook. Solutions, with reasons, are in [solutions/{name}](solutions/{name})."""


def tags(cell: nbformat.NotebookNode) -> set[str]:
    """The tags of a cell."""
    return set(cell.metadata.get("tags", []))


def with_exercises(lesson: nbformat.NotebookNode, solution: nbformat.NotebookNode, name: str):
    """`lesson` with the exercises of `solution` under its heading "Exercises", in place of those it has."""
    cells = [cell for cell in lesson.cells if not tags(cell) & EXERCISE]
    head = next(i for i, cell in enumerate(cells) if cell.source.startswith("## Exercises"))
    cells[head].source = HEAD.format(name=name)
    exercises = [cell for cell in solution.cells if tags(cell) & EXERCISE]
    return nbformat.from_dict({**lesson, "cells": [*cells[: head + 1], *exercises, *cells[head + 1 :]]})


def main() -> None:
    for path in sorted((NOTEBOOKS / "solutions").glob("*.ipynb")):
        lesson = nbformat.read(NOTEBOOKS / path.name, 4)
        made = with_exercises(lesson, nbformat.read(path, 4), path.name)
        if made != lesson:
            nbformat.write(made, NOTEBOOKS / path.name)
        print(f"{path.name}: {'written' if made != lesson else 'in step'}")


if __name__ == "__main__":
    main()
