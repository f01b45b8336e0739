"""The trainer: losses per answer token, exact resume after kills, stops that say why."""

import json
import math
import os
import pickle
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from training_child import Trainings, result

from fiqa_helpers.base import WorkshopError
from fiqa_helpers.machinery import checkpoints

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
def killed(trainings, tmp_path_factory) -> Path:
    """Workdir of such a run, killed after its second checkpoint; copy it."""
    workdir = tmp_path_factory.mktemp("killed")
    process = trainings.start(workdir, overrides=SHORT)
    wait_for_step(trainings, workdir, process, 4)
    os.kill(process, signal.SIGKILL)
    assert trainings.wait() == -signal.SIGKILL
    return workdir


def run_folder(workdir: Path) -> Path:
    return workdir / "checkpoints" / "run"


def wait_for_step(trainings, workdir: Path, process: int, step: int) -> None:
    """Until the checkpoint of `step` is complete."""
    manifest = checkpoints.checkpoint_folder(run_folder(workdir), step) / checkpoints.MANIFEST
    while not manifest.is_file():
        assert trainings.alive(process), trainings.log.read_text()


def test_three_kills_change_nothing(trainings, unkilled, tmp_path):
    """Killed while training, writing a checkpoint and sampling: the same adapter and losses, bit by bit."""
    moments, hits = random.Random(7), []
    for phase, longest in (("training", 0.5), ("saving", 0.01), ("sampling", 0.05)):
        hits.append(trainings.kill_in(tmp_path, phase, moments.uniform(0, longest), overrides=SHORT))
    assert all(hits), hits
    trainings.run(tmp_path, overrides=SHORT)
    assert result(tmp_path) == result(unkilled)


def test_two_resumes_in_a_row_from_one_checkpoint(trainings, unkilled, killed, tmp_path):
    """A resumed run that dies before its next checkpoint leaves the old one usable."""
    shutil.copytree(killed, tmp_path / "run")
    process = trainings.start(tmp_path / "run", overrides=SHORT)
    while "resuming from checkpoint-4" not in trainings.log.read_text():
        assert trainings.alive(process), trainings.log.read_text()
    os.kill(process, signal.SIGKILL)
    trainings.wait()
    assert "resuming from checkpoint-4" in trainings.run(tmp_path / "run", overrides=SHORT)
    assert result(tmp_path / "run") == result(unkilled)


def test_killed_between_the_files_and_the_manifest(trainings, unkilled, tmp_path):
    """Where only one checkpoint is kept, the old one must not go before the new one is vouched for."""
    job = {"overrides": SHORT, "save_total_limit": 1}
    trainings.start(tmp_path, dies_before_manifest_of="checkpoint-4", **job)
    assert trainings.wait() == -signal.SIGKILL
    said = trainings.run(tmp_path, **job)
    assert "checkpoint-4 is not used: it has no manifest" in said and "resuming from checkpoint-2" in said
    assert result(tmp_path) == result(unkilled)
    assert (run_folder(tmp_path) / "set_aside").is_dir()


def test_killed_after_its_last_step(trainings, unkilled, tmp_path):
    """All is trained and the adapter not saved yet: transformers would add a ninth step to the eight."""
    shutil.copytree(unkilled, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "final_model")
    assert "resuming from checkpoint-8" in trainings.run(tmp_path / "run", overrides=SHORT)
    assert checkpoints.steps_of(run_folder(tmp_path / "run"))[0] == 8
    assert result(tmp_path / "run") == result(unkilled)


def test_sums_between_two_logs_survive(trainings, tmp_path):
    """On resume transformers forgets the losses since the last log: the next logged mean would be wrong."""
    job = {"overrides": SHORT, "logging_steps": 3}
    trainings.run(tmp_path / "a", **job)
    process = trainings.start(tmp_path / "b", **job)
    wait_for_step(trainings, tmp_path / "b", process, 4)  # one step after a log
    os.kill(process, signal.SIGKILL)
    trainings.wait()
    assert "resuming from checkpoint-" in trainings.run(tmp_path / "b", **job)
    assert result(tmp_path / "b") == result(tmp_path / "a")


