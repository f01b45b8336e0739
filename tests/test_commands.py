"""The subcommands of `python -m fiqa_helpers`: the notebooks' parameters, code and errors, and exit codes."""

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest

from fiqa_helpers import __main__ as cli
from fiqa_helpers import data, model
from fiqa_helpers.__main__ import main, parser
from fiqa_helpers.base import Workspace
from fiqa_helpers.machinery import checkpoints
from fiqa_helpers.profiles import load_profile

PROJECT = Path(__file__).resolve().parent.parent
COMMON = ["profile", "overrides", "workdir"]


@pytest.fixture(autouse=True)
def variables_kept():
    """What a command sets for its own process, such as quiet libraries, is not left to the next test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def options_of(command: str) -> dict[str, argparse.Action]:
    """The options of a subcommand by name."""
    subparsers = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {action.dest: action for action in subparsers.choices[command]._actions if action.dest != "help"}


@pytest.mark.parametrize(
    ("command", "number", "other", "elsewhere"),
    [
        ("ask", "05", {"questions"}, {"n_questions", "first_row"}),
        ("evaluate", "06", set(), set()),
        ("recipe", "07", {"gpus", "stand_in_tokenizer"}, {"processes", "recipe_steps"}),
        ("train", "04", {"fresh"}, {"on_existing"}),
    ],
)
def test_options_are_the_notebooks_parameters(command, number, other, elsewhere):
    """A parameter renamed or retyped in a notebook would be passed on under its old name, and ignored."""
    (notebook,) = (PROJECT / "notebooks").glob(f"{number}_*.ipynb")
    known = {name: found["inferred_type_name"] for name, found in cli.parameters_of(notebook).items()}
    options = options_of(command)
    assert set(options) - other == set(known) - elsewhere
    for name in set(options) - other:
        assert (options[name].type or str).__name__ == known[name], name


HELPED = ["", "check", "run", "train", "ask", "evaluate", "recipe", "preflight", "compare", "bundle"]


@pytest.mark.parametrize("command", HELPED)
def test_help_is_a_manual(command, capsys):
    """Every option says what it does, and the help of the whole names every command."""
    with pytest.raises(SystemExit) as ended:
        main([*filter(None, [command]), "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    if not command:
        assert all(
            f"fiqa_helpers {name}" in said for name in ("check", "run", "train", "ask", "evaluate", "recipe")
        )
        return
    for name, action in options_of(command).items():
        assert action.help and (name.replace("_", "-") in said or action.metavar in said), name


@pytest.mark.parametrize(
    "arguments", [[], ["tain"], ["ask"], ["evaluate", "--rows", "few"], ["train", "--only", "04"]]
)
def test_a_wrong_command_line_ends_with_2(arguments, capsys):
    """Scripts tell a typing mistake (2) from a run that failed (1)."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.fixture
def executed_notebooks(monkeypatch):
    """Notebooks that a command would execute, with the parameters that they would get."""
    passed = {}

    def execute(notebook, workspace, values, *rest):
        passed[notebook.name[:2]] = values
        return cli.Done(notebook.stem, 1.0, "a figure", notebook)

    monkeypatch.setattr(cli, "use_own_kernel", lambda: None)
    monkeypatch.setattr(cli, "execute", execute)
    return passed


def test_train_executes_01_to_04(executed_notebooks, tmp_path, capsys):
    """--fresh has to reach the training, and profile, overrides and workdir all four."""
    common = {"profile": "tiny", "overrides": "{max_steps: 2}", "workdir": str(tmp_path)}
    arguments = [f"--{name}={value}" for name, value in common.items()]
    assert main(["train", *arguments]) == 0
    assert executed_notebooks == dict.fromkeys(["01", "02", "03", "04"], common)
    assert "a figure" in capsys.readouterr().out
    assert main(["train", "--fresh", *arguments]) == 0
    assert executed_notebooks["04"] == common | {"on_existing": "fresh"}
    assert executed_notebooks["03"] == common


