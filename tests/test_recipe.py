"""recipes/fiqa_lora.yaml is notebook 04's run: held against it, checked, run, killed and resumed."""

import functools
import math
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from notebook_trainer import notebook_trainer
from peft import PeftModel, get_peft_model
from recipe_child import same_start
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from fiqa_helpers import data, model
from fiqa_helpers.base import WorkshopError, Workspace
from fiqa_helpers.machinery import recipe
from fiqa_helpers.machinery.live import LivePanel
from fiqa_helpers.machinery.recipe import check_recipe, deal, packed_collate, run_recipe, shift, unpack
from fiqa_helpers.profiles import PROFILES, load_profile
from fiqa_helpers.rows import IGNORE_INDEX, StepCollator, encode_rows, pad_rows

TESTS = Path(__file__).resolve().parent
FILE = TESTS.parent / "recipes" / "fiqa_lora.yaml"
WRITTEN = yaml.safe_load(FILE.read_text())
BIG = PROFILES["gpu80"]
HUB_ROWS = 5500
# An epoch of three steps, the last of them not full, and one step more. Each process draws its own dropout.
TINY = "{max_steps: 4, train_rows: 10, lora_dropout: 0.0, learning_rate: 0.02}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(profile, workspace, folder of its random model); recipes that start here begin alike."""
    workspace = Workspace(str(tmp_path_factory.mktemp("recipe")))
    data.write_processed(data.load_fiqa("packaged"), workspace.data)
    profile = load_profile("tiny", TINY)
    with pytest.MonkeyPatch.context() as patch:
        # torchrun's processes must find tests/recipe_child.py
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
        use_class("SameStart", workspace.root, patch)
        yield profile, workspace, model.model_path(profile)


