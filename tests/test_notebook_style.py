"""The rules that keep the notebooks readable, runnable anywhere and clean in git."""

import ast
import itertools
import re
import statistics
import subprocess
import sys
import warnings
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


def cells(path: Path, kind: str = "") -> list:
    notebook = nbformat.read(path, 4)
    return [cell for cell in notebook.cells if kind in ("", cell.cell_type)]


def lines(source: str) -> int:
    """Lines of a cell that a reader has to read: blank ones and comments are free."""
    return sum(1 for line in source.splitlines() if line.strip() and not line.strip().startswith("#"))


def headings(path: Path) -> list[str]:
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^## (.+)$", text, re.MULTILINE)


def test_notebooks_are_there():
    """Parametrised tests over an empty list pass; this one does not."""
    assert [path.name[:2] for path in LESSONS] == [f"{n:02d}" for n in range(len(LESSONS))]
    assert len(LESSONS) >= 6


def dirt(path: Path) -> list[str]:
    """What a run or a private machine left in a notebook."""
    notebook = nbformat.read(path, 4)
    found = [f"notebook metadata {key}" for key in ("widgets", "papermill") if key in notebook.metadata]
    if notebook.metadata["kernelspec"]["name"] != "python3":
        found.append(f"kernel {notebook.metadata['kernelspec']['name']}")
    for cell in notebook.cells:
        tags = set(cell.metadata.get("tags", []))
        if not cell.source.strip():
            found.append(f"{cell.id} is empty")
        if tags & {"injected-parameters", "papermill-error-cell-tag"}:
            found.append(f"{cell.id} was put in by papermill")
        if "raises-exception" in tags:
            found.append(f"{cell.id} raises: papermill exits 1 and nbmake passes")
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None):
            found.append(f"{cell.id} has outputs or a count")
    return found


