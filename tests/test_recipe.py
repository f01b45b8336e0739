"""recipes/fiqa_lora.yaml is notebook 04's run, packs keep rows apart, a run is checked before it starts."""

import os
import signal
import subprocess
import time

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from notebook_trainer import notebook_trainer
from recipe_child import changes

from fiqa_helpers import data, model
from fiqa_helpers.base import WorkshopError, Workspace
from fiqa_helpers.machinery import recipe
from fiqa_helpers.machinery.recipe import check_recipe, deal, packed_collate, shift, split_pack
from fiqa_helpers.profiles import PROFILES, load_profile
from fiqa_helpers.rows import IGNORE_INDEX, StepCollator, encode_rows

BIG = PROFILES["gpu80"]
HUB_ROWS = 5500


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(profile, workspace, base, changes): profile tiny, the packaged rows, its random model in a folder."""
    workspace = Workspace(str(tmp_path_factory.mktemp("recipe")))
    data.write_processed(data.load_fiqa("packaged"), workspace.data)
    profile = load_profile("tiny")
    base = model.model_path(profile)
    return profile, workspace, base, changes(profile, workspace.data, base, workspace.root / "out")


@pytest.fixture(scope="module")
def big_report(tmp_path_factory, tiny_tokenizer):
    """The check of the file as it is, over as many rows as the hub has (short ones, the small tokenizer)."""
    folder = tmp_path_factory.mktemp("hub")
    short = Dataset.from_dict({"question": ["Why?"] * HUB_ROWS, "ground_truths": [["So."]] * HUB_ROWS})
    data.write_processed(DatasetDict(train=short, validation=short.take(8), test=short.take(8)), folder)
    where = [f"--{name}.folder={folder}" for name in ("dataset", "validation_dataset")]
    return check_recipe([*where, f"--checkpoint.checkpoint_dir={folder}/out"], tokenizer=tiny_tokenizer)


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
    written = yaml.safe_load(recipe.recipe_file().read_text())

    def value(key: str) -> object:
        found = written
        for part in key.split("."):
            found = found[part]
        return found

    assert {key: value(key) for keys in KEYS.values() for key in keys} == {
        key: getattr(BIG, field) for field, keys in KEYS.items() for key in keys
    }
    assert value("peft.target_modules") == [f"*.{name}" for name in BIG.lora_targets]
    assert value("step_scheduler.max_steps") is None
    assert BIG.max_steps == -1
    assert value("validation_dataloader.batch_size") * BIG.max_length <= BIG.tokens_per_batch


def test_rows_tokens_and_supervised_positions(tiny, tiny_tokenizer):
    """Another prompt, another cut or a shift by two would train something else and look fine."""
    profile, workspace, *_ = tiny
    chosen = data.read_processed(workspace.data)["train"].take(profile.train_rows)
    theirs = encode_rows(chosen, tiny_tokenizer, profile)
    where, limit = str(workspace.data), profile.max_length
    found = recipe.fiqa_rows(tiny_tokenizer, where, "train", profile.train_rows, "plain", limit)
    assert len(found) == len(theirs) == profile.train_rows
    for mine, row in zip(found, theirs, strict=True):
        assert mine["input_ids"] == row["input_ids"][:-1]
        # both predict the same token from the same position: transformers' models shift the labels themselves
        recipes = {(i, label) for i, label in enumerate(mine["labels"]) if label != IGNORE_INDEX}
        trainers = {(i - 1, label) for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX}
        assert recipes == trainers


def test_the_reference_adapter(big_report):
    """NeMo matches patterns, PEFT name endings: both must find the same layers, 6,815,744 parameters."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(model.reference_config())
        tuned = get_peft_model(base, model.lora_config(BIG))
    layers = {name for name, part in tuned.named_modules() if hasattr(part, "lora_A")}
    assert {f"base_model.model.{name}" for name in big_report["lora_modules"]} == layers
    assert (big_report["trainable"], big_report["base_parameters"]) == (6_815_744, 8_030_261_248)


@pytest.fixture
def trainer(tiny_tokenizer, tmp_path):
    """Notebook 04's own Trainer for a profile and some rows; `seen` collects the rows of each step."""

    def make(profile, rows, seen):
        collator = StepCollator(tiny_tokenizer.pad_token_id, profile.tokens_per_batch, "packed")

        def taken(chosen: list[dict]) -> dict:
            seen.append(sorted(tuple(row["input_ids"][:-1]) for row in chosen))
            return collator(chosen)

        base = model.tiny_model(tiny_tokenizer)
        return notebook_trainer(profile, tmp_path, base, taken, rows, use_cpu=True)

    return make


