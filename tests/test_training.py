"""The trainer: losses per answer token, exact resume after kills, stops that say why."""

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from peft import get_peft_model
from training_child import Trainings, result
from transformers import TrainingArguments

from fiqa_helpers import model, profiles
from fiqa_helpers.base import WorkshopError
from fiqa_helpers.machinery import checkpoints
from fiqa_helpers.rows import StepCollator, encode_rows
from fiqa_helpers.trainer import AnswerTrainer

SHORT = "{max_steps: 8, epochs: 2, train_rows: 9, batch_size: 2, tokens_per_batch: 256, lora_dropout: 0.05}"


@pytest.fixture(scope="module")
def trainings():
    with Trainings() as server:
        yield server


@pytest.fixture(scope="module")
def unkilled(trainings, tmp_path_factory) -> Path:
    """Workdir of a run that nothing happened to: eight steps over two epochs."""
    workdir = tmp_path_factory.mktemp("unkilled")
    trainings.run(workdir, overrides=SHORT)
    return workdir


@pytest.fixture(scope="module")
def killed_once(trainings, tmp_path_factory) -> Path:
    """Workdir of such a run, killed after its second checkpoint."""
    workdir = tmp_path_factory.mktemp("killed")
    signal_after(trainings, workdir, 4, signal.SIGKILL)
    return workdir


