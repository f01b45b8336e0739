"""The trainer: exact resume after kills, full disks and signals, losses per answer token, stops that say why.

What is slow injects faults for real into whole runs, many times or under papermill.
"""

import json
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from peft import get_peft_model
from training_child import Trainings, result
from transformers import TrainingArguments

from fiqa_helpers import model, profiles
from fiqa_helpers.base import WorkshopError, Workspace
from fiqa_helpers.machinery import checkpoints
from fiqa_helpers.rows import StepCollator, encode_rows
from fiqa_helpers.trainer import AnswerTrainer

ROWS = {"train": "a" * 64, "validation": "b" * 64}
TINY = profiles.load_profile("tiny")
CHAIN = (
    "{max_steps: 40, epochs: 20, train_rows: 13, batch_size: 2, tokens_per_batch: 256, lora_dropout: 0.05}"
)


@pytest.fixture(scope="module")
def trainings():
    with Trainings() as server:
        yield server


@pytest.fixture(scope="module")
def unkilled(trainings, tmp_path_factory) -> Path:
    """Workdir of a run that nothing happened to: eight steps over two epochs."""
    workdir = tmp_path_factory.mktemp("unkilled")
    trainings.run(workdir, keep=9)
    return workdir


@pytest.fixture
def killed(unkilled, tmp_path) -> Path:
    """What a kill soon after the second checkpoint leaves."""
    later = shutil.ignore_patterns("final_model", "checkpoint-6", "checkpoint-8")
    return shutil.copytree(unkilled, tmp_path / "run", ignore=later)


def run_folder(workdir: Path) -> Path:
    return workdir / "checkpoints" / "run"


def test_three_kills_change_nothing(trainings, unkilled, tmp_path):
    """Killed while training, writing a checkpoint and sampling: the same adapter and losses, bit by bit."""
    moments = random.Random(7)
    for phase, longest in (("training", 0.5), ("saving", 0.01), ("sampling", 0.05)):
        trainings.kill_in(tmp_path, phase, moments.uniform(0, longest))
    trainings.run(tmp_path)
    assert result(tmp_path) == result(unkilled)


def killed_again(trainings, workdir: Path) -> str:
    """A resumed run that dies before its next checkpoint leaves the old one usable."""
    trainings.start(workdir)
    trainings.kill_when(lambda: "resuming from checkpoint-4" in trainings.said())
    return "checkpoint-4"


def damaged(trainings, workdir: Path) -> str:
    """One bit of the newest checkpoint is another: the one before gives the same end."""
    file = run_folder(workdir) / "checkpoint-4" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 16
    file.write_bytes(content)
    return "checkpoint-2"


def out_of_memory(trainings, workdir: Path) -> str:
    """The allocator's traceback says nothing to a person; the last checkpoint must still be good."""
    trainings.start(workdir, megabytes_more=20)
    assert trainings.wait() == 1
    said = trainings.said()[-1]
    assert said.startswith("WorkshopError: Memory ran out at step 4: lower tokens_per_batch or set ")
    assert said.endswith("the next run goes on from checkpoint-4.")
    return "checkpoint-4"


def resumed_as_another(trainings, workdir: Path) -> str:
    """Half of a run with one recipe and half with another: nothing may be computed or written."""
    trainings.start(workdir, overrides="{learning_rate: 1e-3}")
    assert trainings.wait() == 1
    said = trainings.said()[-1]
    assert "checkpoints/run holds a run with other settings" in said
    assert "learning_rate was 0.004 and is now 0.001" in said
    return "checkpoint-4"


def killed_before_the_manifest(trainings, workdir: Path) -> str:
    """Where only one checkpoint is kept, the old one must not go before the new one is vouched for."""
    trainings.start(workdir, dies_before_manifest_of="checkpoint-6", keep=1)
    assert trainings.wait() == -signal.SIGKILL
    return "checkpoint-4"


FAULTS = [killed_again, killed_before_the_manifest, damaged, out_of_memory, resumed_as_another]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_killed_run_goes_on_after(trainings, unkilled, killed, fault):
    """Each fault says what goes wrong; the end must be that of a run that nothing happened to."""
    newest = fault(trainings, killed)
    assert f"resuming from {newest}" in trainings.run(killed)
    assert result(killed) == result(unkilled)


def test_killed_after_its_last_step(trainings, unkilled, tmp_path):
    """All is trained and the adapter not saved yet: transformers would add a ninth step to the eight."""
    workdir = shutil.copytree(unkilled, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "final_model")
    assert "resuming from checkpoint-8" in trainings.run(workdir)
    assert checkpoints.steps_of(run_folder(workdir))[0] == 8
    assert result(workdir) == result(unkilled)