@pytest.mark.parametrize("damage", ["truncated", "bit-flipped", "missing", "no manifest"])
def test_resume_over_a_damaged_checkpoint(trainings, unkilled, killed, tmp_path, damage):
    """The newest checkpoint is damaged: the one before gives the same end."""
    workdir = tmp_path / "run"
    shutil.copytree(killed, workdir)
    newest = checkpoints.newest_complete(run_folder(workdir))
    file = newest / "optimizer.pt"
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "bit-flipped":
        content[len(content) // 3] ^= 16
        file.write_bytes(content)
    else:
        (file if damage == "missing" else newest / checkpoints.MANIFEST).unlink()
    said = trainings.run(workdir, overrides=SHORT)
    assert f"{newest.name} is not used: " in said and "resuming from checkpoint-2" in said
    assert result(workdir) == result(unkilled)
    assert len(list((run_folder(workdir) / "set_aside").iterdir())) == 1


def test_moved_workspace_takes_its_best_adapter_along(trainings, unkilled, tmp_path):
    """trainer_state.json names the best checkpoint by an absolute path, which means nothing after a move."""
    job = {"overrides": SHORT}
    process = trainings.start(tmp_path / "old", **job)
    wait_for_step(trainings, tmp_path / "old", process, 6)
    os.kill(process, signal.SIGKILL)
    trainings.wait()
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    for adapter in (tmp_path / "old").rglob("adapter_model.safetensors"):
        adapter.write_bytes(b"what is left at the old place must not be read")
    trainings.run(tmp_path / "new", **job)
    assert result(tmp_path / "new") == result(unkilled)


def test_damaged_best_checkpoint_is_not_loaded_at_the_end(trainings, killed, tmp_path):
    """A best checkpoint that broke gives way to the best of the intact ones, and the run says so."""
    workdir = tmp_path / "run"
    shutil.copytree(killed, workdir)
    best = checkpoints.checkpoint_folder(run_folder(workdir), 2)
    state = run_folder(workdir) / "checkpoint-4" / "trainer_state.json"
    text = state.read_text().replace('checkpoint-4"', 'checkpoint-2"')
    assert text != state.read_text(), "checkpoint-4 was not the best: the test needs another seed"
    state.write_text(text)
    checkpoints.write_manifest(state.parent)
    (best / "adapter_model.safetensors").unlink()
    said = trainings.run(workdir, overrides=SHORT)
    assert "checkpoint-2 is not used: adapter_model.safetensors is missing" in said
    assert "The best adapter was in checkpoint-2; of those intact it is checkpoint-4" in said
    assert result(workdir)["best"] != "checkpoint-2"


def test_sigterm_writes_a_checkpoint_and_says_how_to_go_on(trainings, unkilled, tmp_path):
    """A job whose time is over gets SIGTERM: at most the step in hand may be lost, and nothing changes."""
    process = trainings.start(tmp_path, overrides=SHORT)
    wait_for_step(trainings, tmp_path, process, 2)
    os.kill(process, signal.SIGTERM)
    assert trainings.wait() == 1
    last = trainings.log.read_text().splitlines()[-1]
    newest = checkpoints.newest_complete(run_folder(tmp_path))
    step = newest.name.removeprefix("checkpoint-")
    assert last == (
        f"WorkshopError: Training was told to stop (SIGTERM) after step {step} of 8: run this again with the "
        f"same parameters and it goes on from {newest.name}."
    )
    assert f"resuming from {newest.name}" in trainings.run(tmp_path, overrides=SHORT)
    assert result(tmp_path) == result(unkilled)


def test_out_of_memory_gives_advice_and_keeps_the_checkpoint(trainings, unkilled, killed, tmp_path):
    """The allocator's traceback says nothing to a person; the last checkpoint must still be good."""
    workdir = tmp_path / "run"
    shutil.copytree(killed, workdir)
    trainings.start(workdir, overrides=SHORT, megabytes_more=20)
    assert trainings.wait() == 1
    said = trainings.log.read_text().splitlines()[-1]
    assert said.startswith(
        "WorkshopError: Memory ran out at step 4: lower tokens_per_batch (for example 128) or set "
    )
    assert said.endswith("checkpoint-4 is intact and the next run goes on from it.")
    trainings.run(workdir, overrides=SHORT)
    assert result(workdir) == result(unkilled)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("learning_rate: 1e-3", "learning_rate was 0.002 and is now 0.001"),
        ("lora_dropout: 0.1", "lora_dropout was 0.05 and is now 0.1"),
        ("train_rows: 8", "train_rows was 9 and is now 8"),
        ("model: packaged", "model was 'random' and is now 'packaged'"),
        ("prompt: chat", "prompt was 'plain' and is now 'chat'"),
    ],
)
def test_killed_run_is_not_resumed_as_another(trainings, killed, tmp_path, change, named):
    """Half of a run with one recipe and half with another; nothing may be computed or written."""
    shutil.copytree(killed, tmp_path / "run")
    name = change.split(":")[0]
    kept = [part for part in SHORT.strip("{}").split(", ") if not part.startswith(name)]
    trainings.start(tmp_path / "run", overrides="{" + ", ".join([*kept, change]) + "}")
    assert trainings.wait() == 1
    said = trainings.log.read_text().splitlines()[-1]
    assert said.startswith("WorkshopError: checkpoints/run holds a run with other settings") and named in said
    assert checkpoints.newest_complete(run_folder(tmp_path / "run")).name == "checkpoint-4"


