"""Recipes that really run on this machine's CPU: packed, one process, two with gloo, killed, resumed."""

import functools
import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
from notebook_trainer import notebook_trainer
from recipe_bench import kill_all
from recipe_child import FSDP2, changes, same_start

from fiqa_helpers import data, model
from fiqa_helpers.base import WorkshopError, Workspace
from fiqa_helpers.machinery import recipe
from fiqa_helpers.machinery.live import LivePanel
from fiqa_helpers.machinery.recipe import read_metrics, run_recipe, why_it_failed
from fiqa_helpers.profiles import load_profile
from fiqa_helpers.rows import StepCollator, encode_rows, pad_rows

STEPS = 4
TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(profile tiny without dropout, which processes draw each for themselves; workspace; base folder)."""
    workspace = Workspace(str(tmp_path_factory.mktemp("recipe_run")))
    data.write_processed(data.load_fiqa("packaged"), workspace.data)
    profile = load_profile("tiny", f"{{max_steps: {STEPS}, lora_dropout: 0.0, learning_rate: 0.02}}")
    return profile, workspace, model.model_path(profile)


@pytest.fixture(scope="module", autouse=True)
def class_of_the_recipe(place):
    """A function that names another recipe class in the file: NeMo reads it before what stands behind."""
    text, patch = recipe.recipe_file().read_text(), pytest.MonkeyPatch()
    assert "recipe: fiqa_helpers.machinery.recipe.FiqaRecipe" in text
    # torchrun's processes must find tests/recipe_child.py
    patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))

    def use(name: str) -> None:
        file = place[1].root / f"{name}.yaml"
        file.write_text(text.replace("fiqa_helpers.machinery.recipe.FiqaRecipe", f"recipe_child.{name}"))
        patch.setattr(recipe, "recipe_file", lambda: file)

    use("SameStart")
    yield use
    patch.undo()


def panel(title: str) -> LivePanel:
    return LivePanel([], lambda questions: [], 0, title)


def behind(place, name: str, processes: int, *more: str) -> list[str]:
    """What stands behind the file for a run `name`, with an Adam that doesn't blow up the rounding of zeros.

    With eps 1e-8 Adam takes a full step for any gradient, also for one that is only rounding. A pass may hold
    one row's tokens, so that steps take several passes, and not the same number on each process.
    """
    profile, workspace, base = place
    made = changes(profile, workspace.data, base, workspace.root / name, processes)
    return [*made, "--optimizer.eps=1.0e-2", "--packing.tokens_per_pass=200", *more]


@pytest.fixture(scope="module")
def runs(place):
    """runs(name): (panel, adapter) of a run: one process, two with the base each (ddp), two that share it."""

    @functools.cache
    def finished(name: str):
        processes, more = {"one": (1, []), "two": (2, []), "shared": (2, FSDP2)}[name]
        shown = panel(name)
        return shown, run_recipe(behind(place, name, processes, *more), shown, processes)

    return finished


TWICE = ["two", pytest.param("shared", marks=pytest.mark.slow)]


def tensors(adapter: Path) -> dict:
    """The adapter's matrices by name."""
    from safetensors.torch import load_file

    return load_file(adapter / "adapter_model.safetensors")


def losses(shown: LivePanel) -> list[float]:
    return [row["loss"] for row in shown.history if "loss" in row]


def test_metrics_of_every_step(place, runs):
    """NeMo keeps a hundred records back and logs the next step's rate: the panel would be empty or wrong."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown, _ = runs("one")
    assert shown.outcome == f"finished {STEPS} steps"
    assert [row["step"] for row in shown.history] == [1, 2, 3, 4]
    peak = place[0].learning_rate
    assert [row["learning_rate"] for row in shown.history] == pytest.approx([0, peak, peak * 2 / 3, peak / 3])
    assert [row["step"] for row in shown.history if "eval_loss" in row] == [2, 4]
    assert all(0.1 < row["memory_gib"] < 20 for row in shown.history)
    assert max(row["passes"] for row in shown.history) > 1
    board = EventAccumulator(str(place[1].root / "one" / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(losses(shown))
    assert len(board.Scalars("validation/val_loss")) == 2


@pytest.mark.parametrize("name", ["one", *TWICE])
def test_peft_has_the_recipes_validation_loss(name, place, runs):
    """A wrong scale or a layer left out would still load; only the loss knows. Every matrix has its layer."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    profile, workspace, base = place
    shown, adapter = runs(name)
    tokenizer = model.load_tokenizer(profile)
    rows = data.read_processed(workspace.data)["validation"].take(profile.eval_rows)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    loaded = {n.replace(".default", "") for n, _ in tuned.named_parameters() if "lora_" in n}
    assert loaded == tensors(adapter).keys()
    batch = pad_rows(list(encode_rows(rows, tokenizer, profile)), tokenizer.pad_token_id)
    with torch.no_grad():
        found = tuned(**batch).loss.item()
        with tuned.disable_adapter():
            untuned = tuned(**batch).loss.item()
    assert found == pytest.approx(shown.history[-1]["eval_loss"], rel=1e-5)
    assert abs(untuned - found) > 1e-3


