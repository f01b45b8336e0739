"""`python -m fiqa_helpers check`, `ask` and `compare`: what they say, and their exit codes."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import peft
import pytest

from fiqa_helpers import data, model
from fiqa_helpers.__main__ import main
from fiqa_helpers.base import Workspace
from fiqa_helpers.machinery import checkpoints
from fiqa_helpers.profiles import load_profile

PROJECT = Path(__file__).resolve().parent.parent
CARDS = PROJECT / "notebooks" / "precomputed" / "run_cards"


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


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("tain", 2, "Usage:"),
        ("ask", 2, "Usage:"),
        ("run --onyl 04", 2, "Usage:"),
        ("run --profile gpu81", 1, "gpu81"),
        ("run --profile laptop --overrides {max_step:2}", 1, "max_step"),
        ("run --profile laptop --only 99", 1, "no such notebook"),
        ("check --profile laptop --overrides [1]", 1, "overrides"),
        ("ask --profile tiny --workdir {empty} Why?", 1, "There is no adapter in"),
    ],
)
def test_a_wrong_command_line_is_a_sentence(line, code, said, tmp_path, capsys):
    """Scripts tell a typing mistake (2) from a run that failed (1), and nobody reads a traceback."""
    assert command(*line.replace("{empty}", str(tmp_path)).split()) == code
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_tokenizer) -> Path:
    """What notebooks 01 and 04 leave on profile tiny: rows, and an adapter that changes something."""
    workspace = Workspace(str(tmp_path_factory.mktemp("commands")))
    data.write_processed(data.load_fiqa("packaged"), workspace.data)
    profile = load_profile("tiny")
    tuned = peft.get_peft_model(model.tiny_model(tiny_tokenizer), model.lora_config(profile))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data += 1.0
    checkpoints.save_final(
        tuned, tiny_tokenizer, workspace.final_model, profile=asdict(profile), finished=True
    )
    return workspace.root


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


def test_a_question_past_the_models_context_is_refused(workdir, capsys, monkeypatch):
    """transformers goes on with positions that the model has never seen. No weights are loaded first."""
    monkeypatch.setattr(model, "load_base", lambda *_: pytest.fail("the weights were loaded"))
    assert command("ask", "--profile", "tiny", "--workdir", workdir, "Why is money " * 5000) == 1
    assert "shorten the question" in capsys.readouterr().err


def test_a_terminal_without_utf8_gets_the_answers(workdir):
    """One character that the terminal lacks ended `ask` after minutes of work, with neither answer shown."""
    line = [sys.executable, "-m", "fiqa_helpers", "ask", "--profile", "tiny", "--workdir", str(workdir)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*line, "Was kostet 1 €?"], cwd=PROJECT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Was kostet 1 ?" in done.stdout and "tuned (" in done.stdout


def test_compare_lists_the_tries_of_a_class(tmp_path, capsys):
    """Thirty equal settings would bury the one that was changed; an empty folder must not hide the others."""
    folders = [tmp_path / name for name in ("ann", "bob", "nobody")]
    for folder in folders[:2]:
        (folder / "outputs" / "run_cards").mkdir(parents=True)
        for path in CARDS.glob("*.json"):
            card = json.loads(path.read_text("utf-8"))
            if folder.name == "bob":
                card["profile"]["lora_rank"] = 16
            if folder.name == "ann" or path.stem <= "04":
                (folder / "outputs" / "run_cards" / path.name).write_text(json.dumps(card))
    assert command("compare", *folders) == 0
    head, ann, bob, nobody = capsys.readouterr().out.splitlines()
    found = json.loads((CARDS / "06.json").read_text())["facts"]["comparisons"]
    topic, ended = found["similarity"], found["stopped"]
    assert f"{topic['base']:.2f} -> {topic['tuned']:.2f} ({topic['low']:+.2f} to {topic['high']:+.2f}" in ann
    assert f"{ended['base']:.0%} -> {ended['tuned']:.0%}" in ann and "06_evaluate" in ann
    assert json.loads((CARDS / "04.json").read_text())["figure"] in ann
    assert "lora_rank 16" in bob and "04_train" in bob and "lora_rank" not in ann and "epochs" not in bob
    assert [line.index("laptop") for line in (ann, bob)] == [head.index("profile")] * 2
    assert nobody.startswith(str(folders[2])) and nobody.endswith("no run cards here")
    assert command("compare", folders[0]) == 0