# -- in this process: losses, and losses that are no number


@pytest.fixture
def make_trainer(tiny_tokenizer, fiqa_rows, tmp_path):
    """A function (profile changes, training arguments) -> trainer over ten real rows."""
    import datasets
    from peft import get_peft_model
    from transformers import TrainingArguments

    from fiqa_helpers import model, profiles, trainer
    from fiqa_helpers.rows import StepCollator, encode_rows

    def make(arguments: dict | None = None, rows: int = 10, **changes):
        profile = replace(profiles.load_profile("tiny"), **changes)
        encoded = encode_rows(datasets.Dataset.from_list(fiqa_rows[:rows]), tiny_tokenizer, profile)
        values = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": profile.batch_size,
            "per_device_eval_batch_size": 4,
            "max_steps": 3,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "remove_unused_columns": False,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
        } | (arguments or {})
        return trainer.AnswerTrainer(
            model=get_peft_model(model.load_base(profile), model.lora_config(profile)),
            args=TrainingArguments(**values),
            train_dataset=encoded,
            eval_dataset=encoded,
            data_collator=StepCollator(tiny_tokenizer.pad_token_id, profile.tokens_per_batch, profile.layout),
        )

    return make


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("batch", [1, 3, 10])
def test_validation_loss_is_a_mean_over_tokens_whatever_the_batches(make_trainer, layout, batch):
    """A mean of batch means moves with the batch size; ours must equal a loop over single rows."""
    import torch

    trainer = make_trainer({"per_device_eval_batch_size": batch}, layout=layout, tokens_per_batch=300)
    total, tokens = 0.0, 0
    trainer.model.eval()
    for row in trainer.eval_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = trainer.model(input_ids=ids).logits
        flat = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
        total, tokens = total + flat.item(), tokens + int((labels != -100).sum())
    measured = trainer.evaluate()
    assert measured["eval_tokens"] == tokens
    assert measured["eval_loss"] == pytest.approx(total / tokens, abs=1e-5)