def test_steps_learning_rates_and_optimizer_are_the_trainers(big_report, trainer):
    """NeMo alone would round the warm-up down, start at a tenth of the peak and end above zero."""
    rows = Dataset.from_dict({"input_ids": [[1, 2]] * HUB_ROWS, "labels": [[1, 2]] * HUB_ROWS})
    theirs = trainer(BIG, rows, [])
    total = len(theirs.get_train_dataloader()) * BIG.epochs
    assert (big_report["steps"], total) == (1032, 1032)
    theirs.create_optimizer_and_scheduler(total)
    scale = theirs.lr_scheduler.lr_lambdas[0]
    rates = [BIG.learning_rate * scale(step) for step in range(total)]
    assert big_report["learning_rates"] == pytest.approx(rates, rel=1e-12)
    written = yaml.safe_load(recipe.recipe_file().read_text())
    for group in theirs.optimizer.param_groups:
        assert {name: written["optimizer"][name] for name in ("eps", "weight_decay")}.items() <= group.items()
        assert list(group["betas"]) == written["optimizer"]["betas"]
    assert written["clip_grad_norm"]["max_norm"] == theirs.args.max_grad_norm


@pytest.mark.parametrize("gpus", [1, 2])
def test_each_step_has_the_trainers_rows(gpus, tiny, trainer, tiny_tokenizer):
    """In every epoch, on any number of GPUs: another shuffle would be another curve."""
    from nemo_automodel.components.config._arg_parser import parse_args_and_load_config
    from nemo_automodel.recipes._typed_config import RecipeConfig

    profile, workspace, base, _ = tiny
    chosen, seen = data.read_processed(workspace.data)["train"].take(22), []
    trainers = trainer(profile, encode_rows(chosen, tiny_tokenizer, profile), seen).get_train_dataloader()
    behind = [*changes(profile, workspace.data, base, "out", gpus), "--dataset.rows=22"]
    config = RecipeConfig(parse_args_and_load_config(str(recipe.recipe_file()), behind))
    loaders = [
        config.dataloader.build(tokenizer=tiny_tokenizer, dp_rank=rank, dp_world_size=gpus)
        for rank in range(gpus)
    ]
    for epoch in range(3):
        seen.clear()
        trainers.set_epoch(epoch)
        assert len(list(trainers)) == 6
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        for wanted, packs in zip(seen, zip(*loaders, strict=True), strict=True):
            assert sorted(ids for pack in packs for ids in rows_of(pack)) == wanted


# -- packs


