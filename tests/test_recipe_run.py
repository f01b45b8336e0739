"""Recipes that really run on this machine's CPU: one process, two with FSDP2 and gloo, killed, resumed."""

import json
import os
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fiqa_helpers import data, model
from fiqa_helpers.base import WorkshopError, Workspace
from fiqa_helpers.machinery import recipe
from fiqa_helpers.machinery.recipe import (
    RecipePanel,
    check_recipe,
    newest_adapter,
    read_metrics,
    run_recipe,
    why_it_failed,
)
from fiqa_helpers.profiles import load_profile
from fiqa_helpers.rows import StepCollator, encode_rows, pad_rows
from fiqa_helpers.run import Run

STEPS = 4
TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Profile tiny without dropout, which processes draw each for themselves."""
    workspace = Workspace(str(tmp_path_factory.mktemp("recipe_run")))
    data.write_processed(data.load_with_report("packaged")[0], workspace.data)
    profile = load_profile("tiny", f"{{max_steps: {STEPS}, lora_dropout: 0.0, learning_rate: 0.02}}")
    return Run("07", {}, profile, workspace)


@pytest.fixture(scope="module", autouse=True)
def child_on_the_path():
    """torchrun's processes must find tests/recipe_child.py, and this one must for the check."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), before]))
    sys.path.insert(0, str(TESTS))
    yield
    sys.path.remove(str(TESTS))
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


def make(run, name: str, processes: int) -> Path:
    """A recipe whose adapters begin alike, with an Adam that does not blow up the rounding of zeros.

    With eps 1e-8 Adam takes a full step for any gradient, also for one that is only rounding.
    """
    folder = run.workspace.root / name
    path = recipe.write_recipe(run, folder / "r.yaml", folder / "out", processes)
    text = path.read_text()
    for before, after in (
        ("fiqa_helpers.machinery.recipe_run.FiqaRecipe", "recipe_child.SameStart"),
        ("eps: 1.0e-8", "eps: 1.0e-2"),
    ):
        assert before in text
        text = text.replace(before, after)
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def one(run):
    """One process: (recipe, panel, adapter)."""
    path = make(run, "one", 1)
    panel = RecipePanel("one process", live=False)
    return path, panel, run_recipe(path, panel, 1, cpu=True)


@pytest.fixture(scope="module")
def two(run):
    """Two processes: (recipe, panel, adapter)."""
    path = make(run, "two", 2)
    panel = RecipePanel("two processes", live=False)
    return path, panel, run_recipe(path, panel, 2, cpu=True)


def tensors(adapter: Path) -> dict:
    """The adapter's matrices by name."""
    from safetensors.torch import load_file

    return load_file(adapter / "adapter_model.safetensors")


def test_metrics_of_every_step(run, one):
    """NeMo keeps a hundred records back and logs the next step's rate: the panel would be empty or wrong."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path, panel, _ = one
    assert panel.outcome == f"finished {STEPS} steps"
    assert [row["step"] for row in panel.history] == [1, 2, 3, 4]
    peak = run.profile.learning_rate
    assert [row["learning_rate"] for row in panel.history] == pytest.approx([0, peak, peak * 2 / 3, peak / 3])
    assert [row["step"] for row in panel.history if "eval_loss" in row] == [2, 4]
    assert all(0.1 < row["memory_gib"] < 20 for row in panel.history)
    board = EventAccumulator(str(path.parent / "out" / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(
        [row["loss"] for row in panel.history]
    )
    assert len(board.Scalars("validation/val_loss")) == 2


def test_adapter_loads_with_peft(run, one):
    """Every matrix must find its layer: PEFT leaves out what it doesn't know and goes on."""
    import torch
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    _, _, adapter = one
    base = AutoModelForCausalLM.from_pretrained(run.workspace.root / "one" / "random_model")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        tuned = PeftModel.from_pretrained(base, adapter)
        after = tuned(input_ids=ids).logits
    assert (after - before).abs().max() > 1e-4
    saved = tensors(adapter)
    loaded = {n.replace(".default", ""): p for n, p in tuned.named_parameters() if "lora_" in n}
    assert saved.keys() == loaded.keys()
    assert all(saved[name].equal(loaded[name].detach()) for name in saved)
    assert all(saved[name].abs().max() > 0 for name in saved if "lora_B" in name)
    ours = get_peft_model(model.tiny_model(model.load_tokenizer(run.profile)), model.lora_config(run.profile))
    assert {n.replace(".default", "") for n, p in ours.named_parameters() if p.requires_grad} == saved.keys()