@every
def test_valid_and_clean(path):
    """Outputs, counts or widget state bury the changes in a diff; a private kernel name runs nowhere else."""
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    ids = [cell["id"] for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert dirt(path) == []


@every
def test_nothing_private(path):
    """A path of somebody's machine works nowhere else, and a token in a notebook is a leak."""
    text = path.read_text(encoding="utf-8")
    private = r"/home/\w|/Users/\w|/root/|C:\\\\|/work/|/tmp/\w|hf_[A-Za-z0-9]{20}|nvapi-"
    found = re.search(private, text)
    assert found is None, found


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
def test_parameters(path):
    """Typed, commented literals: papermill reads types from annotations and its help from the comments."""
    tagged = [c for c in cells(path, "code") if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    known = papermill.inspect_notebook(str(path))
    assigned = [line for line in tagged[0].source.splitlines() if line.strip()]
    names = [re.match(r"([a-z_]+): (?:int|float|str|bool) = \S.*  # \S", line) for line in assigned]
    assert all(names), "each line: name: type = literal  # comment (110 characters at most, or ruff wraps it)"
    names = [match[1] for match in names]
    assert names[:3] == COMMON
    assert len(names) <= 12
    assert list(known) == names, "papermill reads other parameters than the cell has"
    assert all(known[name]["help"] and known[name]["inferred_type_name"] for name in names)
    first_code = cells(path, "code")[0]
    assert first_code is not None
    assert first_code["id"] == tagged[0]["id"], "no code before the parameters"


@lesson
def test_starts_and_finishes_a_run(path):
    """The run card is what the next notebook checks, and what the closing table shows."""
    code = [cell.source for cell in cells(path, "code")]
    assert f'run = start(globals(), "{path.name[:2]}")' in code[1]
    assert sum("run.finish(" in source for source in code) == 1


@lesson
def test_length_of_code_cells(path):
    """One thought a cell: a long one is neither predicted nor read."""
    lengths = sorted(lines(cell.source) for cell in cells(path, "code"))
    assert statistics.median(lengths) <= 8
    assert lengths[int(0.9 * (len(lengths) - 1))] <= 20
    assert lengths[-1] <= 35


@lesson
def test_more_text_than_code(path):
    """The notebooks teach: each code cell is announced and read out."""
    code, text = cells(path, "code"), cells(path, "markdown")
    assert len(text) > len(code), f"{len(text)} Markdown cells, {len(code)} code cells"
    needed = itertools.takewhile(lambda cell: not cell.source.startswith("## Exercises"), cells(path))
    assert sum("extra" not in cell.metadata.get("tags", []) for cell in needed) <= 60


@lesson
def test_words(path):
    """Under 700 words nothing is explained; 900 to 1,800 is the aim."""
    words = sum(len(cell.source.split()) for cell in cells(path, "markdown"))
    assert words >= 700
    if not 900 <= words <= 1800:
        warnings.warn(f"{path.name} has {words} words, the aim is 900 to 1,800", stacklevel=1)


@lesson
def test_steps_are_numbered_without_gaps(path):
    """People say "I'm stuck at 4.3"; the endings stand in the same place everywhere."""
    number = int(path.name[:2])
    found = headings(path)
    steps = [title for title in found if re.match(r"\d+\.\d+ ", title)]
    expected = [f"{number}.{step} " for step in range(1, len(steps) + 1)]
    assert len(steps) >= 3
    assert all(title.startswith(start) for title, start in zip(steps, expected, strict=True)), steps
    assert [title for title in found if title in ENDINGS] == ENDINGS
    assert found.index(steps[-1]) < found.index("Checkpoint")


@lesson
def test_predict_run_explain(path):
    """Without a prediction people press Shift-Enter and read nothing."""
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    assert text.count("**Predict:**") >= 3


# Steps that only prepare, launch or write: there is nothing to guess.
NO_RESULT = {
    *("Write the processed splits", "One row", "The final form", "Rows to train on", "Training arguments"),
    *("The model, with its adapter", "What to watch", "Base first, adapter on top", "Your own questions"),
    *("Give the memory back", "Rows for a fair test", "Keep the evidence", "Launch lines"),
}


@lesson
def test_every_result_is_predicted_first(path):
    """Three predictions in a notebook of ten results leave seven that are looked at and not thought about."""
    predicted, shows, title = {}, set(), ""
    for cell in cells(path):
        if cell.cell_type == "code":
            shows.add(title)
            continue
        for part in re.split(r"^(?=## )", cell.source, flags=re.MULTILINE):
            heading = re.match(r"## (?:\d+\.\d+ )?(.+)", part)
            title = heading[1] if heading else title
            predicted[title] = predicted.get(title, False) or "**Predict:**" in part
    steps = [
        title for title in predicted if title in shows and title not in ENDINGS and title not in NO_RESULT
    ]
    missing = [title for title in steps if title and not predicted[title]]
    assert not missing, f"no **Predict:** before the result of {missing}"


@lesson
def test_checkpoint_asserts_are_friendly(path):
    """A bare AssertionError tells nobody what to do."""
    source = [cell for cell in cells(path) if cell.source.startswith("## Checkpoint")]
    position = cells(path).index(source[0])
    code = [cell.source for cell in cells(path)[position:] if cell.cell_type == "code"]
    asserts = [source for source in code if "assert " in source]
    assert asserts, "the checkpoint has no assertion"
    found = [node for text in asserts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assert)]
    assert all(node.msg is not None for node in found)


@every
def test_names_are_bound_before_use(path):
    """A cell that was moved or deleted leaves names that only the author's kernel still knows."""
    code = "\n\n".join(cell.source for cell in cells(path, "code"))
    rules = (
        "F821,F823" if path in SOLUTIONS else "F821,F823,F811"
    )  # there, an empty function, then a solved one
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", rules, "--output-format"]
        + ["concise", "--stdin-filename", "cells.py", "-"],
        input=code,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


@lesson
def test_nothing_is_installed_or_shelled_out(path):
    """Notebooks are plain Python: magics don't survive tools, pip would change somebody's environment."""
    for cell in cells(path, "code"):
        assert not re.search(r"^\s*[%!]", cell.source, re.MULTILINE), cell.source
        assert "pip install" not in cell.source


def targets(source: str) -> list[str]:
    """Link and image targets of a Markdown text, code taken out."""
    source = re.sub(r"```.*?```|`[^`\n]*`", "", source, flags=re.DOTALL)
    return re.findall(r"\]\(\s*<?([^)\s>]+)", source) + re.findall(r"""(?:src|href)=["']([^"']+)""", source)


@every
def test_relative_links_resolve(path):
    """A dead link is the first thing a reader tries."""
    for target in itertools.chain.from_iterable(targets(cell.source) for cell in cells(path, "markdown")):
        if re.match(r"[a-z]+:|#", target):
            assert not target.startswith("http:"), f"{target}: use https"
            continue
        assert (path.parent / target.partition("#")[0]).exists(), f"{path.name} links to {target}"


@lesson
def test_links_to_neighbours(path):
    """Each notebook leads to the next, and its card back to the one before."""
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    position = LESSONS.index(path)
    for neighbour in LESSONS[max(0, position - 1) : position + 2]:
        if neighbour != path:
            assert f"]({neighbour.name})" in text, f"no link to {neighbour.name}"


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
    assert record == "notebook metadata papermill"
    assert cell.endswith("was put in by papermill")