def test_poisoned_row_is_named_and_the_adapter_before_it_kept(make_trainer, tmp_path):
    """One bad value turns every later weight into NaN: stop before the optimizer's step."""
    import torch
    from safetensors.torch import load_file

    trainer = make_trainer({"max_steps": 10, "per_device_train_batch_size": 2, "learning_rate": 1e-3})
    rows = [set(row) for row in trainer.train_dataset["input_ids"]]
    bad, token = next((i, min(own)) for i, own in own_tokens(rows))
    embeddings, head = trainer.model.get_input_embeddings(), trainer.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # no longer shared
    with torch.no_grad():
        embeddings.weight[token] = float("nan")
    with pytest.raises(WorkshopError) as error:
        trainer.train()
    step = trainer.state.global_step
    said = str(error.value)
    assert said.startswith(f"The loss is nan at step {step + 1} (rows [") and f"{bad}" in said.split("]")[0]
    assert f"the adapter of step {step} is kept in " in said
    kept = load_file(tmp_path / "run" / "last_good_adapter" / "adapter_model.safetensors")
    assert kept and all(tensor.isfinite().all() for tensor in kept.values())
    weights = [p for name, p in trainer.model.named_parameters() if "lora_" in name]
    assert all(weight.isfinite().all() for weight in weights)


def own_tokens(rows: list[set]) -> list[tuple[int, set]]:
    """(row, tokens that no other row has) for the rows that have such tokens."""
    found = []
    for i, row in enumerate(rows):
        own = row.difference(*(other for j, other in enumerate(rows) if j != i))
        if own:
            found.append((i, own))
    return found


def test_infinite_gradient_stops_before_the_optimizer(make_trainer):
    """A finite loss can have a gradient that is not: clipping would turn it into NaN weights."""
    trainer = make_trainer()
    weight = next(p for name, p in trainer.model.named_parameters() if "lora_B" in name)
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(WorkshopError, match=r"The gradient's norm is (nan|inf) at step 1 \(rows \["):
        trainer.train()
    assert weight.isfinite().all()


@pytest.mark.slow
def test_exploding_loss_stops_and_no_exploded_adapter_is_saved(make_trainer, tmp_path):
    """A learning rate far too high for the real model: stop, and leave no checkpoint of what came after."""
    arguments = {
        "max_steps": 30,
        "per_device_train_batch_size": 2,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 1,
    }
    trainer = make_trainer(arguments, model="packaged")
    with pytest.raises(WorkshopError) as error:
        trainer.train()
    assert "The loss has exploded" in str(error.value) and "lower learning_rate" in str(error.value)
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    saved = checkpoints.steps_of(tmp_path / "run")
    assert saved and all(losses[step] <= trainer.guard.limit for step in saved)
    assert f"checkpoint-{saved[0]}" in str(error.value)


def test_out_of_memory_in_the_optimizer_gives_advice(make_trainer):
    """AdamW takes its memory at the first step, after all forward passes went well."""
    import torch

    trainer = make_trainer()
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda *_: torch.empty(2**50))  # more than there is anywhere
    with pytest.raises(
        WorkshopError, match="Memory ran out at step 0: lower tokens_per_batch .* no checkpoint"
    ):
        trainer.train()


def test_sigterm_while_the_loss_explodes_promises_no_checkpoint(make_trainer, tmp_path):
    """An exploding adapter is not saved, so the sentence must not name the checkpoint of that step."""
    trainer = make_trainer({"max_steps": 10, "save_strategy": "steps", "save_steps": 5})
    trainer.guard.limit = 0.0  # every loss counts as exploded
    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(WorkshopError, match=r"\(SIGTERM\) after step 1 of 10: .* and it begins anew\."):
        trainer.train()
    assert checkpoints.steps_of(tmp_path / "run") == []