def test_damaged_best_checkpoint_is_not_loaded_at_the_end(trainings, killed):
    """A best checkpoint that broke is not the result, and the run says so."""
    best, last = (run_folder(killed) / f"checkpoint-{step}" for step in (2, 8))
    state = run_folder(killed) / "checkpoint-4" / "trainer_state.json"
    claims = {"best_metric": 0.0, "best_global_step": 2, "best_model_checkpoint": str(best)}
    state.write_text(json.dumps(json.loads(state.read_text()) | claims))
    checkpoints.write_manifest(state.parent)
    (best / "adapter_model.safetensors").unlink()
    said = trainings.run(killed)
    assert "checkpoint-2, the best by validation loss, is not used: adapter_model.safetensors" in said
    assert result(killed)["adapter"] == (last / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signal_writes_a_checkpoint_and_says_how_to_go_on(trainings, unkilled, tmp_path, name):
    """A job's time is over, a terminal closes: at most the step in hand may be lost, and nothing changes."""
    trainings.start(tmp_path, signal_in_step_3=signal.Signals[name])  # a checkpoint was due after step 4
    assert trainings.wait() == 1
    assert trainings.said()[-1] == (
        f"WorkshopError: Training was told to stop ({name}) after step 3 of 8: run this again with the same "
        "parameters; the next run goes on from checkpoint-3."
    )
    assert "resuming from checkpoint-3" in trainings.run(tmp_path)
    assert result(tmp_path) == result(unkilled)


# -- in this process: losses that are no number, cells that are run twice, files of strangers


@pytest.fixture
def make_trainer(tiny_tokenizer, fiqa_rows, tmp_path):
    """A function (training arguments) -> trainer over ten real rows, with a checkpoint at every step."""

    def make(**arguments) -> AnswerTrainer:
        encoded = encode_rows(datasets.Dataset.from_list(fiqa_rows[:10]), tiny_tokenizer, TINY)
        values = {"max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
        values |= {"logging_steps": 1, "logging_nan_inf_filter": False, "remove_unused_columns": False}
        values |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none"}
        return AnswerTrainer(
            model=get_peft_model(model.load_base(TINY), model.lora_config(TINY)),
            args=TrainingArguments(str(tmp_path / "run"), **values | arguments),
            train_dataset=encoded,
            eval_dataset=encoded,
            data_collator=StepCollator(tiny_tokenizer.pad_token_id, TINY.tokens_per_batch, TINY.layout),
        )

    return make


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_an_infinite_gradient_never_reaches_the_weights(make_trainer, tmp_path, logging_steps):
    """A finite loss can have a gradient that is not: clipping would turn every weight into NaN.

    The optimizer skips the step. With seldom logs, as on a GPU, the run stops before its next checkpoint.
    """
    trainer = make_trainer(max_steps=12, learning_rate=1e-3, save_steps=2, logging_steps=logging_steps)
    weights, seen = [weight for weight in trainer.model.parameters() if weight.requires_grad], {}

    def infinite(gradient):
        step = trainer.state.global_step
        seen[step] = [weight.detach().clone() for weight in weights]
        return gradient * float("inf") if step == 2 else gradient

    next(weight for weight in weights if weight.shape[1] == 8).register_hook(infinite)  # a lora_B
    with pytest.raises(WorkshopError, match="A gradient is no number .*: lower learning_rate"):
        trainer.train()
    assert checkpoints.steps_of(tmp_path / "run") == [2]
    after = weights if logging_steps == 1 else seen[3]
    assert all(torch.equal(one, two) for one, two in zip(seen[2], after, strict=True))
    assert any(not torch.equal(one, two) for one, two in zip(seen[1], seen[2], strict=True))
    assert all(weight.isfinite().all() for weight in weights)


@pytest.mark.parametrize(
    ("factor", "training", "last"), [(1e3, True, 2), (1e3, False, 1), (float("nan"), True, 2)]
)
def test_exploding_loss_stops_and_is_not_saved(make_trainer, tmp_path, factor, training, last):
    """Worse than guessing or NaN, in training or validation: what is saved then would be taken up again."""
    trainer = make_trainer(max_steps=6, eval_strategy="steps", eval_steps=1)

    def explode(head, inputs, logits):
        return logits * factor if trainer.state.global_step >= 2 and head.training == training else logits

    trainer.model.get_output_embeddings().register_forward_hook(explode)
    said = r"The loss is (nan|\d\d+\.\d) at step .*: lower learning_rate .* on_existing"
    with pytest.raises(WorkshopError, match=said):
        trainer.train()
    assert checkpoints.steps_of(tmp_path / "run")[0] == last


def test_training_over_newer_checkpoints_is_refused(make_trainer, tmp_path):
    """The training cell is run twice in one kernel: step 0 again, over checkpoints of the first time."""
    trainer = make_trainer()
    trainer.train()
    for begin in (None, tmp_path / "run" / "checkpoint-1"):
        with pytest.raises(WorkshopError, match="begins at the newest checkpoint: restart the kernel"):
            trainer.train(resume_from_checkpoint=begin)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickle_in_a_checkpoint_is_refused(make_trainer, tmp_path, name):
    """A checkpoint that somebody sent: code in it must not run."""
    make_trainer(max_steps=1).train()
    folder = tmp_path / "run" / "checkpoint-1"
    (folder / name).write_text(f"cos\nsystem\n(S'touch {tmp_path / 'ran'}'\ntR.")
    checkpoints.write_manifest(folder)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        make_trainer().train(resume_from_checkpoint=folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.cuda
def test_cuda_out_of_memory_gives_advice(make_trainer):
    """The GPU's own allocator, limited to next to nothing, has another error than the machine's."""
    trainer = make_trainer(use_cpu=False)
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(WorkshopError, match="Memory ran out at step 0: lower tokens_per_batch"):
            trainer.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# -- whose a folder is


def make_checkpoint(run: Path, step: int) -> None:
    folder = checkpoints.checkpoint_folder(run, step)
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"x" * 5000)
    checkpoints.write_manifest(folder)


def test_steps_are_numbers_not_names(tmp_path):
    """checkpoint-9 sorts behind checkpoint-10 as text; other folders beside them are nobody's checkpoint."""
    for step in (9, 10, 100):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-final").mkdir()
    assert checkpoints.steps_of(tmp_path) == [100, 10, 9]
    assert checkpoints.newest_complete(tmp_path).name == "checkpoint-100"


def test_run_with_other_settings_is_refused_with_the_difference(tmp_path, monkeypatch):
    """Half a run with one recipe, data or prompt and half with another; but memory may be saved."""
    workspace = Workspace(str(tmp_path))
    make_checkpoint(checkpoints.open_run(workspace, TINY, ROWS).folder, 2)
    with pytest.raises(WorkshopError, match='validation_sha256 was \'bbb.* on_existing = "fresh"'):
        checkpoints.open_run(workspace, TINY, ROWS | {"validation": "c" * 64})
    smaller = replace(TINY, tokens_per_batch=256)  # the advice after memory ran out
    assert checkpoints.open_run(workspace, smaller, ROWS).resume_from.name == "checkpoint-2"
    with pytest.raises(WorkshopError, match="must be resume or fresh"):
        checkpoints.open_run(workspace, TINY, ROWS, "frsh")
    with monkeypatch.context() as other:
        other.setattr(checkpoints, "SYSTEM_TEXT", "Answer briefly.")
        with pytest.raises(WorkshopError, match=r"\(prompt_sha256 was"):
            checkpoints.open_run(workspace, TINY, ROWS)
    (run_folder(tmp_path) / "run.json").unlink()
    with pytest.raises(WorkshopError, match="of an unknown run"):
        checkpoints.open_run(workspace, TINY, ROWS)


def test_second_process_in_the_same_folder_is_refused(trainings, tmp_path):
    """Two runs that write the same checkpoints spoil both. A killed process holds nothing back."""

    def refused() -> bool:
        if "resuming from None" not in trainings.said():
            return False
        with pytest.raises(WorkshopError, match="Another process trains in"):
            checkpoints.open_run(Workspace(str(tmp_path)), TINY, ROWS)
        return True

    trainings.start(tmp_path)
    trainings.kill_when(refused)
    assert not checkpoints.open_run(Workspace(str(tmp_path)), TINY, ROWS, "fresh").resume_from


def test_a_finished_run_is_recognised_and_fresh_keeps_it(tmp_path, tiny_tokenizer):
    """Hours of training must not be done twice, nor go away because a parameter says fresh."""
    workspace = Workspace(str(tmp_path))
    run = checkpoints.open_run(workspace, TINY, ROWS)
    tuned = get_peft_model(model.tiny_model(tiny_tokenizer), model.lora_config(TINY))
    (workspace.checkpoints / ".final_model.partial" / "junk").mkdir(parents=True)  # of a process killed then
    for number in (1, 2):
        card = {"number": number, "definition": run.definition, "finished": True}
        checkpoints.save_final(tuned, tiny_tokenizer, workspace.final_model, **card)
    assert not list(workspace.checkpoints.glob("**/junk"))
    assert checkpoints.open_run(workspace, TINY, ROWS).final_card["number"] == 2
    (workspace.final_model / "adapter_model.safetensors").write_bytes(b"broken since then")
    assert checkpoints.open_run(workspace, TINY, ROWS).final_card is None
    make_checkpoint(run.folder, 2)
    run = checkpoints.open_run(workspace, replace(TINY, seed=1), ROWS, on_existing="fresh")
    assert run.resume_from is None and not workspace.final_model.exists()
    kept = sorted((workspace.checkpoints / "earlier").iterdir())
    numbers = [json.loads((folder / "run_card.json").read_text())["number"] for folder in kept[:2]]
    assert sorted(numbers) == [1, 2] and checkpoints.fault(kept[2] / "checkpoint-2") is None


# -- slow: many kills, full disks, notebook 04 under papermill


def torn(run: Path) -> set[int]:
    """The steps of the run's checkpoints that are not complete."""
    return {n for n in checkpoints.steps_of(run) if checkpoints.fault(checkpoints.checkpoint_folder(run, n))}


@pytest.mark.slow
def test_chain_of_kills_ends_bitwise_like_an_unkilled_run(trainings, tmp_path):
    """Killed 20 times at random moments, resumed each time: one lost random number would change the adapter.

    A third of the kills come at any time, the others soon after a phase began, one to three steps after the
    last checkpoint. A kill counts as inside a write when it left an incomplete checkpoint behind.
    """
    started = time.monotonic()
    trainings.run(tmp_path / "unkilled", overrides=CHAIN)
    life = (time.monotonic() - started) / 6
    moments, hits, writes = random.Random(2026), Counter(), 0
    aims = [("", life), ("saving", 0.02), ("evaluating", 0.2)]
    aims += [("", life), ("sampling", 0.03), ("training", 0.3)]
    workdir, run = tmp_path / "killed", run_folder(tmp_path / "killed")
    for number in range(20):
        phase, longest = aims[number % len(aims)]
        before = torn(run)
        step = max([0, *set(checkpoints.steps_of(run)) - before]) + moments.randint(1, 3)
        hit = trainings.kill_in(workdir, phase, moments.uniform(0, longest), step, overrides=CHAIN)
        hits[hit] += 1
        writes += hit == "saving" and bool(torn(run) - before)
    said = trainings.run(workdir, overrides=CHAIN)
    assert result(workdir) == result(tmp_path / "unkilled")
    assert writes >= 3 and len(hits) == 4 and min(hits.values()) >= 2, (writes, hits)
    assert "resuming from checkpoint-" in said and max(checkpoints.steps_of(run)) == 40


@pytest.mark.slow
@pytest.mark.parametrize("size", ["200k", "340k", "380k", "420k", "500k"])
def test_full_disk_at_any_file_of_a_checkpoint(trainings, unkilled, small_disk, size):
    """safetensors, torch, json and tokenizers fail in words of their own: a sentence, and a resume."""
    small = small_disk(f"size={size}")
    trainings.start(small)
    assert trainings.wait() == 1
    said, run = trainings.said(), run_folder(small)
    assert said[-1].startswith(f"WorkshopError: The disk of {run.parent}"), said[-1]
    assert "is full: free some space" in said[-1] and not any("Traceback" in line for line in said)
    assert torn(run) or (run.parent / ".final_model.partial").is_dir()
    last = checkpoints.newest_complete(run)
    subprocess.run(["mount", "-o", "remount,size=50m", str(small)], check=True)
    assert f"resuming from {last and last.name}" in trainings.run(small)
    assert result(small) == result(unkilled)


def run_notebooks(workdir: Path, only: str) -> subprocess.Popen:
    """`python -m fiqa_helpers run`, begun."""
    slow = ["--profile", "tiny", "--overrides", "{max_steps: 40, epochs: 20, eval_steps: 2}"]
    command = ["-m", "fiqa_helpers", "run", *slow, "--workdir", str(workdir), "--only", only]
    return subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.notebooks
@pytest.mark.timeout(1800)
def test_notebook_04_goes_on_after(tmp_path):
    """Its kernel killed, SIGTERM to all: the failure is not silent, and the same command again resumes."""
    run = run_folder(tmp_path)
    run_notebooks(tmp_path, "00-03").communicate(timeout=600)
    for step, words in ((4, "its kernel died"), (12, "Training was told to stop (SIGTERM) after step")):
        command = run_notebooks(tmp_path, "04")
        while max([0, *checkpoints.steps_of(run)]) < step:
            assert command.poll() is None, command.communicate()
            time.sleep(0.05)
        (kernel,) = psutil.Process(command.pid).children()
        if step == 4:
            kernel.kill()
        else:
            command.terminate()
            kernel.terminate()
        said = command.communicate(timeout=600)[1]
        assert command.returncode == 1 and words in said
    assert "run this again with the same parameters" in said and "Traceback" not in said
    newest = checkpoints.newest_complete(run).name.removeprefix("checkpoint-")
    command = run_notebooks(tmp_path, "04")
    assert "Traceback" not in command.communicate(timeout=600)[1] and command.returncode == 0
    executed = (tmp_path / "outputs" / "executed" / "04_train.ipynb").read_text()
    assert checkpoints.fault(tmp_path / "checkpoints" / "final_model") is None
    assert f"resumed at step {newest}" in executed and "finished 40 steps" in executed