@pytest.mark.parametrize("name", ["one", pytest.param("two", marks=pytest.mark.slow)])
def test_peft_has_the_recipes_validation_loss(name, run, request):
    """A wrong scale or a layer left out would still load; only the loss knows."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, panel, adapter = request.getfixturevalue(name)
    tokenizer = model.load_tokenizer(run.profile)
    rows = data.read_processed(run.workspace.data)["validation"].select(range(run.profile.eval_rows))
    rows = encode_rows(rows, tokenizer, run.profile)
    base = AutoModelForCausalLM.from_pretrained(run.workspace.root / name / "random_model")
    tuned = PeftModel.from_pretrained(base, adapter)
    batch = pad_rows(list(rows), tokenizer.pad_token_id)
    with torch.no_grad():
        found = tuned(**batch).loss.item()
        with tuned.disable_adapter():
            untuned = tuned(**batch).loss.item()
    assert found == pytest.approx(panel.history[-1]["eval_loss"], rel=1e-5)
    assert abs(untuned - found) > 1e-3


def test_losses_and_adapter_are_the_trainers(run, one, tmp_path):
    """The whole of it: notebook 04's Trainer from the same start, step by step, to the same adapter."""
    import torch
    from peft import get_peft_model
    from recipe_child import same_start
    from transformers import TrainingArguments

    from fiqa_helpers.trainer import AnswerTrainer

    profile, tokenizer = run.profile, model.load_tokenizer(run.profile)
    rows = data.read_processed(run.workspace.data)["train"].take(profile.train_rows)
    tuned = get_peft_model(model.tiny_model(tokenizer), model.lora_config(profile))
    same_start(tuned)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=profile.batch_size,
        max_steps=STEPS,
        learning_rate=profile.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=profile.warmup_ratio,
        adam_epsilon=1e-2,  # as in `make`
        seed=profile.seed,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    )
    trainer = AnswerTrainer(
        model=tuned,
        args=arguments,
        train_dataset=encode_rows(rows, tokenizer, profile),
        data_collator=StepCollator(tokenizer.pad_token_id, profile.tokens_per_batch, "padded"),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses == pytest.approx([row["loss"] for row in one[1].history], rel=1e-5)
    trained, saved = dict(tuned.named_parameters()), tensors(one[2])
    for name, matrix in saved.items():
        mine = trained[name.replace(".weight", ".default.weight")].detach()
        assert torch.allclose(mine, matrix, atol=1e-5), name
    assert max(matrix.abs().max() for name, matrix in saved.items() if "lora_B" in name) > 1e-3


@pytest.mark.slow
def test_the_log_says_why(run, tmp_path):
    """A run that fails in its processes ends in one sentence with the cause, not with torchrun's summary."""
    path = recipe.write_recipe(
        replace(run, profile=replace(run.profile, max_steps=1)), tmp_path / "r.yaml", tmp_path / "out"
    )
    panel = RecipePanel("to fail", live=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tensorboard").touch()  # a file where a folder is wanted
    with pytest.raises(WorkshopError, match=r"The recipe failed \((FileExists|NotADirectory)Error.*run.log"):
        run_recipe(path, panel, 1, cpu=True)
    assert panel.failed is not None


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_one_rank_out_of_memory_ends_the_run(run):
    """On two GPUs one rank ran out of memory, and the run went on doing nothing until it was killed."""
    path = make(run, "one_rank_fails", 2)
    path.write_text(path.read_text().replace("recipe_child.SameStart", "recipe_child.OneRankFails"))
    panel = RecipePanel("fails", live=False)
    with pytest.raises(WorkshopError, match="OutOfMemoryError.*activation_checkpointing"):
        run_recipe(path, panel, 2, cpu=True)
    assert [row["step"] for row in panel.history] == [1]


def test_causes_are_found(tmp_path):
    """The first error is the cause; torchrun's own comes last and says nothing."""
    log = tmp_path / "run.log"
    log.write_text(
        "ValueError: of an earlier run\n"
        "[rank1]: Traceback (most recent call last):\n"
        "[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    )
    said = why_it_failed(log, began=len("ValueError: of an earlier run\n"))
    assert said.startswith("The recipe failed (OutOfMemoryError: CUDA out of memory")
    log.write_text("killed\n")
    assert "last lines" in why_it_failed(log)


def test_half_a_line_of_metrics_waits(tmp_path):
    """The file is read while it is written; and a step that a resumed run repeats counts once."""
    record = {
        "step": 0,
        "loss": 2.0,
        "lr": 0.0,
        "tps": 5.0,
        "mem": 1.0,
        "steps": 3,
        "num_tokens_per_step": 10,
    }
    lines = [
        json.dumps(record | {"step": step, "loss": loss}) for step, loss in ((0, 3.0), (1, 2.0), (1, 1.0))
    ]
    (tmp_path / "training.jsonl").write_text("\n".join(lines) + '\n{"step": 2, "lo')
    (tmp_path / "validation.jsonl").write_text('{"step": 1, "val_loss": 9.0}\n')
    found = read_metrics(tmp_path)
    assert [(row["step"], row["loss"]) for row in found] == [(1, 3.0), (2, 1.0)]
    assert found[1]["eval_loss"] == 9.0


def test_no_adapter_is_said(tmp_path):
    """A run that ended before its first checkpoint."""
    with pytest.raises(WorkshopError, match="holds no checkpoint"):
        newest_adapter(tmp_path)


def test_nothing_starts_with_a_broken_recipe(run, tmp_path):
    """The check runs before any process does."""
    path = recipe.write_recipe(run, tmp_path / "r.yaml", tmp_path / "out")
    path.write_text(path.read_text().replace("dim: 8", "dimension: 8"))
    with pytest.raises(WorkshopError, match="peft has no key dimension"):
        run_recipe(path, RecipePanel("never", live=False), 1, cpu=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_are_one(one, two):
    """FSDP2 shares weights and rows over two real processes: losses and adapters must not know."""
    losses = [[row["loss"] for row in panel.history] for _, panel, _ in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 1e-3, "nothing was learned, so equality would show nothing"
    single, shared = tensors(one[2]), tensors(two[2])
    assert single.keys() == shared.keys()
    for name in single:
        assert shared[name].shape == single[name].shape
        assert (shared[name] - single[name]).abs().max() < 1e-5, name
    log = (two[0].parent / "out" / "run.log").read_text()
    assert "initializing torch distributed with 2 workers" in log


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_continues_from_its_checkpoint(run, one, two, processes):
    """A run that ended at step 2 and goes on ends with the same adapter as one that was never stopped."""
    whole = {1: one, 2: two}[processes]
    folder = run.workspace.root / f"resumed{processes}"
    folder.mkdir()
    path = run.workspace.root / f"resumed{processes}.yaml"
    path.write_text(whole[0].read_text().replace(str(whole[0].parent / "out"), str(folder)))
    checkpoint = "epoch_0_step_1"
    shutil.copytree(whole[0].parent / "out" / checkpoint, folder / checkpoint)
    (folder / "LATEST").symlink_to(checkpoint)
    with pytest.raises(WorkshopError, match="holds a run"):
        run_recipe(path, RecipePanel("by accident", live=False), processes, cpu=True)
    panel = RecipePanel("resumed", live=False)
    adapter = run_recipe(path, panel, processes, cpu=True, resume=True)
    assert [row["step"] for row in panel.history] == [3, 4]
    expected = [row["loss"] for row in whole[1].history[2:]]
    assert [row["loss"] for row in panel.history] == pytest.approx(expected, rel=1e-6)
    before, after = tensors(whole[2]), tensors(adapter)
    assert max((after[name] - before[name]).abs().max().item() for name in before) < 1e-6


def test_another_models_run_is_not_continued(run, one, tmp_path):
    """NeMo would begin anew in silence, and fail when it saves over the old checkpoint."""
    path = tmp_path / "r.yaml"
    path.write_text(one[0].read_text().replace(str(one[0].parent / "random_model"), str(tmp_path / "model")))
    shutil.copytree(one[0].parent / "random_model", tmp_path / "model")
    with pytest.raises(WorkshopError, match="was made with the model .*random_model.*fresh_folder"):
        check_recipe(path, resume=True)
    assert check_recipe(one[0], resume=True).steps == STEPS


@pytest.mark.slow
def test_stop_saves_a_checkpoint(run, tmp_path):
    """Stop sends SIGTERM, as Slurm does before the time is up: NeMo must save after the step, and all end."""
    long = replace(run, profile=replace(run.profile, max_steps=500, eval_steps=500))
    path = recipe.write_recipe(long, tmp_path / "r.yaml", tmp_path / "out")
    panel = RecipePanel("to be stopped", live=False)

    def press_stop() -> None:
        ends = time.monotonic() + 300
        while not read_metrics(tmp_path / "out") and time.monotonic() < ends:
            time.sleep(0.1)
        panel.stop.set()

    person = threading.Thread(target=press_stop)
    person.start()
    adapter = run_recipe(path, panel, 1, cpu=True)
    person.join()
    assert panel.stopped == "Stop button"
    assert 1 <= panel.step < 500
    assert panel.outcome == f"stopped at step {panel.step} of 500 (Stop button)"
    assert tensors(adapter)
    assert adapter.parent.name.endswith(f"_step_{panel.step - 1}"), (
        "the step at hand is the one that is saved"
    )