def rows_of(pack: dict) -> list[tuple[int, ...]]:
    """The rows of a pack, cut where its positions restart."""
    starts = (pack["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    ids = pack["input_ids"][0].tolist()
    return [tuple(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


@pytest.fixture(scope="module")
def some_rows(tiny, tiny_tokenizer):
    """Four rows of notebook 04."""
    profile, workspace, *_ = tiny
    return list(encode_rows(data.read_processed(workspace.data)["train"].take(4), tiny_tokenizer, profile))


def test_a_pack_computes_each_row_alone(some_rows, tiny_model):
    """Rows that see one another move the loss by 1e-4 and nobody notices: so the logits are compared."""
    rows = [shift(row) for row in some_rows]
    pack = packed_collate(rows)
    assert pack["cu_seq_lens_q"].dtype == torch.int32
    with torch.no_grad():
        packed = tiny_model(**{name: value for name, value in pack.items() if name != "labels"}).logits[0]
        alone = [tiny_model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    assert (packed - torch.cat(alone)).abs().max() < 1e-4


def test_loss_of_a_step_is_the_trainers(some_rows, tiny_model):
    """The recipe's loss on its pack and the Trainer's on the notebook's batch, to the last digits; and the
    override for memory (`--loss_fn._target_=...ChunkedCrossEntropy`) is no other training."""
    from nemo_automodel.components.loss.chunked_ce import ChunkedCrossEntropy
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy

    step = StepCollator(0, 512, "padded")(some_rows)
    tokens = int((step["labels"] != IGNORE_INDEX).sum())
    pack = packed_collate([shift(row) for row in some_rows])
    labels = pack.pop("labels")
    with torch.no_grad():
        trainers = sum(tiny_model(**micro, num_items_in_batch=tokens).loss for micro in step["micro_batches"])
        out = tiny_model(**pack, output_hidden_states=True)
        recipes = MaskedCrossEntropy()(out.logits, labels, num_label_tokens=tokens)
        head = tiny_model.lm_head.weight
        chunked = ChunkedCrossEntropy(chunk_len=64, compile=False)(out.hidden_states[-1], labels, head)
    assert recipes.item() == pytest.approx(trainers.item(), rel=1e-6)
    assert chunked.item() / tokens == pytest.approx(recipes.item(), rel=1e-5)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), tokens=st.integers(40, 90))
def test_passes_are_bounded_and_lose_nothing(lengths, tokens):
    """The longest sixteen rows of FiQA have 20,000 tokens: one pass of them would not fit any card."""
    count = iter(range(10_000))
    rows = [{"input_ids": [next(count) for _ in range(n)], "labels": [IGNORE_INDEX] * n} for n in lengths]
    passes = split_pack(packed_collate(rows), tokens)
    assert all(part["input_ids"].numel() <= tokens for part in passes)
    found = sorted(ids for part in passes for ids in rows_of(part))
    assert found == sorted(tuple(row["input_ids"]) for row in rows)


# -- the check

MISTAKES = {  # what stands behind the file, what the sentence must say
    "rng": ("--rng.seed=1", "has no rng"),
    "compile": ("--compile.enabled=true", "has no compile"),
    "key of the model": ("--model.force_hff=true", "model has no force_hff"),
    "key of the strategy": ("--distributed.strategi=ddp", "distributed has no strategi"),
    "key of the adapter": ("--peft.dropout_postion=pre", "dropout_postion"),
    "layer that is not there": ("--peft.target_modules=['*.query']", r"\*\.query matches no layer"),
    "batch": ("--step_scheduler.local_batch_size=3", "must be divisible by"),
    "no data": ("--dataset.folder=nowhere", "run notebook 01"),
    "no model": ("--model.pretrained_model_name_or_path=/nowhere", "nowhere"),
}


def test_rows_are_dealt_evenly():
    """A GPU with far more tokens than the others makes all of them wait; a row dealt twice counts twice."""
    rows = [{"input_ids": [n] * (20 + n * n % 700), "labels": [n]} for n in range(64)]
    hands = deal(rows, 4)
    assert sorted(row["labels"] for hand in hands for row in hand) == [row["labels"] for row in rows]
    tokens = [sum(len(row["input_ids"]) for row in hand) for hand in hands]
    assert max(tokens) <= 1.02 * min(tokens)
    assert deal(rows, 1) == [rows]


@pytest.mark.parametrize(("change", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_refused(change, words, tiny):
    """On a cluster it would be found after an hour in the queue, or never."""
    with pytest.raises(WorkshopError, match=words):
        check_recipe([*tiny[3], change])


def test_what_may_stand_behind_the_file(tiny):
    """Everything that notebook 07 and the file's head name must be known; no signal handler stays."""
    for more in (
        ["--wandb.project=fiqa-lora", "--wandb.mode=offline"],
        ["--mlflow.experiment_name=fiqa-lora", "--mlflow.tracking_uri=sqlite:///mlflow.db"],
        ["--distributed.strategy=fsdp2", "--distributed.activation_checkpointing=true"],
    ):
        assert check_recipe([*tiny[3], *more])["steps"] == 4
    for gpus, rows in ((2, 2), (4, 1)):
        shared = check_recipe([*tiny[3], f"--step_scheduler.local_batch_size={rows}"], gpus)
        assert shared["steps"] == 4
    assert signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, signal.default_int_handler)


# -- launches


@pytest.mark.parametrize(
    ("ends_in", "ends_with", "requeued"), [(60, 1, True), (60, 0, False), (9000, 1, False)]
)
def test_batch_file(ends_in, ends_with, requeued, tmp_path):
    """srun gets what torchrun needs, spaces and all. Slurm does not requeue a job at its time limit itself,
    and one that fails early must not come back for ever."""
    file = recipe.recipe_file().with_name("slurm.sbatch")
    assert file.read_text().rindex("#SBATCH") < file.read_text().index("set -euo"), (
        "Slurm stops reading there"
    )
    words, said = tmp_path / "words", tmp_path / "said"
    # a reader that leaves after the first line would end this scontrol, and under pipefail the job
    hosts = '[ "$1" = show ] && echo node-7 && sleep 0.2 && echo node-8'
    tools = {
        "srun": f'printf "%s\\n" "$@" > {words}\nexit {ends_with}',
        "scontrol": f'{hosts}\necho "$@" >> {said}',
        "activate": "",
    }
    (tmp_path / "bin").mkdir()
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {
        "SLURM_JOB_NODELIST": "node-[7-8]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "99",
        "VENV": str(tmp_path),
    }
    job |= {"SLURM_GPUS_PER_NODE": "a100:4", "SLURM_JOB_END_TIME": str(int(time.time()) + ends_in)}
    job |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    line = ["bash", str(file), "--checkpoint.checkpoint_dir=a b"]
    done = subprocess.run(line, env=os.environ | job, capture_output=True, text=True)
    assert done.returncode == ends_with, done.stderr
    given = words.read_text().splitlines()
    for wanted in (["--nnodes", "2", "--nproc-per-node", "4"], ["--rdzv-endpoint", "node-7:29500"]):
        at = given.index(wanted[0])
        assert given[at : at + len(wanted)] == wanted
    assert given[-2:] == ["--step_scheduler.local_batch_size=2", "--checkpoint.checkpoint_dir=a b"]
    assert ("requeue 99" in said.read_text()) is requeued