def test_losses_and_adapter_are_the_trainers(place, runs, tmp_path):
    """The whole of it: notebook 04's Trainer from the same start, step by step, to the same adapter."""
    import torch

    profile, workspace, _ = place
    tokenizer = model.load_tokenizer(profile)
    rows = encode_rows(
        data.read_processed(workspace.data)["train"].take(profile.train_rows), tokenizer, profile
    )
    collator = StepCollator(tokenizer.pad_token_id, profile.tokens_per_batch, "padded")
    base = model.tiny_model(tokenizer)
    trainer = notebook_trainer(profile, tmp_path, base, collator, rows, adam_epsilon=1e-2)  # as in `behind`
    same_start(trainer.model)
    trainer.train()
    found = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert found == pytest.approx(losses(runs("one")[0]), rel=1e-5)
    trained, saved = dict(trainer.model.named_parameters()), tensors(runs("one")[1])
    for name, matrix in saved.items():
        mine = trained[name.replace(".weight", ".default.weight")].detach()
        assert torch.allclose(mine, matrix, atol=1e-5), name
    assert max(matrix.abs().max() for name, matrix in saved.items() if "lora_B" in name) > 1e-3


@pytest.mark.parametrize("name", TWICE)
def test_two_processes_are_one(name, place, runs):
    """Two real processes share the rows, and the weights too: losses and adapters must not know."""
    shown, adapter = runs(name)
    assert losses(shown) == pytest.approx(losses(runs("one")[0]), rel=1e-5)
    assert losses(shown)[-1] < losses(shown)[0] - 1e-3, "nothing was learned: equality would show nothing"
    single, double = tensors(runs("one")[1]), tensors(adapter)
    assert single.keys() == double.keys()
    for key in single:
        assert double[key].shape == single[key].shape
        assert (double[key] - single[key]).abs().max() < 1e-5, key
    assert "torch distributed with 2 workers" in (place[1].root / name / "run.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["two", "shared"])
def test_continues_from_its_checkpoint(name, place, runs):
    """Two processes, killed (SIGKILL) after a checkpoint: started again, they end with the same adapter."""
    whole = runs(name)
    more = FSDP2 if name == "shared" else []
    folder = place[1].root / f"killed_{name}"
    behind_it = behind(place, folder.name, 2, *more)
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen(recipe.launch(behind_it, 2), stdout=nowhere, stderr=nowhere)
        while process.poll() is None and not (folder / "LATEST").exists():
            time.sleep(0.05)
        kill_all(process)
    assert (folder / "LATEST").readlink().name == "epoch_0_step_1"
    with pytest.raises(WorkshopError, match="holds a run"):
        run_recipe(behind_it, panel("by accident"), 2)
    subprocess.run(recipe.launch(behind_it, 2), check=True, capture_output=True, timeout=300)
    found = [row["loss"] for row in read_metrics(folder)]
    assert found[2:] == pytest.approx(losses(whole[0])[2:], rel=1e-6)
    before, after = tensors(whole[1]), tensors(folder / "LATEST" / "model")
    assert max((after[key] - before[key]).abs().max().item() for key in before) < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_one_rank_out_of_memory_ends_the_run(place, class_of_the_recipe):
    """On two GPUs one rank ran out of memory, and the run went on doing nothing until it was killed."""
    class_of_the_recipe("OneRankFails")
    shown = panel("fails")
    try:
        with pytest.raises(WorkshopError, match="OutOfMemoryError.*activation_checkpointing"):
            run_recipe(behind(place, "one_rank_fails", 2), shown, 2)
    finally:
        class_of_the_recipe("SameStart")
    assert [row["step"] for row in shown.history] == [1]


def test_causes_are_found(tmp_path):
    """The first error is the cause; torchrun's own comes last and says nothing."""
    log = tmp_path / "run.log"
    log.write_text(
        "[rank1]: Traceback (most recent call last):\n"
        "[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    )
    assert why_it_failed(log).startswith("The recipe failed (OutOfMemoryError: CUDA out of memory")
    log.write_text("killed\n")
    assert "no error in its log" in why_it_failed(log)


def test_half_a_line_of_metrics_waits(tmp_path):
    """The file is read while it is written; and a step that a resumed run repeats counts once."""
    record = dict(loss=2.0, lr=0.0, tps=5.0, mem=1.0, steps=3, num_tokens_per_step=10, passes=1)
    lines = [
        json.dumps(record | {"step": step, "loss": loss}) for step, loss in ((0, 3.0), (1, 2.0), (1, 1.0))
    ]
    (tmp_path / "training.jsonl").write_text("\n".join(lines) + '\n{"step": 2, "lo')
    (tmp_path / "validation.jsonl").write_text('{"step": 1, "val_loss": 9.0}\n')
    found = read_metrics(tmp_path)
    assert [(row["step"], row["loss"]) for row in found] == [(1, 3.0), (2, 1.0)]
    assert found[1]["eval_loss"] == 9.0


@pytest.mark.slow
def test_stop_saves_a_checkpoint(place):
    """Stop sends SIGTERM, as Slurm does before the time is up: NeMo must save after the step, and all end."""
    long = ["--step_scheduler.max_steps=500", "--step_scheduler.ckpt_every_steps=500"]
    shown, folder = panel("to be stopped"), place[1].root / "stopped"

    def press_stop() -> None:
        ends = time.monotonic() + 300
        while not read_metrics(folder) and time.monotonic() < ends:
            time.sleep(0.1)
        shown.stop.set()

    person = threading.Thread(target=press_stop)
    person.start()
    adapter = run_recipe(behind(place, "stopped", 1, *long), shown)
    person.join()
    assert shown.stopped == "Stop button"
    assert 1 <= shown.step < 500
    assert tensors(adapter)
    assert adapter.parent.name.endswith(f"_step_{shown.step - 1}"), (
        "the step at hand is the one that is saved"
    )
