"""The rules that keep the notebooks readable, runnable anywhere and clean in git."""

import ast
import itertools
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

PROJECT = Path(__file__).resolve().parent.parent
LESSONS = sorted((PROJECT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SOLUTIONS = sorted((PROJECT / "notebooks" / "solutions").glob("*.ipynb"))
COMMON = ["profile", "overrides", "workdir"]
ENDINGS = ["Checkpoint", "Exercises", "Recap", "Troubleshooting"]

lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
every = pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=lambda path: path.stem)


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def cells(path: Path, kind: str = "") -> list:
    return [cell for cell in nbformat.read(path, 4).cells if kind in ("", cell.cell_type)]


def lines(source: str) -> int:
    """Lines of a cell that a reader has to read: blank ones and comments are free."""
    return sum(1 for line in source.splitlines() if line.strip() and not line.strip().startswith("#"))


def prose(path: Path) -> str:
    """The Markdown of a notebook without code."""
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def test_notebooks_are_there():
    """Parametrised tests over an empty list pass; this one does not."""
    assert [path.name[:2] for path in LESSONS] == [f"{n:02d}" for n in range(8)]


def dirt(path: Path) -> list[str]:
    """What a run or a private machine left in a notebook."""
    notebook = nbformat.read(path, 4)
    found = [f"notebook metadata {key}" for key in ("widgets", "papermill") if key in notebook.metadata]
    if notebook.metadata["kernelspec"]["name"] != "python3":
        found.append(f"kernel {notebook.metadata['kernelspec']['name']}")
    for cell in notebook.cells:
        if not cell.source.strip():
            found.append(f"{cell.id} is empty")
        if tags(cell) & {"injected-parameters", "papermill-error-cell-tag"}:
            found.append(f"{cell.id} was put in by papermill")
        if "raises-exception" in tags(cell):
            found.append(f"{cell.id} raises: papermill exits 1 and nbmake passes")
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None):
            found.append(f"{cell.id} has outputs or a count")
    return found