@pytest.fixture
def killed(killed_once, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(killed_once, tmp_path / "run")


def run_folder(workdir: Path) -> Path:
    return workdir / "checkpoints" / "run"


def last_line(trainings) -> str:
    return trainings.log.read_text().splitlines()[-1]


def signal_after(trainings, workdir: Path, step: int, number: signal.Signals) -> int:
    """Start a run and send a signal when the checkpoint of `step` is complete; returns the exit status."""
    process = trainings.start(workdir, overrides=SHORT)
    manifest = checkpoints.checkpoint_folder(run_folder(workdir), step) / checkpoints.MANIFEST
    trainings.wait_for(manifest.is_file)
    os.kill(process, number)
    return trainings.wait()


def test_three_kills_change_nothing(trainings, unkilled, tmp_path):
    """Killed while training, writing a checkpoint and sampling: the same adapter and losses, bit by bit."""
    moments, hits = random.Random(7), []
    for phase, longest in (("training", 0.5), ("saving", 0.01), ("sampling", 0.05)):
        hits.append(trainings.kill_in(tmp_path, phase, moments.uniform(0, longest), overrides=SHORT))
    assert all(hits), hits
    trainings.run(tmp_path, overrides=SHORT)
    assert result(tmp_path) == result(unkilled)


def test_two_resumes_in_a_row_from_one_checkpoint(trainings, unkilled, killed):
    """A resumed run that dies before its next checkpoint leaves the old one usable."""
    process = trainings.start(killed, overrides=SHORT)
    trainings.wait_for(lambda: "resuming from checkpoint-4" in trainings.log.read_text())
    os.kill(process, signal.SIGKILL)
    trainings.wait()
    assert "resuming from checkpoint-4" in trainings.run(killed, overrides=SHORT)
    assert result(killed) == result(unkilled)


def test_killed_between_the_files_and_the_manifest(trainings, unkilled, tmp_path):
    """Where only one checkpoint is kept, the old one must not go before the new one is vouched for."""
    job = {"overrides": SHORT, "save_total_limit": 1}
    trainings.start(tmp_path, dies_before_manifest_of="checkpoint-4", **job)
    assert trainings.wait() == -signal.SIGKILL
    said = trainings.run(tmp_path, **job)
    assert "checkpoint-4 is not used: it has no" in said and "resuming from checkpoint-2" in said
    assert result(tmp_path) == result(unkilled)


def test_killed_after_its_last_step(trainings, unkilled, tmp_path):
    """All is trained and the adapter not saved yet: transformers would add a ninth step to the eight."""
    workdir = shutil.copytree(unkilled, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "final_model")
    assert "resuming from checkpoint-8" in trainings.run(workdir, overrides=SHORT)
    assert checkpoints.steps_of(run_folder(workdir))[0] == 8
    assert result(workdir) == result(unkilled)


@pytest.mark.parametrize("damage", ["truncated", "bit-flipped", "missing", "no manifest"])
def test_resume_over_a_damaged_checkpoint(trainings, unkilled, killed, damage):
    """The newest checkpoint is damaged: the one before gives the same end."""
    newest = checkpoints.newest_complete(run_folder(killed))
    file = newest / "optimizer.pt"
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "bit-flipped":
        content[len(content) // 3] ^= 16
        file.write_bytes(content)
    else:
        (file if damage == "missing" else newest / checkpoints.MANIFEST).unlink()
    said = trainings.run(killed, overrides=SHORT)
    assert f"{newest.name} is not used: " in said and "resuming from checkpoint-2" in said
    assert result(killed) == result(unkilled)


def test_moved_workspace_takes_its_best_adapter_along(trainings, unkilled, tmp_path):
    """trainer_state.json names the best checkpoint by an absolute path, which means nothing after a move."""
    signal_after(trainings, tmp_path / "old", 6, signal.SIGKILL)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    for adapter in (tmp_path / "old").rglob("adapter_model.safetensors"):
        adapter.write_bytes(b"what is left at the old place must not be read")
    trainings.run(tmp_path / "new", overrides=SHORT)
    assert result(tmp_path / "new") == result(unkilled)


def test_damaged_best_checkpoint_is_not_loaded_at_the_end(trainings, killed):
    """A best checkpoint that broke is not the result, and the run says so."""
    best = checkpoints.checkpoint_folder(run_folder(killed), 2)
    state = run_folder(killed) / "checkpoint-4" / "trainer_state.json"
    claims = {"best_metric": 0.0, "best_global_step": 2, "best_model_checkpoint": str(best)}
    state.write_text(json.dumps(json.loads(state.read_text()) | claims))
    checkpoints.write_manifest(state.parent)
    (best / "adapter_model.safetensors").unlink()
    said = trainings.run(killed, overrides=SHORT)
    assert "checkpoint-2, the best by validation loss, is not used: adapter_model.safetensors" in said
    last = run_folder(killed) / "checkpoint-8" / "adapter_model.safetensors"
    assert result(killed)["adapter"] == last.read_bytes()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signal_writes_a_checkpoint_and_says_how_to_go_on(trainings, unkilled, tmp_path, name):
    """A job's time is over, a terminal closes: at most the step in hand may be lost, and nothing changes."""
    assert signal_after(trainings, tmp_path, 2, signal.Signals[name]) == 1
    newest = checkpoints.newest_complete(run_folder(tmp_path)).name
    assert last_line(trainings) == (
        f"WorkshopError: Training was told to stop ({name}) after step {newest.removeprefix('checkpoint-')} "
        f"of 8: run this again with the same parameters; the next run goes on from {newest}."
    )
    assert f"resuming from {newest}" in trainings.run(tmp_path, overrides=SHORT)
    assert result(tmp_path) == result(unkilled)


def test_signal_that_is_ignored_stays_ignored(make_trainer):
    """Whoever starts a training with nohup wants it to survive the terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = make_trainer({"max_steps": 2})
        head = trainer.model.get_output_embeddings()
        head.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGHUP))
        trainer.train()
        assert trainer.state.global_step == 2 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_out_of_memory_gives_advice_and_keeps_the_checkpoint(trainings, unkilled, killed):
    """The allocator's traceback says nothing to a person; the last checkpoint must still be good."""
    trainings.start(killed, overrides=SHORT, megabytes_more=20)
    assert trainings.wait() == 1
    said = last_line(trainings)
    assert said.startswith("WorkshopError: Memory ran out at step 4: lower tokens_per_batch or set ")
    assert said.endswith("the next run goes on from checkpoint-4.")
    trainings.run(killed, overrides=SHORT)
    assert result(killed) == result(unkilled)


def test_killed_run_is_not_resumed_as_another(trainings, killed):
    """Half of a run with one recipe and half with another; nothing may be computed or written."""
    trainings.start(killed, overrides=SHORT.replace("{", "{learning_rate: 1e-3, "))
    assert trainings.wait() == 1
    said = last_line(trainings)
    assert "checkpoints/run holds a run with other settings" in said
    assert "learning_rate was 0.004 and is now 0.001" in said
    assert checkpoints.newest_complete(run_folder(killed)).name == "checkpoint-4"


# -- in this process: losses, and losses that are no number


@pytest.fixture
def make_trainer(tiny_tokenizer, fiqa_rows, tmp_path):
    """A function (training arguments, profile changes) -> trainer over ten real rows."""

    def make(arguments: dict | None = None, **changes):
        profile = replace(profiles.load_profile("tiny"), **changes)
        encoded = encode_rows(datasets.Dataset.from_list(fiqa_rows[:10]), tiny_tokenizer, profile)
        values = {"max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no", "use_cpu": True}
        values |= {"logging_steps": 1, "logging_nan_inf_filter": False, "remove_unused_columns": False}
        values |= {"disable_tqdm": True, "report_to": "none"}
        return AnswerTrainer(
            model=get_peft_model(model.load_base(profile), model.lora_config(profile)),
            args=TrainingArguments(str(tmp_path / "run"), **values | (arguments or {})),
            train_dataset=encoded,
            eval_dataset=encoded,
            data_collator=StepCollator(tiny_tokenizer.pad_token_id, profile.tokens_per_batch, profile.layout),
        )

    return make


@pytest.mark.parametrize(("layout", "batch"), [("padded", 1), ("padded", 3), ("packed", 10)])
def test_validation_loss_is_a_mean_over_tokens_whatever_the_batches(make_trainer, layout, batch):
    """A mean of batch means moves with the batch size; ours must equal a loop over single rows."""
    trainer = make_trainer({"per_device_eval_batch_size": batch}, layout=layout, tokens_per_batch=300)
    total, tokens = 0.0, 0
    trainer.model.eval()
    for row in trainer.eval_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = trainer.model(input_ids=ids).logits[0]
        total += torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum").item()
        tokens += int((labels != -100).sum())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / tokens, abs=1e-5)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_number_that_is_none_never_reaches_the_weights(make_trainer, monkeypatch, poison, logging_steps):
    """One NaN turns every later weight into NaN: the optimizer skips the step, the last checkpoint is good.

    A finite loss can have a gradient that is not: clipping would turn it into NaN weights. With seldom logs,
    as on a GPU, the run must still stop before its next checkpoint.
    """
    arguments = {"max_steps": 12, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(arguments | {"logging_steps": logging_steps})
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    seen, plain = {}, trainer.loss_sum

    def poisoned(model, micro_batch):
        step = trainer.state.global_step
        seen[step] = [weight.detach().clone() for weight in weights]
        loss = plain(model, micro_batch)
        return loss * float("nan") if poison == "loss" and step == 2 else loss

    def infinite(gradient):
        bad = poison == "gradient" and trainer.state.global_step == 2
        return gradient * float("inf") if bad else gradient

    monkeypatch.setattr(trainer, "loss_sum", poisoned)
    next(weight for weight in weights if weight.shape[1] == 8).register_hook(infinite)  # a lora_B
    with pytest.raises(WorkshopError, match="lower learning_rate; the next run goes on from checkpoint-2"):
        trainer.train()
    assert trainer.state.global_step == (3 if logging_steps == 1 else 4)
    after = weights if logging_steps == 1 else seen[3]
    assert all(torch.equal(one, two) for one, two in zip(seen[2], after, strict=True))
    assert any(not torch.equal(one, two) for one, two in zip(seen[1], seen[2], strict=True))
    assert all(weight.isfinite().all() for weight in weights)


@pytest.mark.parametrize(("kind", "last"), [("training", 2), ("validation", 1)])
def test_exploding_loss_stops_and_no_exploded_adapter_is_saved(make_trainer, tmp_path, kind, last):
    """Worse than guessing, by training or by validation: what is saved then would be taken up again."""
    arguments = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(arguments | {"max_steps": 6})

    def explode(head, inputs, logits):
        wanted = trainer.state.global_step >= 2 and head.training == (kind == "training")
        return logits * 1000 if wanted else logits

    trainer.model.get_output_embeddings().register_forward_hook(explode)
    said = rf"The loss is \d\d+\.\d at step .* goes on from checkpoint-{last}\."
    with pytest.raises(WorkshopError, match=said):
        trainer.train()
    assert checkpoints.steps_of(tmp_path / "run")[0] == last


def test_training_over_newer_checkpoints_is_refused(make_trainer, tmp_path):
    """The training cell is run twice in one kernel: step 0 again, over checkpoints of the first time."""
    trainer = make_trainer({"save_strategy": "steps", "save_steps": 1, "max_steps": 3})
    trainer.train()
    for begin in (None, tmp_path / "run" / "checkpoint-1"):
        there = "run holds checkpoint-3 and this would begin at (step 0|checkpoint-1): restart"
        with pytest.raises(WorkshopError, match=there):
            trainer.train(resume_from_checkpoint=begin)


class Bomb:
    """A pickle that writes a file where it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_pickle_in_a_checkpoint_is_refused(make_trainer, tmp_path, name):
    """A checkpoint that somebody sent: code in it must not run (training_args.bin is not even opened)."""
    make_trainer({"save_strategy": "steps", "save_steps": 2, "max_steps": 2}).train()
    folder = tmp_path / "run" / "checkpoint-2"
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
    checkpoints.write_manifest(folder)
    refused = pytest.raises(pickle.UnpicklingError, match="Weights only load failed")
    with contextlib.nullcontext() if name == "training_args.bin" else refused:
        make_trainer({"max_steps": 3}).train(resume_from_checkpoint=folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.cuda
def test_cuda_out_of_memory_gives_advice(make_trainer):
    """The GPU's own allocator, limited to next to nothing."""
    trainer = make_trainer({"use_cpu": False})
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(WorkshopError, match="Memory ran out at step 0: lower tokens_per_batch"):
            trainer.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
