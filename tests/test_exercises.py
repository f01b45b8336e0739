"""Exercises and solutions: one source, and checks that say what is wrong without ever stopping a notebook."""

import contextlib
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from fiqa_helpers.base import WorkshopError, check

PROJECT = Path(__file__).resolve().parent.parent
SOLUTIONS = sorted((PROJECT / "notebooks" / "solutions").glob("*.ipynb"))
LESSONS = sorted((PROJECT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
exercises = runpy.run_path(str(PROJECT / "scripts" / "exercises.py"))
tags = exercises["tags"]

# Notebook and exercise, a typical wrong answer, and what its hint must say.
TABLE = yaml.safe_load((PROJECT / "tests" / "wrong_answers.yaml").read_text(encoding="utf-8"))
WRONG = [(number, *case) for number, cases in TABLE.items() for case in cases]
STRONG = "{learning_rate: 0.05, max_new_tokens: 16}"  # so that base and tuned give different answers
FAST = ("00", "01", "02", "03")  # the others build on an adapter that was trained


def on_tier(cases: list) -> list:
    """Those that need a trained adapter are slow."""
    marks = ((case, () if case[0][:2] in FAST else pytest.mark.slow) for case in cases)
    return [pytest.param(*case, marks=mark) for case, mark in marks]


def cells(path: Path) -> list[nbformat.NotebookNode]:
    return nbformat.read(path, 4).cells


def numbers_of(path: Path) -> list[str]:
    """01.1, 01.2 and so on, from the ids of the checks: ex-01-1-check."""
    checks = [cell["id"] for cell in cells(path) if "check" in tags(cell)]
    return ["{}.{}".format(*re.fullmatch(r"ex-(\d\d)-(\d)-check", name).groups()) for name in checks]


NUMBERS = [number for path in SOLUTIONS for number in numbers_of(path)]


class Solved:
    """The cells of a solution notebook, executed in this process, and its checks asked again."""

    def __init__(self, path: Path, workdir: Path, profile: str, overrides: str):
        self.cells = {cell["id"]: cell for cell in cells(path) if cell.cell_type == "code"}
        self.names: dict = {}
        for cell in self.cells.values():
            if tags(cell) & {"parameters", "setup"}:
                self.say(cell.source)
            if "parameters" in tags(cell):
                self.names |= {"profile": profile, "overrides": overrides, "workdir": str(workdir)}

    def say(self, source: str) -> str:
        """Execute `source` and return what it prints, on one line."""
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            exec(compile(source, "cell", "exec"), self.names)
        return " ".join(text.getvalue().split())

    def run(self, number: str, kind: str) -> str:
        notebook, exercise = number.split(".")
        solution = kind == "solution"
        name = f"sol-{notebook}-{kind}-{exercise}" if solution else f"ex-{notebook}-{exercise}-{kind}"
        return self.say(self.cells[name].source)


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """solved("01"): the solutions of notebook 01 with their set-up done, once.

    00 to 03 need the rows that notebook 01 writes; the others get everything that the notebooks leave when
    they are run, on the tiny profile.
    """
    from fiqa_helpers import data
    from fiqa_helpers.base import Workspace
    from fiqa_helpers.profiles import load_profile
    from fiqa_helpers.run import Run

    ready: dict[str, Solved] = {}
    workdirs: dict[str, Path] = {}

    def quick() -> Path:
        folder = tmp_path_factory.mktemp("rows")
        run = Run("01", {}, load_profile("laptop"), Workspace(str(folder)))
        splits = data.load_fiqa("packaged", run.workspace)
        run.finish("rows", data.write_processed(splits, run.workspace.data))
        return folder

    def whole() -> Path:
        folder = tmp_path_factory.mktemp("tutorial")
        command = [sys.executable, "-m", "fiqa_helpers", "run", "--only", "01-06", "--profile", "tiny"]
        command += ["--overrides", STRONG, "--workdir", str(folder)]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    def get(name: str) -> Solved:
        kind, *settings = (quick, "laptop", "") if name in FAST else (whole, "tiny", STRONG)
        if kind.__name__ not in workdirs:
            workdirs[kind.__name__] = kind()
        if name not in ready:
            path = next(path for path in SOLUTIONS if path.name.startswith(name))
            ready[name] = Solved(path, workdirs[kind.__name__], *settings)
        return ready[name]

    return get


def test_the_notebooks_are_in_step_with_the_solutions():
    """An exercise changed in one place only: readers and solutions would speak of different tasks."""
    assert [path.name for path in SOLUTIONS] == [path.name for path in LESSONS]
    assert TABLE.keys() == set(NUMBERS), "an exercise without wrong answers has untested hints"
    for lesson, solution in zip(LESSONS, SOLUTIONS, strict=True):
        there = nbformat.read(lesson, 4)
        made = exercises["with_exercises"](there, nbformat.read(solution, 4), solution.name)
        assert made == there, f"{lesson.name} is out of step with its solutions: run `make exercises`"


def test_a_change_of_the_source_reaches_the_notebook():
    """The comparison above would pass for ever if the script wrote nothing, or a solution with the task."""
    lesson, solution = nbformat.read(LESSONS[0], 4), nbformat.read(SOLUTIONS[0], 4)
    task = next(cell for cell in solution.cells if "exercise" in tags(cell))
    task.source += "\n\nOne more sentence."
    made = exercises["with_exercises"](lesson, solution, "x.ipynb")
    text = "\n".join(cell.source for cell in made.cells)
    assert "One more sentence." in text and "(solutions/x.ipynb)" in text
    secret = [cell.source for cell in solution.cells if "solution" in tags(cell)]
    assert secret and not [source for source in secret if source in text]
    assert len(made.cells) == len(lesson.cells)
    assert made.cells[-1].source == lesson.cells[-1].source


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_each_exercise_is_complete(path):
    """A task without a check, a check without a solution, or no time to plan a room with."""
    found = cells(path)
    kinds = {}
    for cell in found:
        for kind in tags(cell) & {"answer", "check"}:
            kinds.setdefault(kind, []).append(cell)
    tasks = [cell.source for cell in found if "exercise" in tags(cell) and "### Exercise" in cell.source]
    assert 2 <= len(tasks) <= 3 and len(kinds["answer"]) == len(kinds["check"]) == len(tasks)
    for n, task in enumerate(tasks, start=1):
        assert re.match(rf"### Exercise {n} · ★{{1,3}} \(\d+ min\) · \S", task), task
        ids = [cell["id"] for cell in found]
        lesson = path.name[:2]
        order = [f"ex-{lesson}-{n}-exercise", f"ex-{lesson}-{n}-answer", f"sol-{lesson}-solution-{n}"]
        order += [f"ex-{lesson}-{n}-check", f"sol-{lesson}-why-{n}"]
        assert sorted(order, key=ids.index) == order


@pytest.mark.parametrize("number", on_tier([(number,) for number in NUMBERS]))
def test_open_exercise_is_friendly_and_its_solution_right(solved, number):
    """An open exercise must not end `make run`; a published solution that its own check refuses is a joke."""
    notebook = solved(number[:2])
    notebook.run(number, "answer")
    assert "not solved yet" in notebook.run(number, "check")
    notebook.run(number, "solution")
    said = notebook.run(number, "check")
    assert said.startswith(f"Exercise {number[-1]} ✓ right. "), said
    print(said)


@pytest.mark.parametrize(("number", "wrong", "hint"), on_tier(WRONG))
def test_a_wrong_answer_gets_its_own_hint(solved, number, wrong, hint):
    """ "Wrong" alone teaches nothing: each mistake that people make is named, and nothing is raised."""
    notebook = solved(number[:2])
    notebook.run(number, "answer")
    notebook.run(number, "solution")  # so that a wrong part stands beside right ones
    notebook.say(wrong)
    said = notebook.run(number, "check")
    assert "✗ not" in said and hint in said, said
    print(said)


@pytest.mark.slow
def test_the_solutions_of_06_generate_nothing(solved):
    """They say so, and on a laptop generating the answers again would take a minute."""
    notebook = solved("06")
    count, said = notebook.names["count"], notebook.say(notebook.cells["sol-06-setup-answers"].source)
    assert said.count(f"{count} answers, {count} of them kept from before") == 2


def said_of(capsys, rule, *answers) -> str:
    check(rule, *answers)
    return " ".join(capsys.readouterr().out.split())


def test_what_a_check_says(capsys):
    """The four cases a reader meets, each recognisable without colour; and nothing is ever raised."""

    def exercise_7(value):
        if value == 1:
            raise AssertionError("One is too small.")  # pytest would add to what an assert says
        if value == 2:
            raise WorkshopError("Two is refused.")
        if value == 3:
            return missing  # noqa: F821
        return "Four it is." + 4 * (value - 4) * "!"

    assert said_of(capsys, exercise_7, ...).startswith("Exercise 7 ○ not solved yet: put your answer")
    assert said_of(capsys, exercise_7, 1) == "Exercise 7 ✗ not yet. One is too small."
    assert said_of(capsys, exercise_7, 2) == "Exercise 7 ✗ not yet. Two is refused."
    assert "cannot be checked, NameError: name 'missing'" in said_of(capsys, exercise_7, 3)
    assert "cannot be checked, TypeError" in said_of(capsys, exercise_7, "four")
    assert said_of(capsys, exercise_7, 4) == "Exercise 7 ✓ right. Four it is."


def test_what_counts_as_open(capsys):
    """A half-filled answer is not a wrong one, and 0, False or an empty text are answers."""

    def exercise_1(*values):
        return "seen"

    for answer in (..., None, [1, ...], {None}, lambda: ..., lambda: (..., 1)):
        assert "not solved yet" in said_of(capsys, exercise_1, 5, answer), answer
    for answer in (0, False, "", [], lambda: 0, exercise_1):
        assert "right" in said_of(capsys, exercise_1, answer), answer
