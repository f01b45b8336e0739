"""Exercises and solutions: one source, and checks that say what is wrong without ever stopping a notebook."""

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from fiqa_helpers.base import WorkshopError, check

PROJECT = Path(__file__).resolve().parent.parent
SOLUTIONS = sorted((PROJECT / "notebooks" / "solutions").glob("*.ipynb"))
LESSONS = sorted((PROJECT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
exercises = runpy.run_path(str(PROJECT / "scripts" / "exercises.py"))
tags = exercises["tags"]

FIRST_ONLY = """
def forbidden(ids, n=4):
    last = ids[len(ids) - n + 1 :]
    return next(({ids[i + n - 1]} for i in range(len(ids) - n + 1) if ids[i : i + n - 1] == last), set())
"""

OWN_ANSWER = """
cheat = max((side.samples[cheat_row] for side in (base, tuned)), key=lambda row: row["similarity"])["answer"]
"""

# Notebook and exercise, a typical wrong answer, and what its hint must say.
WRONG = [
    ("00.1", "steps = 3 * 5500", "Those are rows"),
    ("00.1", "steps = 344", "one epoch"),
    ("00.1", "steps = 1029", "12 rows"),
    ("00.1", "steps = 5500 / 16 * 3", "round up"),
    ("00.1", "steps = 'many'", "cannot be checked"),
    ("00.2", "refused = {'A', 'C'}", "E is refused as well: epochs is 0"),
    ("00.2", "refused = {'A', 'B', 'C', 'E'}", "B is accepted"),
    ("00.2", "refused = {'F'}", "from A to E"),
    ("00.2", "refused = 3", "cannot be checked"),
    ("00.3", "longer = {'max_steps': 50}", "overrides is text"),
    ("00.3", "longer = '{train_row: 400}'", "did you mean train_rows"),
    ("00.3", "longer = '{max_steps: 50}'", "400 training rows"),
    ("00.3", "longer = '{train_rows: 320}'", "only 192 of the 320"),
    ("00.3", "longer = '{train_rows: 320, max_steps: 100}'", "some come twice"),
    ("01.1", "share = 28.7", "between 0 and 1"),
    ("01.1", "share = 0.1", "share of the rows"),
    (
        "01.1",
        "share = rows['words'].nsmallest(len(rows) // 10).sum() / rows['words'].sum()",
        "shortest tenth",
    ),
    ("01.1", "share = 0.5", "0.500 is not it"),
    ("01.2", "def unpacked(answer): return answer[1:-1]", "look for quotes before you cut"),
    ("01.2", "def unpacked(answer): return answer.strip('\"')", "stands for one"),
    ("01.2", "def unpacked(answer): return answer.replace('\"', '')", "belong to the text"),
    ("01.2", "def unpacked(answer): return answer.nothing()", "no attribute 'nothing'"),
    ("01.2", "def unpacked(answer): return anser", "name 'anser' is not defined"),
    ("01.3", "largest = 12", "divide by"),
    ("01.3", "largest = 1.0", "with itself"),
    ("01.3", "largest = 0.2", "is not it"),
    ("02.1", "with_space, with_break = False, True", "with_space again"),
    ("02.1", "with_space, with_break = True, False", "with_break again"),
    ("02.1", "with_space, with_break = 'yes', True", "True or False"),
    ("02.2", "limit = 300", "allow more"),
    ("02.2", "limit = 2048", "go lower"),
    ("02.2", "limit = next(n for n in range(5000) if sum(k > n for k in lengths) < 25)", "the *rows*"),
    ("02.3", "system_share = 27", "between 0 and 1"),
    ("02.3", "system_share = 1 - answer_tokens / sum(lengths)", "the whole prompt"),
    ("02.3", "system_share = system_tokens * len(lengths) / answer_tokens", "more tokens to divide by"),
    ("03.1", "trainable_16, strength = trainable_8b, 2", "That is rank 8"),
    ("03.1", "trainable_16, strength = 4 * trainable_8b, 2", "one direction only"),
    ("03.1", "trainable_16, strength = 13_631_488, 4", "strength at rank 8"),
    ("03.1", "trainable_16, strength = 13_631_488, 0.5", "turn it around"),
    ("03.2", "all_linear = reference_lora", "Not yet on down_proj, gate_proj, up_proj"),
    ("03.2", "all_linear = LoraConfig(r=16, target_modules='all-linear')", "r is 16"),
    ("03.2", "all_linear = ['q_proj']", "make a LoraConfig"),
    ("03.3", "def folded(layer): return layer.A.weight @ layer.B.weight", "cannot be checked, RuntimeError"),
    ("03.3", "def folded(layer): return layer.frozen.weight", "the adapter is missing"),
    ("03.3", "def folded(layer): return layer.scale * layer.B.weight @ layer.A.weight", "add W"),
    ("03.3", "def folded(layer): return layer.frozen.weight + layer.B.weight @ layer.A.weight", "strength"),
    ("04.1", "factor = first - best + 1e-9 if first != best else 0", "fall in nats"),
    ("04.1", "factor = exp(best - first) if first != best else 0", "turn it around"),
    ("04.2", "def rate(step): return 2e-4", "Step 0"),
    ("04.2", "def rate(step): return 2e-4 * step / 1032", "Half-way up"),
    (
        "04.2",
        "def rate(step): return 2e-4 * (min(1, step / 104) if step < 105 else 1 - step / 1032)",
        "at step 0.",
    ),
    ("04.3", "counts = [micro['input_ids'].numel() for micro in step['micro_batches']]", "don't count"),
    ("04.3", "sums = [total / n for total, n in zip(sums, counts)]", "means already"),
    ("04.3", "by_token = by_batch + 1", "by_token"),
    ("05.1", "probability = before.softmax(-1).max().item()", "temperature 1"),
    ("05.1", "probability = (0.2 * before).softmax(-1).max().item()", "You multiplied"),
    ("05.2", "n_answers = 35", "ask for more"),
    ("05.2", "n_answers = 100", "fewer will do"),
    ("05.2", "n_answers = 35.5", "come whole"),
    ("05.3", "def forbidden(ids, n=4): return set(ids) if len(ids) > 3 else set()", "every token"),
    ("05.3", "def forbidden(ids, n=4): return [4]", "Return a set"),
    ("05.3", FIRST_ONLY, "look at all places"),
    (
        "06.1",
        "needed = (lambda f: f.rows * (f.high - f.low) / 2 / 0.02)(comparisons['similarity'])",
        "square",
    ),
    (
        "06.1",
        "needed = (lambda f: f.rows * ((f.high - f.low) / 0.02) ** 2)(comparisons['similarity'])",
        "whole width",
    ),
    ("06.2", "paired *= count**0.5", "root of their number"),
    ("06.2", "unpaired *= 10", "unpaired is"),
    ("06.3", "cheat_row = -1", "numbered from 0"),
    ("06.3", "cheat = 'word ' * 21", "21 words"),
    ("06.3", "cheat = tested[cheat_row]['ground_truths'][0][:40]", "stands in the reference"),
    ("06.3", OWN_ANSWER, "use the question's own words"),
    ("07.1", "batch_size, steps_an_epoch = 16, 344", "cannot be shared"),
    ("07.1", "batch_size, steps_an_epoch = 24, 229", "12 is nearer"),
    ("07.1", "batch_size, steps_an_epoch = 12, 459", "dropped"),
    ("07.2", "def shifted_row(ids, labels): return ids, labels", "nothing to predict"),
    ("07.2", "def shifted_row(ids, labels): return ids[:-1], labels[:-1]", "learn to repeat"),
    ("07.2", "def shifted_row(ids, labels): return ids[1:], labels[:-1]", "learn to repeat"),
    ("07.2", "def shifted_row(ids, labels): return ids[:-1], labels", "needs both"),
    ("07.3", "edited = written.replace('no such text', '')", "Nothing was replaced"),
    ("07.3", "edited = written + '# a comment'", "the same run"),
    ("07.3", "edited = written + '\\nrng:\\n  seed: 7\\n'", "seed"),
]
STRONG = "{learning_rate: 0.05, max_new_tokens: 16}"  # so that base and tuned give different answers
FAST = ("00", "01", "02", "03")  # the others build on an adapter that was trained


def on_tier(numbers: list[str]) -> list:
    """Those that need a trained adapter are slow."""
    return [pytest.param(n, marks=() if n[:2] in FAST else pytest.mark.slow) for n in numbers]


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
        prefix = (
            f"sol-{notebook}-{kind}-{exercise}" if kind == "solution" else f"ex-{notebook}-{exercise}-{kind}"
        )
        return self.say(self.cells[prefix].source)


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
        splits, report = data.load_with_report("packaged", run.workspace)
        run.finish("rows", data.write_processed(splits, run.workspace.data, report.source))
        return folder

    def whole() -> Path:
        folder = tmp_path_factory.mktemp("tutorial")
        (folder / "parameters.yaml").write_text(
            json.dumps({"profile": "tiny", "overrides": STRONG, "workdir": str(folder)})
        )
        for lesson in LESSONS[1:7]:
            command = [sys.executable, "-m", "papermill", str(lesson), str(folder / lesson.name)]
            command += ["-f", str(folder / "parameters.yaml"), "--no-progress-bar"]
            done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=600)
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


@pytest.mark.parametrize("number", on_tier(NUMBERS))
def test_open_exercise_is_friendly_and_its_solution_right(solved, number):
    """An open exercise must not end `make run`; a published solution that its own check refuses is a joke."""
    notebook = solved(number[:2])
    notebook.run(number, "answer")
    assert "not solved yet" in notebook.run(number, "check")
    notebook.run(number, "solution")
    said = notebook.run(number, "check")
    assert said.startswith(f"Exercise {number[-1]} ✓ right. "), said
    print(said)


@pytest.mark.parametrize(
    ("number", "wrong", "hint"),
    [pytest.param(*case, marks=() if case[0][:2] in FAST else pytest.mark.slow) for case in WRONG],
)
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


def test_every_exercise_has_wrong_answers_here():
    """A new exercise without them would have untested hints."""
    assert {case[0] for case in WRONG} == set(NUMBERS)


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

    def empty():
        return ...

    def partly():
        return ..., 1

    for answer in (..., None, [1, ...], {None}, empty, partly):
        assert "not solved yet" in said_of(capsys, exercise_1, 5, answer), answer
    for answer in (0, False, "", [], lambda: 0, exercise_1):
        assert "right" in said_of(capsys, exercise_1, answer), answer