def use_class(name: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Name another recipe class in a copy of the file: NeMo reads it before what stands behind."""
    ours, file = WRITTEN["recipe"], folder / f"{name}.yaml"
    file.write_text(FILE.read_text().replace(f"recipe: {ours}", f"recipe: recipe_child.{name}"))
    patch.setattr(recipe, "recipe_file", lambda: file)


def behind(place, name: str, processes: int = 1, *more: str) -> list[str]:
    """What stands behind the file on a CPU for a run `name`.

    With eps 1e-8 Adam takes a full step for any gradient, also for one that is only rounding. A pass may hold
    one row's tokens, so that steps take several passes, and not the same number on each process.
    """
    profile, workspace, base = place
    values = {
        "model.pretrained_model_name_or_path": base,
        "model.torch_dtype": profile.dtype,
        "model.attn_implementation": "sdpa",
        "model.use_liger_kernel": False,
        "dist_env.backend": "gloo",
        "dataset.tokenizer.name": base,
        "dataset.rows": profile.train_rows,
        "validation_dataset.rows": profile.eval_rows,
        "packing.tokens_per_pass": 200,
        "step_scheduler.global_batch_size": profile.batch_size,
        "step_scheduler.local_batch_size": profile.batch_size // processes,
        "step_scheduler.max_steps": profile.max_steps,
        "step_scheduler.ckpt_every_steps": profile.eval_steps,
        "step_scheduler.val_every_steps": profile.eval_steps,
        "optimizer.lr": profile.learning_rate,
        "optimizer.eps": 1e-2,
        "lr_scheduler.lr_warmup_steps": 1,
        "peft.dropout": profile.lora_dropout,
        "checkpoint.checkpoint_dir": workspace.root / name,
    }
    for rows in ("dataset", "validation_dataset"):
        values |= {f"{rows}.folder": workspace.data, f"{rows}.max_length": profile.max_length}
    return [*(f"--{key}={value}" for key, value in values.items()), *more]


FSDP2 = [  # NeMo would compute in bf16 if its precision were not named
    "--distributed.strategy=fsdp2",
    "--distributed.mp_policy._target_=torch.distributed.fsdp.MixedPrecisionPolicy",
    "--distributed.mp_policy.param_dtype=float32",
]


# -- the file is notebook 04's run

KEYS = {  # each setting of a profile that a run depends on -> where the file has it
    "model": ["model.pretrained_model_name_or_path", "dataset.tokenizer.name"],
    "model_revision": ["model.revision", "dataset.tokenizer.revision"],
    "dtype": ["model.torch_dtype"],
    "max_length": ["dataset.max_length", "validation_dataset.max_length"],
    "tokens_per_batch": ["packing.tokens_per_pass"],
    "batch_size": ["step_scheduler.global_batch_size", "step_scheduler.local_batch_size"],
    "learning_rate": ["optimizer.lr"],
    "epochs": ["step_scheduler.num_epochs"],
    "lora_rank": ["peft.dim"],
    "lora_alpha": ["peft.alpha"],
    "lora_dropout": ["peft.dropout"],
    "gradient_checkpointing": ["distributed.activation_checkpointing"],
    "train_rows": ["dataset.rows"],
    "eval_rows": ["validation_dataset.rows"],
    "eval_steps": ["step_scheduler.ckpt_every_steps", "step_scheduler.val_every_steps"],
    "prompt": ["dataset.prompt", "validation_dataset.prompt"],
    "seed": ["seed"],
}


def test_the_file_is_profile_gpu80():
    """A setting changed in one of the two would make another run with the same name."""

    def value(key: str) -> object:
        return functools.reduce(dict.__getitem__, key.split("."), WRITTEN)

    for field, keys in KEYS.items():
        assert [value(key) for key in keys] == [getattr(BIG, field)] * len(keys)
    assert value("peft.target_modules") == [f"*.{name}" for name in BIG.lora_targets]
    assert (value("step_scheduler.max_steps"), BIG.max_steps) == (None, -1)
    assert value("validation_dataloader.batch_size") * BIG.max_length <= BIG.tokens_per_batch


def test_adapter_steps_and_learning_rates_of_the_reference(tmp_path, tiny_tokenizer):
    """NeMo matches patterns, PEFT name endings; NeMo alone rounds the warm-up down and ends above zero."""
    short = Dataset.from_dict({"question": ["Why?"] * HUB_ROWS, "ground_truths": [["So."]] * HUB_ROWS})
    data.write_processed(DatasetDict(train=short, validation=short.take(8), test=short.take(8)), tmp_path)
    where = [f"--{name}.folder={tmp_path}" for name in ("dataset", "validation_dataset")]
    report = check_recipe([*where, f"--checkpoint.checkpoint_dir={tmp_path}/out"], tokenizer=tiny_tokenizer)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(model.reference_config())
        tuned = get_peft_model(base, model.lora_config(BIG))
    layers = {name for name, part in tuned.named_modules() if hasattr(part, "lora_A")}
    assert {f"base_model.model.{name}" for name in report["lora_modules"]} == layers
    assert (report["trainable"], report["base_parameters"]) == (6_815_744, 8_030_261_248)
    steps = math.ceil(HUB_ROWS / BIG.batch_size) * BIG.epochs
    assert steps == report["steps"] == 1032
    adamw = torch.optim.AdamW(tuned.parameters(), lr=BIG.learning_rate)
    trainers = get_linear_schedule_with_warmup(adamw, math.ceil(BIG.warmup_ratio * steps), steps)
    rates = [BIG.learning_rate * trainers.lr_lambdas[0](step) for step in range(steps)]
    assert report["learning_rates"] == pytest.approx(rates, rel=1e-12)


# -- packs


def test_a_pack_computes_each_row_alone(place, tiny_model, tiny_tokenizer):
    """Rows that see one another move the loss by 1e-4 and nobody notices: so the logits are compared."""
    profile, workspace, _ = place
    some = data.read_processed(workspace.data)["train"].take(4)
    rows = [shift(row) for row in encode_rows(some, tiny_tokenizer, profile)]
    pack = packed_collate(rows)
    assert pack["cu_seq_lens_q"].dtype == torch.int32
    with torch.no_grad():
        packed = tiny_model(**{name: value for name, value in pack.items() if name != "labels"}).logits[0]
        alone = [tiny_model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    assert (packed - torch.cat(alone)).abs().max() < 1e-4


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 3), st.integers(40, 90))
def test_passes_are_bounded_and_lose_nothing(lengths, gpus, tokens):
    """Sixteen rows of FiQA may have 20,000 tokens: no card holds them, and all wait for the slowest."""
    count = iter(range(10_000))
    rows = [{"input_ids": [next(count) for _ in range(n)], "labels": [IGNORE_INDEX] * n} for n in lengths]
    hands = deal(unpack(packed_collate(rows)), gpus, tokens)
    passes = [[row["input_ids"] for row in group] for hand in hands for group in hand]
    assert max(len(sum(ids, [])) for ids in passes) <= tokens
    assert sorted(sum(passes, [])) == [row["input_ids"] for row in rows]
    shares = [sum(len(row["input_ids"]) for group in hand for row in group) for hand in hands]
    assert max(shares) - min(shares) <= max(lengths)


# -- the check

MISTAKES = {  # what stands behind the file, what the sentence must say
    "rng": ("--rng.seed=1", "has no rng"),
    "key of the strategy": ("--distributed.strategi=ddp", "distributed has no strategi"),
    "key of the adapter": ("--peft.dropout_postion=pre", "dropout_postion"),
    "layer that is not there": ("--peft.target_modules=['*.query']", r"\*\.query matches no layer"),
    "batch": ("--step_scheduler.local_batch_size=3", "must be divisible by"),
    "no data": ("--dataset.folder=nowhere", "notebook 01"),
    "no model": ("--model.pretrained_model_name_or_path=/nowhere", "nowhere"),
}


@pytest.mark.parametrize(("change", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_refused(change, words, place):
    """On a cluster it would be found after an hour in the queue, or never."""
    with pytest.raises(WorkshopError, match=words):
        check_recipe(behind(place, "out", 1, change))


def test_what_may_stand_behind_the_file(place):
    """What notebook 07 and the file's head name must be known; no signal handler of NeMo's stays."""
    more = ["--wandb.project=fiqa-lora", "--mlflow.tracking_uri=sqlite:///mlflow.db", *FSDP2]
    more += ["--distributed.activation_checkpointing=true"]
    assert check_recipe(behind(place, "out", 2, *more), gpus=2)["steps"] == 4
    assert signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, signal.default_int_handler)


@pytest.mark.parametrize(("ends_in", "ends_with", "requeued"), [(60, 1, True), (9000, 1, False)])
def test_batch_file(ends_in, ends_with, requeued, tmp_path):
    """srun gets what torchrun needs, spaces and all. Slurm does not requeue a job at its time limit itself,
    and one that fails early must not come back for ever."""
    words, said = tmp_path / "words", tmp_path / "said"
    # a reader that leaves after the first line would end this scontrol, and under pipefail the job
    hosts = '[ "$1" = show ] && echo node-7 && sleep 0.2 && echo node-8'
    tools = {
        "srun": f'printf "%s\\n" "$@" > {words}\nexit {ends_with}',
        "scontrol": f'{hosts}\necho "$@" >> {said}',
        "activate": "",
    }
    for name, text in tools.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)
    job = dict(SLURM_JOB_NODELIST="node-[7-8]", SLURM_NNODES="2", SLURM_JOB_ID="99", VENV=str(tmp_path))
    job |= {"SLURM_GPUS_PER_NODE": "a100:4", "SLURM_JOB_END_TIME": str(int(time.time()) + ends_in)}
    job |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    line = ["bash", FILE.with_name("slurm.sbatch"), "--checkpoint.checkpoint_dir=a b"]
    done = subprocess.run(line, env=os.environ | job, capture_output=True, text=True)
    assert done.returncode == ends_with, done.stderr
    given = words.read_text()
    for wanted in ("--nnodes\n2\n--nproc-per-node\n4\n", "--rdzv-endpoint\nnode-7:29500\n"):
        assert wanted in given
    assert given.endswith("--step_scheduler.local_batch_size=2\n--checkpoint.checkpoint_dir=a b\n")
    assert ("requeue 99" in said.read_text()) is requeued


# -- runs on this machine's CPU: one process, two with gloo


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


def panel(title: str) -> LivePanel:
    return LivePanel([], lambda questions: [], 0, title)


def tensors(adapter: Path) -> dict:
    """The adapter's matrices by name."""
    return load_file(adapter / "adapter_model.safetensors")


def losses(history: list[dict]) -> list[float]:
    return [row["loss"] for row in history if "loss" in row]


def test_metrics_of_every_step(place, runs):
    """NeMo keeps a hundred records back and logs the next step's rate: the panel would be empty or wrong."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown, _ = runs("one")
    assert shown.outcome == "finished 4 steps"
    assert [row["step"] for row in shown.history] == [1, 2, 3, 4]
    peak = place[0].learning_rate
    assert [row["learning_rate"] for row in shown.history] == pytest.approx([0, peak, peak * 2 / 3, peak / 3])
    assert [row["step"] for row in shown.history if "eval_loss" in row] == [2, 4]
    assert all(0.1 < row["memory_gib"] < 20 for row in shown.history)
    assert max(row["passes"] for row in shown.history) > 1
    board = EventAccumulator(str(place[1].root / "one" / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(losses(shown.history))
    assert len(board.Scalars("validation/val_loss")) == 2


@pytest.mark.parametrize("name", ["one", *TWICE])
def test_peft_has_the_recipes_validation_loss(name, place, runs):
    """A wrong scale or a layer left out would still load; only the loss knows. Every matrix has its layer."""
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
    """Rows, labels, order, schedule: notebook 04's Trainer goes from the same start to the same end."""
    profile, workspace, _ = place
    tokenizer = model.load_tokenizer(profile)
    chosen = data.read_processed(workspace.data)["train"].take(profile.train_rows)
    collator = StepCollator(tokenizer.pad_token_id, profile.tokens_per_batch, "padded")
    rows, base = encode_rows(chosen, tokenizer, profile), model.tiny_model(tokenizer)
    trainer = notebook_trainer(profile, tmp_path, base, collator, rows, adam_epsilon=1e-2)  # as in `behind`
    same_start(trainer.model)
    trainer.train()
    shown, adapter = runs("one")
    assert losses(trainer.state.log_history) == pytest.approx(losses(shown.history), rel=1e-5)
    trained, saved = dict(trainer.model.named_parameters()), tensors(adapter)
    for name, matrix in saved.items():
        mine = trained[name.replace(".weight", ".default.weight")].detach()
        assert torch.allclose(mine, matrix, atol=1e-5), name
    assert max(matrix.abs().max() for name, matrix in saved.items() if "lora_B" in name) > 1e-3


@pytest.mark.parametrize("name", TWICE)
def test_two_processes_are_one(name, place, runs):
    """Two real processes share the rows, and the weights too: losses and adapters must not know."""
    alone, together = runs("one"), runs(name)
    found = losses(together[0].history)
    assert found == pytest.approx(losses(alone[0].history), rel=1e-5)
    assert found[-1] < found[0] - 1e-3, "nothing was learned: equality would show nothing"
    single, double = tensors(alone[1]), tensors(together[1])
    assert single.keys() == double.keys()
    for key in single:
        assert (double[key] - single[key]).abs().max() < 1e-5, key
    assert "torch distributed with 2 workers" in (place[1].root / name / "run.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["two", "shared"])
def test_continues_from_its_checkpoint(name, place, runs):
    """Two processes, killed (SIGKILL) after a checkpoint: started again, they end with the same adapter."""
    whole = runs(name)
    folder = place[1].root / f"killed_{name}"
    behind_it = behind(place, folder.name, 2, *(FSDP2 if name == "shared" else []))
    process = subprocess.Popen(
        recipe.launch(behind_it, 2), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (folder / "LATEST").exists():
        time.sleep(0.05)
    torchrun = psutil.Process(process.pid)
    family = [torchrun, *torchrun.children(recursive=True)]  # each in a session of its own
    for one in family:
        one.kill()
    psutil.wait_procs(family, timeout=60)
    assert (folder / "LATEST").readlink().name == "epoch_0_step_1"
    with pytest.raises(WorkshopError, match="holds a run"):
        run_recipe(behind_it, panel("by accident"), 2)
    subprocess.run(recipe.launch(behind_it, 2), check=True, capture_output=True, timeout=300)
    found = losses(recipe.read_metrics(folder))
    assert found[2:] == pytest.approx(losses(whole[0].history)[2:], rel=1e-6)
    after = tensors(folder / "LATEST" / "model")
    assert max((after[key] - value).abs().max().item() for key, value in tensors(whole[1]).items()) < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_one_rank_out_of_memory_ends_the_run(place, monkeypatch):
    """On two GPUs one rank ran out of memory, and the run went on doing nothing until it was killed."""
    use_class("OneRankFails", place[1].root, monkeypatch)
    shown = panel("fails")
    with pytest.raises(WorkshopError, match=r"failed \(OutOfMemoryError: CUDA.*tokens_per_pass; look at"):
        run_recipe(behind(place, "one_rank_fails", 2), shown, 2)
    assert [row["step"] for row in shown.history] == [1]


@pytest.mark.slow
def test_stop_saves_a_checkpoint(place):
    """Stop sends SIGTERM, as Slurm does before the time is up: NeMo must save after the step, and all end."""
    long = ["--step_scheduler.max_steps=500", "--step_scheduler.ckpt_every_steps=500"]
    shown, folder = panel("to be stopped"), place[1].root / "stopped"

    def press_stop() -> None:
        ends = time.monotonic() + 300
        while not recipe.read_metrics(folder) and time.monotonic() < ends:
            time.sleep(0.1)
        shown.stop.set()

    person = threading.Thread(target=press_stop)
    person.start()
    adapter = run_recipe(behind(place, "stopped", 1, *long, "--step_scheduler.num_epochs=500"), shown)
    person.join()
    assert shown.stopped == "Stop button"
    assert 1 <= shown.step < 500 and tensors(adapter)
    assert adapter.parent.name.endswith(f"_step_{shown.step - 1}")  # the step at hand is saved