@every
def test_valid_and_clean(path):
    """Outputs bury the changes in a diff; a private path works nowhere else, a token is a leak."""
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    ids = [cell["id"] for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert dirt(path) == []
    private = r"/home/\w|/Users/\w|/root/|C:\\\\|/work/|/tmp/\w|hf_[A-Za-z0-9]{20}|nvapi-"
    assert re.search(private, path.read_text(encoding="utf-8")) is None


def test_what_nbstripout_leaves_is_found(tmp_path):
    """nbstripout keeps papermill's injected cell and its record: the check above has to see both."""
    executed = nbformat.read(LESSONS[0], 4)
    executed.metadata["papermill"] = {"parameters": {}}
    executed.cells.insert(3, nbformat.v4.new_code_cell("workdir = 1", execution_count=1))
    executed.cells[3].metadata["tags"] = ["injected-parameters"]
    copy = tmp_path / LESSONS[0].name
    nbformat.write(executed, copy)
    assert len(dirt(copy)) == 3
    subprocess.run([sys.executable, "-m", "nbstripout", str(copy)], check=True)
    record, cell = dirt(copy)
    assert record == "notebook metadata papermill" and cell.endswith("was put in by papermill")


@lesson
def test_title_and_card_come_first(path):
    """Someone who opens a notebook in the middle sees what it is, what it needs and how long it takes."""
    first = cells(path)[:5]
    assert first[0].cell_type == "markdown"
    assert re.match(rf"# {path.name[:2]} · \S", first[0].source)
    assert len(first[0].source.split()) >= 25, "the title cell holds a promise"
    card = next(cell.source for cell in first if "You will learn" in cell.source)
    for row in ("You will learn", "You need", "Minutes", "Comes from → goes to"):
        assert f"**{row}**" in card


@lesson
def test_parameters_then_start_and_one_finish(path):
    """Typed, commented literals, which papermill reads; and the run card that the next notebook checks."""
    code = cells(path, "code")
    (tagged,) = [cell for cell in code if "parameters" in tags(cell)]
    assert code[0]["id"] == tagged["id"], "no code before the parameters"
    known = papermill.inspect_notebook(str(path))
    assigned = [line for line in tagged.source.splitlines() if line.strip()]
    names = [re.match(r"([a-z_]+): (?:int|float|str|bool) = \S.*  # \S", line) for line in assigned]
    assert all(names), "each line: name: type = literal  # comment (110 characters at most, or ruff wraps it)"
    names = [match[1] for match in names]
    assert names[:3] == COMMON and len(names) <= 12
    assert list(known) == names, "papermill reads other parameters than the cell has"
    assert all(known[name]["help"] and known[name]["inferred_type_name"] for name in names)
    assert f'run = start(globals(), "{path.name[:2]}")' in code[1].source
    assert sum("run.finish(" in cell.source for cell in code) == 1


@lesson
def test_lengths(path):
    """One thought a cell, announced and read out, in an hour: what is long is neither predicted nor read."""
    code, text = cells(path, "code"), cells(path, "markdown")
    lengths = sorted(lines(cell.source) for cell in code)
    assert statistics.median(lengths) <= 8
    assert lengths[int(0.9 * (len(lengths) - 1))] <= 20
    assert len(text) > len(code), f"{len(text)} Markdown cells, {len(code)} code cells"
    lesson = itertools.takewhile(lambda cell: not cell.source.startswith("## Exercises"), cells(path))
    needed = [cell for cell in lesson if "extra" not in tags(cell)]
    assert sum(cell.cell_type == "code" for cell in needed) <= 24
    assert max(lines(cell.source) for cell in needed if cell.cell_type == "code") <= 30
    words = sum(len(cell.source.split()) for cell in needed if cell.cell_type == "markdown")
    assert 700 <= words <= 1500, f"{words} words up to the exercises"


@lesson
def test_steps_are_numbered_without_gaps(path):
    """People say "I'm stuck at 4.3"; the endings stand in the same place everywhere."""
    number = int(path.name[:2])
    for cell in cells(path, "markdown"):
        source = re.sub(r"^```.*?^```", "", cell.source, flags=re.MULTILINE | re.DOTALL)
        assert not re.search(r"(?<!\A)^#{1,3} ", source, re.MULTILINE), "one heading a cell, at its top"
    found = re.findall(r"^## (.+)$", prose(path), re.MULTILINE)
    steps = [title for title in found if re.match(r"\d+\.\d+ ", title)]
    expected = [f"{number}.{step} " for step in range(1, len(steps) + 1)]
    assert len(steps) >= 3
    assert all(title.startswith(start) for title, start in zip(steps, expected, strict=True)), steps
    assert [title for title in found if title in ENDINGS] == ENDINGS
    assert found.index(steps[-1]) < found.index("Checkpoint")


# Steps that only prepare, launch or write: there is nothing to guess.
NO_RESULT = {
    *("Write the processed splits", "One row", "The final form", "Rows to train on", "Training arguments"),
    *("The model, with its adapter", "What to watch", "Base first, adapter on top", "Your own questions"),
    *("Give the memory back", "Rows for a fair test", "Keep the evidence", "Launch lines", *ENDINGS),
}


@lesson
def test_every_result_is_predicted_and_answered(path):
    """Without a prediction people press Shift-Enter and read nothing; without an answer they learn little."""
    predicted, answered, shows, title = {}, set(), set(), ""
    for cell in cells(path):
        if cell.cell_type == "code":
            shows.add(title)
        elif cell.source.startswith("**Answer.**") and len(cell.source.split()) > 8:
            answered.add(title)
        else:
            heading = re.match(r"## (?:\d+\.\d+ )?(.+)", cell.source)
            title = heading[1] if heading else title
            predicted[title] = predicted.get(title, False) or "**Predict:**" in cell.source
    missing = [title for title in predicted if title in shows - NO_RESULT and not predicted[title]]
    assert not [title for title in missing if title], f"no **Predict:** before the result of {missing}"
    asked = {title for title, there in predicted.items() if there}
    assert len(asked) >= 3 and asked <= answered, f"no **Answer.** for {asked - answered}"


@lesson
def test_checkpoint_asserts_are_friendly(path):
    """A bare AssertionError tells nobody what to do."""
    behind = itertools.dropwhile(lambda cell: not cell.source.startswith("## Checkpoint"), cells(path))
    code = "\n".join(cell.source for cell in behind if cell.cell_type == "code")
    found = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assert)]
    assert found and all(node.msg is not None for node in found)


@every
def test_names_are_bound_before_use(path):
    """A cell that was moved or deleted leaves names that only the author's kernel still knows."""
    code = "\n\n".join(cell.source for cell in cells(path, "code"))
    rules = "F821,F823"
    if path in LESSONS:  # in solutions an empty function stands before a solved one
        rules += ",F811"
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", rules, "-"]
    result = subprocess.run(command, input=code, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@lesson
def test_nothing_is_installed_or_shelled_out(path):
    """Notebooks are plain Python: magics don't survive tools, pip would change somebody's environment."""
    for cell in cells(path, "code"):
        assert not re.search(r"^\s*[%!]|pip install", cell.source, re.MULTILINE), cell.source


@every
def test_links_resolve_and_lead_to_the_neighbours(path):
    """A dead link is the first thing a reader tries; each notebook leads to the next and the one before."""
    text = prose(path)
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"""(?:src|href)=["']([^"']+)""", text)
    for target in targets:
        if re.match(r"[a-z]+:|#", target):
            assert not target.startswith("http:"), f"{target}: use https"
        else:
            assert (path.parent / target.partition("#")[0]).exists(), f"{path.name} links to {target}"
    if path in LESSONS:
        position = LESSONS.index(path)
        for neighbour in LESSONS[max(0, position - 1) : position + 2]:
            assert neighbour == path or neighbour.name in targets, f"no link to {neighbour.name}"
