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
exercises = runpy.run_path(str(PROJECT / "scripts" / "exercises.py"))
tags = exercises["tags"]

# Of each exercise: typical wrong answers, and what the hint to each must say.
WRONG = yaml.safe_load((PROJECT / "tests" / "wrong_answers.yaml").read_text(encoding="utf-8"))


def say(source: str, names: dict) -> str:
    """Execute `source` and return what it prints, on one line."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        exec(compile(source, "cell", "exec"), names)
    return " ".join(text.getvalue().split())


@pytest.fixture(scope="module")
def left_by(tmp_path_factory):
    """left_by("01-06"): the workdir that these notebooks leave, run once on the tiny profile."""
    made = {}

    def run(numbers: str) -> str:
        if numbers not in made:
            folder = str(tmp_path_factory.mktemp("run"))
            command = [sys.executable, "-m", "fiqa_helpers", "run", "--only", numbers, "--profile", "tiny"]
            # so strong a learning rate that base and tuned give different answers
            command += ["--overrides", "{learning_rate: 0.05, max_new_tokens: 16}", "--workdir", folder]
            done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, done.stderr[-3000:]
            made[numbers] = folder
        return made[numbers]

    return run


def test_the_notebooks_are_in_step_with_the_solutions():
    """An exercise changed in one place only, one without a check, a solution or a wrong answer to it."""
    asked = []
    for path in SOLUTIONS:
        lesson, solution = nbformat.read(PROJECT / "notebooks" / path.name, 4), nbformat.read(path, 4)
        made = exercises["with_exercises"](lesson, solution, path.name)
        assert made == lesson, f"{path.name} is out of step with its solutions: run `make exercises`"
        secret = [cell.source for cell in solution.cells if "solution" in tags(cell)]
        assert not [cell.id for cell in lesson.cells if cell.source in secret]
        ids, number = [cell.id for cell in solution.cells], path.name[:2]
        for task in solution.cells:
            if match := re.match(r"### Exercise (\d) · ★{1,3} \(\d+ min\) · \S", task.source):
                n = match[1]
                order = [f"ex-{number}-{n}-exercise", f"ex-{number}-{n}-answer", f"sol-{number}-solution-{n}"]
                order += [f"ex-{number}-{n}-check", f"sol-{number}-why-{n}"]
                assert sorted(order, key=ids.index) == order and order[0] == task.id
                asked.append(f"{number}.{n}")
    assert asked == sorted(WRONG) and len(asked) >= 16


# The first four need the rows of notebook 01 alone, the others an adapter that was trained.
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.name > "04"), id=path.stem) for path in SOLUTIONS],
)
def test_a_wrong_answer_gets_its_own_hint(left_by, path):
    """ "Wrong" alone teaches nothing: each mistake that people make is named, and nothing is raised."""
    number = path.name[:2]
    cells = {cell.id: cell.source for cell in nbformat.read(path, 4).cells}
    names = {}
    for cell in nbformat.read(path, 4).cells:
        if tags(cell) & {"parameters", "setup"}:
            said = say(cell.source, names)
            assert not re.search(r"\b(\d+) answers, (?!\1 of them kept)", said), "answers were made again"
        if "parameters" in tags(cell):
            names |= {"profile": "tiny", "workdir": left_by("01" if number < "04" else "01-06")}
    for exercise in [name for name in WRONG if name.startswith(number)]:
        n = exercise[-1]
        for wrong, hint in WRONG[exercise]:
            say(cells[f"ex-{number}-{n}-answer"], names)
            say(cells[f"sol-{number}-solution-{n}"], names)  # so that a wrong part stands beside right ones
            say(wrong, names)
            said = say(cells[f"ex-{number}-{n}-check"], names)
            assert "✗ not" in said and hint in said, (exercise, wrong, said)
        if exercise == "04.3":  # its solution trains twice; the others are right in the executed notebooks
            say(cells["sol-04-solution-3"], names)
            assert "✓ right" in say(cells["ex-04-3-check"], names)


def test_what_a_check_says(capsys):
    """Each case that a reader meets is told in words, nothing is raised, and 0 or "" is no open answer."""

    def exercise_7(value):
        if value == 1:
            raise AssertionError("One is too small.")  # pytest would add to what an assert says
        if value == 2:
            raise WorkshopError("Two is refused.")
        return missing if value == 3 else "Right it is."  # noqa: F821

    for answers, said in (
        ((1,), "Exercise 7 ✗ not yet. One is too small."),
        ((2,), "Exercise 7 ✗ not yet. Two is refused."),
        ((3,), "cannot be checked, NameError: name 'missing'"),
        ((4, 4), "cannot be checked, TypeError"),
        *(((answer,), "Exercise 7 ✓ right. Right it is.") for answer in (0, False, "", [], lambda: 0)),
        *(
            ((answer,), "Exercise 7 ○ not solved yet")
            for answer in (..., None, [1, ...], {None}, lambda: ...)
        ),
    ):
        check(exercise_7, *answers)
        assert said in " ".join(capsys.readouterr().out.split())
