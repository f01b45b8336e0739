"""Checkpoints: complete or not, whose they are, one process at a time, the saved adapter."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from peft import get_peft_model

from fiqa_helpers import model
from fiqa_helpers.base import WorkshopError, Workspace
from fiqa_helpers.machinery import checkpoints
from fiqa_helpers.profiles import load_profile

ROWS = {"train": "a" * 64, "validation": "b" * 64}
TINY = load_profile("tiny")


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(str(tmp_path))


def make_checkpoint(run, step: int):
    folder = checkpoints.checkpoint_folder(run, step)
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "optimizer.pt").write_bytes(b"x" * 5000)
    checkpoints.write_manifest(folder)
    return folder


def flip_one_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {  # said of it -> what was done
    "optimizer.pt is missing or was": lambda f: (f / "optimizer.pt").write_bytes(b"x" * 4999),
    "adapter_model.safetensors is": lambda f: flip_one_bit(f / "adapter_model.safetensors"),
    "it has no readable manifest": lambda f: (f / "manifest.json").unlink(),
    "it has no readable": lambda f: (f / "manifest.json").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_half_a_checkpoint_is_passed_over(tmp_path, capsys, damage):
    """A resume from damaged files would end in a traceback or, worse, in another model without a word."""
    good, bad = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 10)
    DAMAGE[damage](bad)
    assert checkpoints.newest_complete(tmp_path) == good
    said = capsys.readouterr().out
    assert said.startswith(f"checkpoint-10 is not used: {damage}") and said.count("\n") == 1


def test_steps_are_numbers_not_names(tmp_path):
    """checkpoint-9 sorts behind checkpoint-10 as text; other folders beside them are nobody's checkpoint."""
    for step in (9, 10, 100):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "checkpoint-200").write_text("a file")
    assert checkpoints.steps_of(tmp_path) == [100, 10, 9]
    assert checkpoints.newest_complete(tmp_path).name == "checkpoint-100"


def test_run_with_other_settings_is_refused_with_the_difference(workspace, monkeypatch):
    """Half a run with one recipe, data or template and half with another is a result nobody asked for."""
    make_checkpoint(checkpoints.open_run(workspace, TINY, ROWS).folder, 2)
    both = 'max_steps was 4 and is now 9; seed was 42 and is now 7.*on_existing = "fresh"'
    with pytest.raises(WorkshopError, match=both):
        checkpoints.open_run(workspace, replace(TINY, seed=7, max_steps=9), ROWS)
    with pytest.raises(WorkshopError, match="validation_sha256 was 'bbb"):
        checkpoints.open_run(workspace, TINY, ROWS | {"validation": "c" * 64})
    assert checkpoints.open_run(workspace, TINY, ROWS).resume_from.name == "checkpoint-2"
    monkeypatch.setattr(checkpoints, "SYSTEM_TEXT", "Answer briefly.")
    with pytest.raises(WorkshopError, match=r"\(prompt_sha256 was"):
        checkpoints.open_run(workspace, TINY, ROWS)


def test_less_memory_is_no_other_run(workspace, capsys):
    """After running out of memory one lowers tokens_per_batch: the run must go on, and say what changed."""
    make_checkpoint(checkpoints.open_run(workspace, TINY, ROWS).folder, 2)
    smaller = replace(TINY, tokens_per_batch=256)
    assert checkpoints.open_run(workspace, smaller, ROWS).resume_from.name == "checkpoint-2"
    assert "tokens_per_batch was 512 and is now 256" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, ""])
def test_checkpoints_of_an_unknown_run_are_refused(workspace, content):
    """Without run.json nobody knows what the checkpoints belong to: taking them up would be a guess."""
    folder = checkpoints.open_run(workspace, TINY, ROWS).folder
    make_checkpoint(folder, 2)
    (folder / "run.json").unlink()
    if content is not None:
        (folder / "run.json").write_text(content)
    with pytest.raises(WorkshopError, match="learning_rate was None and is now"):
        checkpoints.open_run(workspace, TINY, ROWS)


HOLDER = """
import sys
from fiqa_helpers.machinery import checkpoints
from fiqa_helpers.base import Workspace
from fiqa_helpers.profiles import load_profile
checkpoints.open_run(Workspace(sys.argv[1]), load_profile("tiny"), {"train": "a", "validation": "b"})
print("open", flush=True)
sys.stdin.read()
"""


def test_second_process_in_the_same_folder_is_refused(tmp_path):
    """Two runs that write the same checkpoints spoil both. A killed process holds nothing back."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "open\n"
        second = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert second.returncode != 0 and second.stdout == ""
        assert "WorkshopError: Another process trains in " in second.stderr.splitlines()[-1]
        first.kill()
    assert subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def save(tokenizer, workspace, **card):
    tuned = get_peft_model(model.tiny_model(tokenizer), model.lora_config(TINY))
    return checkpoints.save_final(tuned, tokenizer, workspace.final_model, **card)


def test_finished_run_is_recognised_unless_its_adapter_is_damaged(workspace, tiny_tokenizer):
    """A finished run is not trained again; an adapter that broke since then is not handed out."""
    run = checkpoints.open_run(workspace, TINY, ROWS)
    save(tiny_tokenizer, workspace, definition=run.definition, finished=True)
    assert checkpoints.open_run(workspace, TINY, ROWS).final_card["finished"]
    flip_one_bit(workspace.final_model / "adapter_model.safetensors")
    assert checkpoints.open_run(workspace, TINY, ROWS).final_card is None


def test_fresh_keeps_the_earlier_run_and_adapter(workspace, tiny_tokenizer, capsys):
    """Hours of training must not go away because a parameter says fresh, or a new adapter is saved."""
    make_checkpoint(checkpoints.open_run(workspace, TINY, ROWS).folder, 2)
    (workspace.checkpoints / ".final_model.partial" / "junk").mkdir(parents=True)  # of a process killed then
    save(tiny_tokenizer, workspace, number=1)
    save(tiny_tokenizer, workspace, number=2)
    assert not list(workspace.checkpoints.glob(".final_model*"))
    assert not (workspace.final_model / "junk").exists()
    run = checkpoints.open_run(workspace, replace(TINY, seed=1), ROWS, on_existing="fresh")
    assert run.resume_from is None and not workspace.final_model.exists()
    kept = sorted((workspace.checkpoints / "earlier").iterdir())
    assert capsys.readouterr().out.count("is kept as earlier/") == len(kept) == 3
    numbers = [json.loads((folder / "run_card.json").read_text())["number"] for folder in kept[:2]]
    assert sorted(numbers) == [1, 2] and checkpoints.fault(kept[2] / "checkpoint-2") is None