def test_guard_forgives_a_single_bad_step():
    """One hard batch is no explosion."""
    from fiqa_helpers.trainer import LossGuard

    guard = LossGuard(vocabulary=1000)
    high = math.log(1000) + 2
    assert [guard.exploded(x) for x in (3.0, high, high, 3.0, high, high, high)] == [False] * 6 + [True]


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 1e-4), ("max_steps", 5), ("seed", 3), ("per_device_train_batch_size", 2)],
)
def test_checkpoint_with_other_training_arguments_is_refused(make_trainer, tmp_path, name, value):
    """Arguments changed in the notebook's own cell, past the profile, are noticed too."""
    trainer = make_trainer({"save_strategy": "steps", "save_steps": 2, "max_steps": 2})
    trainer.train()
    changed = make_trainer({"max_steps": 2, name: value})
    with pytest.raises(WorkshopError, match=rf"{name} was .* and is now {value}"):
        changed.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora_alpha": 64}, "lora_alpha was 32 and is now 64"),
        ({"lora_targets": ("q_proj",)}, "lora_targets was .* and is now .*q_proj"),
        ({"rows": 9}, r"the train rows changed \(train_sha256\)"),
        ({"prompt": "chat"}, r"the train rows changed \(train_sha256\)"),
    ],
)
def test_checkpoint_of_another_adapter_or_other_rows_is_refused(make_trainer, tmp_path, changes, named):
    """A LoRA config or rows changed in a cell: PEFT would load the weights and scale them anew in silence."""
    make_trainer({"save_strategy": "steps", "save_steps": 2, "max_steps": 2}).train()
    with pytest.raises(WorkshopError, match=f"checkpoint-2 was written with other .*{named}"):
        make_trainer({"max_steps": 2}, **changes).train(resume_from_checkpoint=tmp_path / "run/checkpoint-2")


def test_training_over_newer_checkpoints_is_refused(make_trainer, tmp_path):
    """The training cell is run twice in one kernel: step 0 again, over checkpoints of the first time."""
    trainer = make_trainer({"save_strategy": "steps", "save_steps": 1, "max_steps": 3})
    trainer.train()
    for begin in (None, tmp_path / "run" / "checkpoint-1"):
        with pytest.raises(
            WorkshopError,
            match="run holds checkpoint-3 and this would begin at (step 0|checkpoint-1): restart",
        ):
            trainer.train(resume_from_checkpoint=begin)


def test_pickle_that_is_never_read(make_trainer, tmp_path):
    """training_args.bin is the one pickle in a checkpoint: a resume must not open it."""
    make_trainer({"save_strategy": "steps", "save_steps": 2, "max_steps": 2}).train()
    folder = tmp_path / "run" / "checkpoint-2"
    (folder / "training_args.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    checkpoints.write_manifest(folder)
    make_trainer({"max_steps": 2}).train(resume_from_checkpoint=folder)
    assert not (tmp_path / "ran").exists()


class Bomb:
    """A pickle that writes a file where it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickle_in_a_checkpoint_is_refused(make_trainer, tmp_path, name):
    """A checkpoint that somebody sent: code in it must not run, and the reader gets a sentence."""
    make_trainer({"save_strategy": "steps", "save_steps": 2, "max_steps": 2}).train()
    folder = tmp_path / "run" / "checkpoint-2"
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
    again = make_trainer({"max_steps": 2} | ({"max_steps": 3} if name == "rng_state.pth" else {}))
    if name == "rng_state.pth":  # read at the first step after the resume
        edit_totals(folder, max_steps=3)
    checkpoints.write_manifest(folder)
    with pytest.raises(WorkshopError, match="checkpoint-2 holds something else than tensors"):
        again.train(resume_from_checkpoint=folder)
    assert not (tmp_path / "ran").exists()


def edit_totals(folder: Path, **arguments: object) -> None:
    totals = json.loads((folder / "totals.json").read_text())
    totals["arguments"] |= arguments
    (folder / "totals.json").write_text(json.dumps(totals))


@pytest.mark.cuda
def test_cuda_out_of_memory_gives_advice(make_trainer):
    """The GPU's own allocator, limited to next to nothing."""
    import torch

    trainer = make_trainer({"use_cpu": False})
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(WorkshopError, match="Memory ran out at step 0: lower tokens_per_batch"):
            trainer.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
