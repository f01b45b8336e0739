"""`python -m fiqa_helpers check`, `ask` and `compare`: what they say, and their exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest

from fiqa_helpers import data, model
from fiqa_helpers.__main__ import main
from fiqa_helpers.base import Workspace
from fiqa_helpers.machinery import checkpoints
from fiqa_helpers.profiles import load_profile

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def variables_kept():
    """What a command sets for its own process, such as quiet libraries, is not left to the next test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def command(*arguments: object) -> int:
    """Run it in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.mark.parametrize("arguments", [["tain"], ["ask"], ["run", "--onyl", "04"], ["train"]])
def test_a_wrong_command_line_ends_with_2(arguments, capsys):
    """Scripts tell a typing mistake (2) from a run that failed (1)."""
    assert command(*arguments) == 2
    assert "Usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--profile", "gpu81"], "gpu81"),
        (["run", "--profile", "laptop", "--overrides", "{max_step: 2}"], "max_step"),
        (["run", "--profile", "laptop", "--only", "99"], "no such notebook"),
        (["run", "--profile", "laptop", "--only", "01", "--fresh"], "no such parameter in 01_explore_fiqa"),
        (["check", "--profile", "laptop", "--overrides", "[1]"], "overrides"),
        (["ask", "--profile", "tiny", "Why?"], "There is no adapter in"),
        (["compare", "nothing here"], "nothing here holds no run cards"),
    ],
)
def test_what_is_wrong_is_a_sentence(arguments, said, tmp_path, capsys):
    """Before any kernel starts, with exit code 1 and no traceback."""
    where = [] if arguments[0] == "compare" else ["--workdir", tmp_path]
    assert command(*arguments, *where) == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


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
    card = {"profile": profile_values(profile), "finished": True}
    checkpoints.save_final(tuned, tiny_tokenizer, workspace.final_model, **card)
    return workspace.root


def profile_values(profile) -> dict:
    """The settings of a profile, as a run card has them."""
    return json.loads(next((PROJECT / "notebooks/precomputed/run_cards").glob("04.json")).read_text())[
        "profile"
    ] | {name: getattr(profile, name) for name in type(profile).__annotations__}


def test_ask_answers_with_both_models(workdir, capsys):
    """Side by side, the same question, and the adapter is really off in one of them."""
    questions = ["Should I buy bonds?", "What is an <b>ETF</b>?"]
    assert command("ask", "--profile", "tiny", "--workdir", workdir, *questions) == 0
    said = capsys.readouterr().out
    assert "Profile tiny (random weights" in said
    blocks = said.partition("\n1. ")[2].split("\n2. ")
    assert [block.splitlines()[0] for block in blocks] == questions
    for block in blocks:
        base, tuned = block.split("  tuned (")
        assert base.split(":\n", 1)[1].strip() != tuned.split(":\n", 1)[1].strip()


def test_a_question_past_the_models_context_is_refused(workdir, capsys):
    """transformers warns at most, and goes on with positions that the model has never seen."""
    assert command("ask", "--profile", "tiny", "--workdir", workdir, "Why is money " * 5000) == 1
    assert "shorten it" in capsys.readouterr().err


def test_a_terminal_without_utf8_gets_the_answers(workdir):
    """One character that the terminal lacks ended `ask` after minutes of work, with neither answer shown."""
    line = [sys.executable, "-m", "fiqa_helpers", "ask", "--profile", "tiny", "--workdir", str(workdir)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*line, "Was kostet 1 €?"], cwd=PROJECT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Was kostet 1 ?" in done.stdout and "tuned (" in done.stdout


@pytest.fixture
def two_runs(tmp_path) -> list[Path]:
    """The cards of the precomputed run in two workdirs: the second has another rank and stopped after 04."""
    for name in ("first", "second"):
        cards = tmp_path / name / "outputs" / "run_cards"
        cards.mkdir(parents=True)
        for path in sorted((PROJECT / "notebooks/precomputed/run_cards").glob("*.json")):
            card = json.loads(path.read_text("utf-8"))
            if name == "second":
                card["profile"]["lora_rank"] = 16
            if name == "first" or path.stem <= "04":
                (cards / path.name).write_text(json.dumps(card))
    return [tmp_path / "first", tmp_path / "second"]


def test_compare_lists_what_differs_and_what_came_out(two_runs, capsys):
    """Thirty equal settings would bury the one that was changed."""
    assert command("compare", *two_runs) == 0
    said = capsys.readouterr().out
    settings, _, results = said.partition("\nResults")
    first, second = two_runs
    assert settings.split("\n", 3)[3].split() == ["lora_rank", f"{first}:", "8", f"{second}:", "16"]
    assert model.load_kept().notebook("04")["figure"] in results
    assert f"{second}: not run" in results and "not to be ranked" not in said


def test_losses_of_other_things_are_not_ranked(two_runs, capsys):
    """A lower loss on other rows or of another model is no better run."""
    path = two_runs[1] / "outputs" / "run_cards" / "04.json"
    card = json.loads(path.read_text())
    card["profile"]["max_length"] = 64
    path.write_text(json.dumps(card))
    assert command("compare", *two_runs) == 0
    assert "The runs differ in max_length: their losses are not to be ranked." in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.notebooks
@pytest.mark.timeout(1800)
def test_the_way_of_the_readme(tmp_path):
    """Rows, adapter, a question, an evaluation of three rows, as a person types them, on profile tiny."""

    def typed(*arguments: str) -> str:
        line = [sys.executable, "-m", "fiqa_helpers", *arguments, "--profile", "tiny", "--workdir", tmp_path]
        run = subprocess.run(line, cwd=PROJECT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout

    assert "validation loss" in typed("run", "--only", "01-04")
    assert "tuned (" in typed("ask", "Should I buy bonds?")
    assert "06_evaluate" in typed("run", "--only", "06", "-p", "rows=3")
    card = json.loads((tmp_path / "outputs" / "run_cards" / "06.json").read_text())
    assert card["parameters"]["rows"] == 3