def test_evaluate_hands_its_options_to_notebook_06(executed_notebooks, tmp_path, capsys):
    """An option that is dropped on the way would evaluate another adapter, or other rows, without a word."""
    own = {"adapter": "/my/adapter", "rows": 7, "no_repeat_ngram_size": 3}
    own |= {"endpoint": "http://127.0.0.1:1/v1", "endpoint_base": "b", "endpoint_tuned": "t"}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in own.items()]
    assert main(["evaluate", "--profile=tiny", f"--workdir={tmp_path}", *arguments]) == 0
    assert list(executed_notebooks) == ["06"]
    assert executed_notebooks["06"].items() >= own.items()
    assert "It has not been evaluated" in capsys.readouterr().out  # nothing ran, so there is nothing to show


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_tokenizer) -> Path:
    """What notebooks 01 and 04 leave on profile tiny: rows, and an adapter that changes something."""
    workspace = Workspace(str(tmp_path_factory.mktemp("commands")))
    data.write_processed(data.load_with_report("packaged")[0], workspace.data)
    profile = load_profile("tiny")
    tuned = peft.get_peft_model(model.tiny_model(tiny_tokenizer), model.lora_config(profile))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data += 1.0
    card = {"profile": dataclasses.asdict(profile), "finished": True}
    checkpoints.save_final(tuned, tiny_tokenizer, workspace.final_model, **card)
    return workspace.root


def test_ask_answers_with_both_models(workdir, capsys):
    """Side by side, the same question, and the adapter is really off in one of them."""
    questions = ["Should I buy bonds?", "What is an <b>ETF</b>?"]
    assert main(["ask", "--profile", "tiny", "--workdir", str(workdir), *questions]) == 0
    captured = capsys.readouterr()
    assert "Profile tiny (random weights" in captured.out
    blocks = captured.out.partition("\n1. ")[2].split("\n2. ")
    assert [block.splitlines()[0] for block in blocks] == questions
    for block in blocks:
        base, tuned = block.split("  tuned (")
        assert "  base (" in base
        assert base.split(":\n", 1)[1].strip() != tuned.split(":\n", 1)[1].strip()
    assert "step 3 of 3" in captured.err
    again = ["ask", "--profile", "tiny", "--workdir", str(workdir), "--temperature", "2.5", questions[0]]
    drawn = []
    for seed in ("1", "1", "2"):
        assert main([*again, "--sampling-seed", seed]) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ask", "Why?"], "There is no adapter in"),
        (["ask", "--temperature", "-1", "Why?"], "temperature is -1.0"),
        (["recipe"], "01_explore_fiqa"),
        (["recipe", "--tracker", "paper"], "choose one of tensorboard"),
    ],
)
def test_what_is_missing_is_a_sentence(arguments, said, tmp_path, capsys):
    """Exit code 1, the notebook or the value named, no traceback."""
    command, *rest = arguments
    assert main([command, "--profile", "tiny", "--workdir", str(tmp_path), *rest]) == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_recipe_for_a_gpu_is_written_where_there_is_none(workdir, capsys):
    """A login node has no GPU: the recipe must be writable and checkable there, with the 8B's own count."""
    arguments = ["--profile", "gpu80", "--gpus", "8", "--stand-in-tokenizer", "--workdir", str(workdir)]
    assert main(["recipe", *arguments]) == 0
    said = capsys.readouterr().out
    assert "6,815,744 trainable of 8,030,261,248" in said
    path = Path(said.split("Recipe  ")[1].splitlines()[0])
    assert path.is_file() and path.name == "gpu80.yaml"
    assert f"--nproc-per-node 8 -m nemo_automodel.cli.app {path}" in said


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_train_ask_and_evaluate_for_real(tmp_path):
    """The three commands one after the other, as a person types them, on profile tiny."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def command(*arguments: str) -> str:
        line = [
            sys.executable,
            "-m",
            "fiqa_helpers",
            *arguments,
            "--profile",
            "tiny",
            "--workdir",
            str(tmp_path),
        ]
        run = subprocess.run(line, cwd=PROJECT, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout

    trained = command("train")
    assert "validation loss" in trained and str(tmp_path / "checkpoints" / "final_model") in trained
    assert "tuned (" in command("ask", "Should I buy bonds?")
    evaluated = command("evaluate", "--rows", "3")
    assert "95 % interval" in evaluated and "echo the question" in evaluated
    assert "3 of 100 test rows" in evaluated
