"""The rules that keep the notebooks readable, runnable anywhere and clean in git."""

import ast
import itertools
import re
import statistics
from pathlib import Path

import nbformat
import papermill
import pytest

PROJECT = Path(__file__).resolve().parent.parent
LESSONS = sorted((PROJECT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SOLUTIONS = sorted((PROJECT / "notebooks" / "solutions").glob("*.ipynb"))
ENDINGS = ["Checkpoint", "Exercises", "Recap", "Troubleshooting"]
PRIVATE = r"/home/\w|/Users/\w|/root/|C:\\\\|/work/|/tmp/\w|hf_[A-Za-z0-9]{20}|nvapi-"

lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
every = pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=lambda path: path.stem)


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def cells(path: Path, kind: str = "") -> list:
    return [cell for cell in nbformat.read(path, 4).cells if kind in ("", cell.cell_type)]


def lines(source: str) -> int:
    """Lines of a cell that a reader has to read: blank ones and comments are free."""
    return sum(1 for line in source.splitlines() if line.strip() and not line.strip().startswith("#"))


def without_code(markdown: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", markdown, flags=re.MULTILINE | re.DOTALL)


@every
def test_clean(path):
    """Outputs bury the changes in a diff; a private path works nowhere else, a token is a leak."""
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert len({cell["id"] for cell in notebook.cells}) == len(notebook.cells)
    assert not {"widgets", "papermill"} & notebook.metadata.keys(), "what a run left"
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert re.search(PRIVATE, path.read_text(encoding="utf-8")) is None
    for cell in notebook.cells:
        assert cell.source.strip(), f"{cell.id} is empty"
        assert not tags(cell) & {"injected-parameters", "papermill-error-cell-tag"}, f"{cell.id}: papermill's"
        assert "raises-exception" not in tags(cell), f"{cell.id}: papermill exits 1 and nbmake passes"
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, f"{cell.id} has outputs or a count"
            magic = re.search(r"^\s*[%!]|pip install", cell.source, re.MULTILINE)
            assert not magic, f"{cell.id}: notebooks are plain Python and install nothing"


@lesson
def test_it_begins_with_title_card_and_parameters(path):
    """What it is, what it needs and how long it takes; typed, commented literals, which papermill reads."""
    title, card, *_ = (cell.source for cell in cells(path))
    assert re.match(rf"# {path.name[:2]} · \S", title) and len(title.split()) >= 25, "a title and a promise"
    for row in ("You will learn", "You need", "Minutes", "Comes from → goes to"):
        assert f"**{row}**" in card
    code = cells(path, "code")
    assert [cell["id"] for cell in code if "parameters" in tags(cell)] == [code[0]["id"]]
    assigned = [line for line in code[0].source.splitlines() if line.strip()]
    found = [re.match(r"([a-z_]+): (?:int|float|str|bool) = \S.*  # \S", line) for line in assigned]
    assert all(found), "each line: name: type = literal  # comment"
    names = [match[1] for match in found]
    assert names[:3] == ["profile", "overrides", "workdir"] and len(names) <= 12
    assert list(papermill.inspect_notebook(str(path))) == names, "papermill reads others than the cell has"
    assert f'run = start(globals(), "{path.name[:2]}")' in code[1].source
    assert sum("run.finish(" in cell.source for cell in code) == 1, "one run card for the next notebook"


@lesson
def test_lengths(path):
    """One thought a cell, announced and read out, in an hour: what is long is neither predicted nor read."""
    code = cells(path, "code")
    lengths = sorted(lines(cell.source) for cell in code)
    assert statistics.median(lengths) <= 8
    assert lengths[int(0.9 * (len(lengths) - 1))] <= 20
    assert len(cells(path, "markdown")) > len(code)
    lesson = itertools.takewhile(lambda cell: not cell.source.startswith("## Exercises"), cells(path))
    needed = [cell for cell in lesson if "extra" not in tags(cell)]
    assert sum(cell.cell_type == "code" for cell in needed) <= 24
    assert max(lines(cell.source) for cell in needed if cell.cell_type == "code") <= 30
    words = sum(len(cell.source.split()) for cell in needed if cell.cell_type == "markdown")
    assert words <= 1500, f"{words} words up to the exercises"


@lesson
def test_steps_predictions_and_endings(path):
    """People say "I'm stuck at 4.3"; a prediction needs its answer, and a failing assert its words."""
    asked, answered, titles, asserts = set(), set(), [], []
    for cell in cells(path):
        if cell.cell_type == "code":
            if titles and titles[-1] == "Checkpoint":
                asserts += [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Assert)]
            continue
        text = without_code(cell.source)
        assert not re.search(r"(?<!\A)^#{1,3} ", text, re.MULTILINE), "one heading a cell, at its top"
        if heading := re.match(r"## (.+)", text):
            titles.append(heading[1])
        if "**Predict:**" in text:
            asked.add(titles[-1])
        if text.startswith("**Answer.**") and len(text.split()) > 8:
            answered.add(titles[-1])
    steps = [title for title in titles if title[0].isdigit()]
    assert [title.split()[0] for title in steps] == [
        f"{int(path.name[:2])}.{n + 1}" for n in range(len(steps))
    ]
    assert titles[: len(steps)] == steps and [title for title in titles if title in ENDINGS] == ENDINGS
    assert len(asked) >= 3 and asked <= answered, f"no **Answer.** for {asked - answered}"
    assert asserts and all(node.msg for node in asserts), "each assert of the checkpoint says what to do"


@every
def test_links_resolve_and_lead_to_the_neighbours(path):
    """A dead link is the first thing a reader tries; each notebook leads to the next and the one before."""
    text = without_code("\n".join(cell.source for cell in cells(path, "markdown")))
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"""(?:src|href)=["']([^"']+)""", text)
    for target in targets:
        if re.match(r"[a-z]+:|#", target):
            assert not target.startswith("http:"), f"{target}: use https"
        else:
            assert (path.parent / target.partition("#")[0]).exists(), f"{path.name} links to {target}"
    if path in LESSONS:
        position = LESSONS.index(path)
        for neighbour in {*LESSONS[max(0, position - 1) : position + 2]} - {path}:
            assert neighbour.name in targets, f"no link to {neighbour.name}"
