"""The run of notebook 04 as a NeMo AutoModel recipe: written, checked, launched and followed.

Importing this module imports transformers.
"""

import contextlib
import ctypes
import difflib
import fnmatch
import json
import logging
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from fiqa_helpers import data
from fiqa_helpers.base import WorkshopError, Workspace, disk_errors, shown
from fiqa_helpers.machinery.live import EVALUATING, TRAINING, LivePanel
from fiqa_helpers.rows import IGNORE_INDEX, encode

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from fiqa_helpers.profiles import Profile
    from fiqa_helpers.run import Run

# --- What the NeMo AutoModel recipe trains on: the notebooks' own rows and tokens, with labels shifted by
# one.
#
# A recipe names these functions in its `dataset:` and `tokenizer:` sections; each process calls them once.

PAD_KEY = "___PAD_TOKEN_IDS___"  # where NeMo AutoModel's default_collater looks for the fillers


class RecipeRows(Sequence):
    """Items for NeMo AutoModel's `default_collater`: lists of one length, and what to fill them up with."""

    def __init__(self, rows: list[dict[str, list[int]]], pad_token_id: int):
        self.rows, self.pad_token_id = rows, pad_token_id

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, object]:
        fillers = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX, "attention_mask": 0}
        return {**self.rows[index], PAD_KEY: fillers}  # a new dict: the collater takes the fillers out


def fiqa_rows(
    tokenizer: "PreTrainedTokenizerBase",
    folder: str,
    split: str = "train",
    rows: int = -1,
    prompt: str = "plain",
    max_length: int = 2048,
    shift_labels: bool = True,
) -> RecipeRows:
    """The first `rows` (-1: all) of a split that notebook 01 wrote to `folder`, encoded as in notebook 02.

    Raises:
        WorkshopError: a file is missing or damaged, the split is unknown, or the tokenizer pads with its end
            token, which would teach the model never to stop.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise WorkshopError(
            "The recipe's tokenizer pads with its end token: keep the section dataset.tokenizer, which loads "
            "it with another padding token."
        )
    splits = data.read_processed(Path(folder))
    if split not in splits:
        raise WorkshopError(f"The recipe asks for split {split!r}: known are {', '.join(splits)}.")
    chosen = splits[split] if rows < 0 else splits[split].select(range(min(rows, len(splits[split]))))
    encoded = [
        encode(row["question"], row["ground_truths"][0], tokenizer, prompt, max_length) for row in chosen
    ]
    return RecipeRows([recipe_row(row, shift_labels) for row in encoded], tokenizer.pad_token_id)


def recipe_row(row: dict[str, list[int]], shift_labels: bool = True) -> dict[str, list[int]]:
    """A row as `rows.encode` makes it (n tokens) -> what a recipe wants (n - 1 tokens when shifted).

    transformers' models compare the logits at position i with the label at i + 1 themselves; NeMo AutoModel's
    recipes compare position i with label i, so there `labels[i]` must be the token after `input_ids[i]`.
    """
    ids, labels = row["input_ids"], row["labels"]
    if shift_labels:
        ids, labels = ids[:-1], labels[1:]
    return {"input_ids": list(ids), "labels": list(labels), "attention_mask": [1] * len(ids)}


def fault_of_batch(batch: "dict[str, torch.Tensor]", eos_token_id: int, max_length: int) -> str | None:
    """What is wrong with a recipe's batch (tensors of rows x tokens), in a sentence; None if nothing is."""
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    trained = labels != IGNORE_INDEX
    if not trained.any() or trained[:, 0].any():
        return "the first batch trains on prompts or on nothing: use fiqa_helpers.machinery.recipe.fiqa_rows."
    inner = trained[:, :-1] & (mask[:, 1:] == 1)
    if not (labels[:, :-1][inner] == ids[:, 1:][inner]).all():
        return "labels are not the tokens that come next, as a recipe wants them: leave shift_labels true."
    for row, carries_loss, length in zip(labels, trained, mask.sum(dim=1).tolist(), strict=True):
        answer = row[carries_loss]
        whole = length + 1 < max_length  # a row that was cut has lost its end token
        if whole and (len(answer) == 0 or answer[-1] != eos_token_id):
            return "an answer has no end token, so the model would never learn to stop: use fiqa_rows."
    return None


def load_tokenizer(
    name: str, revision: str = "main", trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """The tokenizer of the notebooks (padding token apart from the end token), for the recipe's YAML.

    NeMo AutoModel adds `trust_remote_code` by itself; whatever it says, no code of a model's is run.
    """
    from fiqa_helpers.model import load_tokenizer as load
    from fiqa_helpers.profiles import REFERENCE

    return load(replace(REFERENCE, model=name, model_revision=revision))


# --- The text of a recipe, with the reason for each setting that is not NeMo AutoModel's own choice.
#
# A change here is a change of every recipe: tests hold the figures against the notebook's run.

RECIPE = """\
# LoRA on FiQA as a NeMo AutoModel 0.7.0 recipe, written from profile {name} ({title}).
# {rows} training rows on {processes}: {epoch} optimizer steps an epoch, {total} in all.{dropped}
# Change the profile and write it again, or edit it here;
# fiqa_helpers.machinery.recipe.check_recipe says what the file would do, and refuses what NeMo would
# silently ignore.

# NeMo's fine-tuning recipe; ours only adds that metrics are written at once, and TensorBoard
recipe: fiqa_helpers.machinery.recipe_run.FiqaRecipe

seed: {seed}  # here, at the top level: NeMo ignores a section rng

step_scheduler:
  global_batch_size: {batch}  # rows of one optimizer step, over all GPUs
  local_batch_size: {local}  # rows of one forward pass on one GPU; {accumulate} pass(es) make a step
  num_epochs: {epochs}  # begun; max_steps may end the run in the middle of one
  max_steps: {max_steps}  # null: all epochs
  ckpt_every_steps: {every}  # adapter, optimizer and place in the data; also after the last step
  val_every_steps: {every}  # the loss of all rows of validation_dataset, per answer token
  save_checkpoint_every_epoch: false  # NeMo would save at the end of each epoch too

dist_env:
  backend: {backend}
  timeout_minutes: 30  # NeMo's 1 is too short while the first process downloads 16 GB

model:
  _target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained
  pretrained_model_name_or_path: {model}
  revision: {revision}
  force_hf: true  # the Hugging Face class, as in notebook 03: the adapter fits it name by name
  torch_dtype: {dtype}  # of the base and, in a recipe, of the adapter; the notebooks keep fp32 adapters
  attn_implementation: sdpa  # rows are padded here; the notebooks pack them on a GPU, which is faster
  use_liger_kernel: {liger}  # fused norm, MLP and RoPE on a GPU

peft:
  _target_: nemo_automodel.components._peft.lora.PeftConfig
  target_modules: {targets}
  dim: {rank}  # the rank r
  alpha: {alpha}  # the update is scaled by alpha / dim
  dropout: {dropout}
  dropout_position: pre  # before A, as PEFT does; NeMo's default is post
  lora_A_init: uniform  # PEFT's; NeMo's default is xavier

distributed:
  strategy: fsdp2  # shards the base model over the GPUs; does nothing on one
  tp_size: 1  # no layer is cut apart: rows are shared, and so the batch rule above holds
  cp_size: 1
  activation_checkpointing: {checkpointing}  # true: less memory, slower
  mp_policy:  # left out, NeMo casts to bf16 whatever torch_dtype says
    _target_: torch.distributed.fsdp.MixedPrecisionPolicy
    param_dtype: {dtype}
    reduce_dtype: float32  # gradients are added up over the GPUs in fp32
    cast_forward_inputs: false

clip_grad_norm:
  max_norm: 1.0  # as the Trainer does

loss_fn:  # per answer token over the whole step, as in notebook 04
  _target_: nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy

dataset:
  _target_: fiqa_helpers.machinery.recipe.fiqa_rows
  folder: {data}  # what notebook 01 wrote
  split: train
  rows: {train_rows}  # -1: all
  prompt: {prompt}
  max_length: {max_length}  # tokens of a row, prompt and answer together
  tokenizer:
    _target_: fiqa_helpers.machinery.recipe.load_tokenizer
    name: {model}
    revision: {revision}

dataloader:
  _target_: torchdata.stateful_dataloader.StatefulDataLoader
  collate_fn: nemo_automodel.components.datasets.utils.default_collater
  shuffle: true  # by `seed`, to the same order as the Trainer's
  # group_by_length: true  # less padding: rows of similar length share a forward pass; drops a few more rows

validation_dataset:
  _target_: fiqa_helpers.machinery.recipe.fiqa_rows
  folder: {data}
  split: validation
  rows: {eval_rows}
  prompt: {prompt}
  max_length: {max_length}

validation_dataloader:
  _target_: torchdata.stateful_dataloader.StatefulDataLoader
  collate_fn: nemo_automodel.components.datasets.utils.default_collater
  shuffle: false

optimizer:  # the Trainer's AdamW
  _target_: torch.optim.AdamW
  lr: {learning_rate}  # the peak; write 2.0e-4, as YAML takes 2e-4 for a text
  betas: [0.9, 0.999]
  eps: 1.0e-8
  weight_decay: 0.0

lr_scheduler:
  lr_decay_style: linear  # NeMo's default is cosine
  lr_warmup_steps: {warmup}  # {percent} of {total} steps, rounded up as transformers does
  init_lr: 0.0  # NeMo's default is a tenth of lr
  min_lr: 0.0  # NeMo's default is a hundredth of lr

checkpoint:
  enabled: true
  checkpoint_dir: {output}  # a second run in this folder goes on with the first
  model_save_format: safetensors  # adapter_model.safetensors, which PEFT loads
  max_recent_checkpoints: 3

tensorboard:  # ours: `tensorboard --logdir` shows it
  log_dir: {logs}
"""

WANDB = """
wandb:
  project: fiqa-lora
  mode: offline  # nothing leaves this machine; `wandb sync` later, or `online`
  dir: {output}
"""

MLFLOW = """
mlflow:
  experiment_name: fiqa-lora
  tracking_uri: {output}  # a file; the address of a server sends it there
"""


# --- A recipe's YAML with its line numbers, refused where NeMo AutoModel would silently ignore a part.

MODEL_CALL = "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained"
REQUIRED = (
    "recipe",
    "step_scheduler",
    "model",
    "peft",
    "loss_fn",
    "dataset",
    "dataloader",
    "optimizer",
    "lr_scheduler",
    "checkpoint",
)
IGNORED = {  # sections that nemo-automodel 0.7.0 reads past without a word, or that take the launch over
    "rng": "NeMo ignores it: put `seed: 42` at the top level",
    "slurm": "NeMo ignores it since 0.4: write a batch file with fiqa_helpers.machinery.recipe.write_sbatch",
    "compile": "NeMo ignores it with fsdp2: set distributed.enable_compile",
    "skypilot": "it would launch the recipe elsewhere: remove it",
    "nemo_run": "it would launch the recipe elsewhere: remove it",
}


@dataclass(frozen=True)
class RecipeFile:
    """A parsed recipe: its values, and the line of each dotted key ("optimizer.lr" -> 97)."""

    path: Path
    values: dict
    lines: dict[str, int]

    def error(self, key: str, sentence: str) -> WorkshopError:
        """`sentence` with the file and the line of `key`, or of the nearest key above it that is there."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        where = f", line {self.lines[key]}" if key else ""
        return WorkshopError(f"{self.path}{where}: {sentence}")

    def get(self, key: str, default: object = None) -> object:
        """The value of a dotted key."""
        found: object = self.values
        for part in key.split("."):
            if not isinstance(found, dict) or part not in found:
                return default
            found = found[part]
        return found

    def whole_number(self, key: str, least: int = 1) -> int:
        """The value of `key` where it must be a whole number.

        Raises:
            WorkshopError: it is something else, or below `least`.
        """
        value = self.get(key)
        if type(value) is not int or value < least:
            raise self.error(key, f"{key} is {value!r}: it must be a whole number from {least} upwards.")
        return value


def read_recipe(path: Path) -> RecipeFile:
    """Parse the recipe at `path`.

    Raises:
        WorkshopError: there is no such file, it is not YAML, or a key stands twice (the last would count).
    """
    try:
        written = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise WorkshopError(
            f"Cannot read the recipe {path} ({reason}): write it with write_recipe."
        ) from None
    lines: dict[str, int] = {}
    try:
        root = yaml.compose(written, yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise WorkshopError(f"{path} is not a recipe: it must be a YAML mapping with sections.")
        _note_lines(root, "", lines, path)
        values = yaml.safe_load(written)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise WorkshopError(f"{path}{where}: this is not YAML ({error.problem}): correct it there.") from None
    except yaml.YAMLError as error:  # a control character
        raise WorkshopError(f"{path} is not YAML ({str(error).splitlines()[0]}): correct it.") from None
    return RecipeFile(path, values, lines)


def _note_lines(node: yaml.MappingNode, prefix: str, lines: dict[str, int], path: Path) -> None:
    for key_node, value in node.value:
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        if key in lines:
            raise WorkshopError(
                f"{path}, line {line}: {key} stands in line {lines[key]} too, and only the last would count: "
                "keep one."
            )
        lines[key] = line
        if isinstance(value, yaml.MappingNode):
            _note_lines(value, f"{key}.", lines, path)


def refuse_ignored(recipe: RecipeFile) -> None:
    """Refuse sections and keys that NeMo would read past.

    Raises:
        WorkshopError: naming line, key and remedy.
    """
    known = known_keys(recipe)
    for section, value in recipe.values.items():
        if section in IGNORED:
            raise recipe.error(section, f"a section {section} is of no use here, {IGNORED[section]}.")
        if section not in known:
            guess = difflib.get_close_matches(str(section), known, 1)
            hint = f"did you mean {guess[0]}?" if guess else "remove it."
            raise recipe.error(str(section), f"NeMo would ignore the unknown section {section}: {hint}")
        if known[section] is not None:
            _refuse_keys(recipe, section, value, known[section])
    for section, keys in known.items():
        if "." in section and section in recipe.lines:
            _refuse_keys(recipe, section, recipe.get(section), keys)
    for section in REQUIRED:
        if section not in recipe.values:
            raise recipe.error(section, f"the section {section} is missing: write the recipe again.")
    for section in ("validation_dataset", "validation_dataloader"):
        if section not in recipe.values and recipe.values.keys() & {
            "validation_dataset",
            "validation_dataloader",
        }:
            raise recipe.error(section, f"validation needs the section {section} too, or neither of the two.")


def _refuse_keys(recipe: RecipeFile, section: str, value: object, keys: set[str]) -> None:
    if not isinstance(value, dict):
        raise recipe.error(section, f"{section} must be a section with keys, not {value!r}.")
    for key in value:
        if keys and key not in keys:
            guess = difflib.get_close_matches(str(key), keys, 1)
            hint = f"did you mean {guess[0]}?" if guess else f"known are {', '.join(sorted(keys))}."
            raise recipe.error(f"{section}.{key}", f"{section} has no key {key}: {hint}")


def known_keys(recipe: RecipeFile) -> dict[str, set[str] | None]:
    """Section (nested: with dots) -> its keys; an empty set where any key goes, None for a plain value."""
    from nemo_automodel.components._peft.lora import PeftConfig
    from nemo_automodel.components.checkpoint.config import CheckpointingConfig
    from nemo_automodel.components.distributed.config import FSDP2Config
    from nemo_automodel.components.loggers.loggers import MLflowConfig
    from nemo_automodel.components.optim.optimizer import LRSchedulerConfig
    from nemo_automodel.components.training.step_scheduler import StepSchedulerConfig
    from torch.distributed.fsdp import MixedPrecisionPolicy

    def of(config: type, *more: str) -> set[str]:
        return {field.name for field in fields(config)} | {"_target_", *more}

    rows = {"_target_", "folder", "split", "rows", "prompt", "max_length", "shift_labels", "tokenizer"}
    ours = str(recipe.get("dataset._target_", "")).startswith("fiqa_helpers.")
    loader = {"_target_", "collate_fn", "shuffle", "group_by_length", "num_workers", "pin_memory"}
    loader |= {"persistent_workers", "prefetch_factor", "drop_last", "batch_size"}
    # what from_pretrained names, and what it hands on that a person may want
    model = {"_target_", "pretrained_model_name_or_path", "revision", "force_hf", "torch_dtype", "dtype"}
    model |= {"attn_implementation", "use_liger_kernel", "use_sdpa_patching", "cache_dir", "local_files_only"}
    return {
        "recipe": None,
        "seed": None,
        "step_scheduler": of(StepSchedulerConfig, "local_batch_size"),
        "dist_env": {"backend", "timeout_minutes"},
        "model": model,
        "peft": of(PeftConfig),
        "distributed": of(FSDP2Config, "strategy", "dp_size", "dp_replicate_size", "tp_size", "cp_size"),
        "distributed.mp_policy": of(MixedPrecisionPolicy),
        "clip_grad_norm": {"max_norm", "backend"},
        "loss_fn": set(),
        "dataset": rows if ours else set(),
        "dataset.tokenizer": {"_target_", "name", "revision"} if _our_tokenizer(recipe) else set(),
        "dataloader": loader,
        "validation_dataset": rows if ours else set(),
        "validation_dataloader": loader,
        "optimizer": set(),
        "lr_scheduler": of(LRSchedulerConfig),
        "checkpoint": of(CheckpointingConfig, "restore_from"),
        "tensorboard": {"log_dir"},
        "wandb": set(),
        "mlflow": of(MLflowConfig),
    }


def _our_tokenizer(recipe: RecipeFile) -> bool:
    return str(recipe.get("dataset.tokenizer._target_", "")).startswith("fiqa_helpers.")


def refuse_values(recipe: RecipeFile) -> None:
    """Refuse values that don't go together: NeMo takes them, and makes another run or a crash of them.

    Raises:
        WorkshopError: naming line, key and remedy.
    """
    if recipe.get("model._target_") != MODEL_CALL:
        raise recipe.error("model._target_", f"the model must come from {MODEL_CALL}.")
    if recipe.get("model.force_hf") is not True:
        raise recipe.error(
            "model.force_hf", "force_hf must be true, or the adapter would not fit Hugging Face's model."
        )
    if recipe.get("peft.lora_dtype") not in (None, recipe.get("model.torch_dtype")):
        raise recipe.error(
            "peft.lora_dtype", "an adapter in another dtype than the base crashes: remove lora_dtype."
        )
    for mine, models in (("name", "pretrained_model_name_or_path"), ("revision", "revision")):
        key = f"dataset.tokenizer.{mine}"
        if _our_tokenizer(recipe) and recipe.get(key) != recipe.get(f"model.{models}"):
            raise recipe.error(
                key,
                f"the tokenizer's {mine} {recipe.get(key)} and the model's {recipe.get(f'model.{models}')} "
                "must be the same: correct one of the two.",
            )
    dtype = recipe.get("model.torch_dtype", "bfloat16")
    if recipe.get("distributed.mp_policy.param_dtype", "bfloat16") != dtype:
        raise recipe.error(
            "distributed.mp_policy.param_dtype",
            f"NeMo would not compute in the model's {dtype}: set mp_policy.param_dtype to {dtype}.",
        )
    for key in ("tp_size", "cp_size"):
        if recipe.get(f"distributed.{key}", 1) not in (1, None):
            raise recipe.error(f"distributed.{key}", f"this recipe shares rows only: set {key} to 1.")
    if recipe.get("distributed.strategy", "fsdp2") != "fsdp2":
        raise recipe.error("distributed.strategy", "this recipe is made for strategy fsdp2.")


# --- What each value of a recipe may be, so that nonsense is named with its line before anything is built.
#
# NeMo AutoModel takes many values unseen: a misspelt `lora_A_init` gives another start of the adapter, the
# text "nonsense" where true or false belongs counts as true.


@dataclass(frozen=True)
class Allowed:
    """A test for a value, and the words that end the sentence "it must be ..."."""

    words: str
    fits: Callable[[object], bool]


def _whole(least: int) -> Allowed:
    return Allowed(
        f"a whole number from {least} upwards", lambda value: type(value) is int and value >= least
    )


def _number(least: float, below: float = float("inf"), words: str = "") -> Allowed:
    return Allowed(
        words or f"a number from {least} upwards, written like 1.0e-8",
        lambda value: type(value) in (int, float) and least <= value < below,
    )


def _one_of(*values: object, words: str = "") -> Allowed:
    names = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
    return Allowed(
        words or f"one of {', '.join(names)}",
        lambda value: any(type(value) is type(known) and value == known for known in values),
    )


def _or_nothing(allowed: Allowed) -> Allowed:
    return Allowed(f"{allowed.words}, or null", lambda value: value is None or allowed.fits(value))


_TEXT = Allowed("a text", lambda value: isinstance(value, str) and bool(value.strip()))
_SWITCH = _one_of(True, False, words="true or false")
_FRACTION = _number(0, 1, "a number from 0 to less than 1")
_DTYPE = _one_of("bfloat16", "float16", "float32")

ROWS = {
    "folder": _TEXT,
    "split": _one_of("train", "validation", "test"),
    "rows": _whole(-1),
    "prompt": _one_of("plain", "chat"),
    "max_length": _whole(2),
}
VALUES = {
    "seed": _whole(0),
    "step_scheduler.global_batch_size": _whole(1),
    "step_scheduler.local_batch_size": _whole(1),
    "step_scheduler.num_epochs": _whole(1),
    "step_scheduler.max_steps": _or_nothing(_whole(1)),
    "step_scheduler.ckpt_every_steps": _whole(1),
    "step_scheduler.val_every_steps": _whole(1),
    "step_scheduler.save_checkpoint_every_epoch": _SWITCH,
    "dist_env.backend": _one_of("nccl", "gloo"),
    "dist_env.timeout_minutes": _whole(1),
    "model.pretrained_model_name_or_path": _TEXT,
    "model.revision": _TEXT,
    "model.torch_dtype": _DTYPE,
    "model.attn_implementation": _one_of(
        "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ),
    "model.use_liger_kernel": _SWITCH,
    "peft.dim": _whole(1),
    "peft.alpha": _number(0),
    "peft.dropout": _FRACTION,
    "peft.dropout_position": _one_of("pre", "post"),
    "peft.lora_A_init": _one_of("uniform", "xavier"),
    "distributed.activation_checkpointing": _SWITCH,
    "distributed.mp_policy.param_dtype": _DTYPE,
    "distributed.mp_policy.reduce_dtype": _DTYPE,
    "distributed.mp_policy.cast_forward_inputs": _SWITCH,
    "clip_grad_norm.max_norm": _or_nothing(_number(0)),
    **{f"dataset.{key}": allowed for key, allowed in ROWS.items()},
    **{f"validation_dataset.{key}": allowed for key, allowed in ROWS.items()},
    "dataloader.shuffle": _SWITCH,
    "dataloader.group_by_length": _SWITCH,
    "validation_dataloader.shuffle": _SWITCH,
    "optimizer.betas": Allowed(
        "two numbers from 0 to less than 1",
        lambda value: isinstance(value, list) and len(value) == 2 and all(map(_FRACTION.fits, value)),
    ),
    "optimizer.eps": _number(0),
    "optimizer.weight_decay": _number(0),
    "lr_scheduler.lr_decay_style": _one_of("constant", "cosine", "inverse-square-root", "linear", "WSD"),
    "lr_scheduler.init_lr": _number(0),
    "lr_scheduler.min_lr": _number(0),
    "checkpoint.enabled": _one_of(True, words="true, or the run would leave no adapter"),
    "checkpoint.checkpoint_dir": _TEXT,
    "checkpoint.model_save_format": _one_of("safetensors", words="safetensors, which PEFT reads"),
    "checkpoint.max_recent_checkpoints": _or_nothing(_whole(1)),
    "tensorboard.log_dir": _TEXT,
}


def refuse_nonsense(recipe: RecipeFile) -> None:
    """Hold each value that stands in the recipe against VALUES.

    Raises:
        WorkshopError: naming line, key, value and what it must be.
    """
    for key, allowed in VALUES.items():
        if key in recipe.lines and not allowed.fits(recipe.get(key)):
            raise recipe.error(key, f"{key} is {shown(recipe.get(key))}: it must be {allowed.words}.")


# --- The notebook's run as a NeMo AutoModel recipe: one YAML file, written from the profile.

TRACKERS = ("tensorboard", "wandb", "mlflow")


def write_recipe(run: "Run", path: Path, output: Path, gpus: int = 1, tracker: str = "tensorboard") -> Path:
    """Write the recipe of `run` (its profile, and the rows in its workspace) to `path`; returns `path`.

    Checkpoints and metrics will go to `output`. `gpus` is the number of data-parallel processes, over all
    nodes. With random weights (profile tiny) the model is saved beside the recipe, because a recipe loads its
    model from a folder.

    Raises:
        WorkshopError: the batch can't be shared by that many GPUs, notebook 01 has not been run in the
            workspace, or the tracker is unknown.
    """
    profile, workspace = run.profile, run.workspace
    if tracker not in TRACKERS:
        raise WorkshopError(f"tracker is {tracker!r}: choose one of {', '.join(TRACKERS)}.")
    local = local_batch_size(profile, gpus)
    splits = data.read_processed(workspace.data)
    rows = len(splits["train"])
    rows = min(rows, profile.train_rows) if profile.train_rows >= 0 else rows
    epoch, total, epochs = count_steps(profile, rows, gpus)
    values = {
        "title": profile.title,
        "name": profile.name,
        "rows": rows,
        "processes": "one GPU" if gpus == 1 else f"{gpus} GPUs",
        "dropped": f" {rows % gpus} row(s) do not share out and are left out." if rows % gpus else "",
        "epoch": epoch,
        "total": total,
        "seed": profile.seed,
        "batch": profile.batch_size,
        "local": local,
        "accumulate": profile.batch_size // (local * gpus),
        "epochs": epochs,
        "max_steps": "null" if profile.max_steps < 0 else profile.max_steps,
        "every": min(profile.eval_steps, total),
        "backend": "nccl" if profile.device == "cuda" else "gloo",
        "model": text(model_for_recipe(profile, path.parent)),
        "revision": text(profile.model_revision),
        "dtype": profile.dtype,
        "liger": str(profile.device == "cuda").lower(),
        "targets": json.dumps([f"*.{name}" for name in profile.lora_targets]),
        "rank": profile.lora_rank,
        "alpha": profile.lora_alpha,
        "dropout": number(profile.lora_dropout),
        "checkpointing": str(profile.gradient_checkpointing).lower(),
        "data": text(str(workspace.data)),
        "train_rows": profile.train_rows,
        "eval_rows": profile.eval_rows,
        "prompt": profile.prompt,
        "max_length": profile.max_length,
        "learning_rate": number(profile.learning_rate),
        "warmup": warmup_steps(profile, total),
        "percent": f"{profile.warmup_ratio:.0%}",
        "output": text(str(output)),
        "logs": text(str(output / "tensorboard")),
    }
    written = RECIPE.format(**values) + _tracker(tracker, output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(written, encoding="utf-8")
    return path


def count_steps(profile: "Profile", rows: int, gpus: int = 1) -> tuple[int, int, int]:
    """(steps of an epoch, steps of the run, epochs begun) for `rows` shared by `gpus` processes.

    NeMo AutoModel gives each process the same number of rows and drops the few that are left over, so on one
    GPU the figures are transformers' and on many a step may be missing at the end of an epoch.
    """
    shared = rows // gpus * gpus
    if shared == 0:
        raise WorkshopError(f"{rows} training rows can't be shared by {gpus} GPUs: use fewer GPUs.")
    epoch = math.ceil(shared / profile.batch_size)
    if profile.max_steps < 0:
        return epoch, epoch * profile.epochs, profile.epochs
    return epoch, profile.max_steps, math.ceil(profile.max_steps / epoch)


def warmup_steps(profile: "Profile", total: int) -> int:
    """Steps in which the learning rate rises, counted as transformers does; a recipe wants fewer than all."""
    return min(math.ceil(total * profile.warmup_ratio), total - 1)


def local_batch_size(profile: "Profile", gpus: int = 1) -> int:
    """Rows of one forward pass on each GPU: the most that divide the step's rows and fit the token budget.

    Raises:
        WorkshopError: `gpus` does not divide the batch.
    """
    if gpus < 1 or profile.batch_size % gpus:
        fit = [n for n in range(1, profile.batch_size + 1) if profile.batch_size % n == 0]
        raise WorkshopError(
            f"A step of {profile.batch_size} rows can't be shared by {gpus} GPUs: use "
            f"{', '.join(map(str, fit[:-1]))} or {fit[-1]}, or change batch_size in overrides."
        )
    share = profile.batch_size // gpus
    most = max(1, profile.tokens_per_batch // profile.max_length)
    return max(n for n in range(1, share + 1) if share % n == 0 and n <= most)


def model_for_recipe(profile: "Profile", folder: Path) -> str:
    """What the recipe loads: a hub id or a folder. A random model is saved to `folder/random_model` first."""
    from fiqa_helpers import model

    if profile.model != "random":
        return model.model_path(profile)
    target = folder / "random_model"
    tokenizer = model.load_tokenizer(profile)
    model.tiny_model(tokenizer).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(target)


def text(value: str) -> str:
    """`value` as a YAML string, whatever is in it.

    Raises:
        WorkshopError: NeMo AutoModel would read a `$` as the beginning of a variable's name.
    """
    if "$" in value:
        raise WorkshopError(
            f"{value!r} has a $ in it, which a recipe takes for a variable: use another path."
        )
    return json.dumps(value, ensure_ascii=False)


def number(value: float) -> str:
    """`value` so that YAML reads the same float: 2e-05 without a point would be a string."""
    written = repr(float(value))
    mantissa, exponent, power = written.partition("e")
    return f"{mantissa}.0e{power}" if exponent and "." not in mantissa else written


def _tracker(name: str, output: Path) -> str:
    if name == "wandb":
        return WANDB.format(output=text(str(output)))
    if name == "mlflow":
        return MLFLOW.format(output=text(f"sqlite:///{output / 'mlflow.db'}"))
    return ""


# --- Where and how a recipe is started: what fits, the command lines, a batch file for Slurm, a fresh
# folder.
#
# torchrun starts every form, on one GPU too. (With several GPUs the command `automodel` starts NeMo's own
# recipe file instead of the class that the YAML names: launcher/interactive.py of nemo-automodel 0.7.0.)

MODULE = "nemo_automodel.cli.app"
CPU_MODULE = "fiqa_helpers.machinery.recipe_run"
PORT = 29500  # of the rendezvous on the first node


def fresh_folder(workspace: Workspace, name: str = "recipe") -> Path:
    """A folder for one recipe run that nothing has been written to, `checkpoints/NAME/TIME`.

    A recipe that finds checkpoints in its folder goes on with that run, without being asked to.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    parent = workspace.checkpoints / name
    for suffix in ["", *(f"-{n}" for n in range(2, 1000))]:
        folder = parent / f"{stamp}{suffix}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run of this second
            continue
    raise WorkshopError(f"{parent} is full of runs of this second: start again.")


def refuse_batch(recipe: RecipeFile, gpus: int) -> int:
    """Forward passes of a step on each of `gpus` GPUs.

    Raises:
        WorkshopError: the step's rows can't be shared like that; names what can.
    """
    whole = recipe.whole_number("step_scheduler.global_batch_size")
    local = recipe.whole_number("step_scheduler.local_batch_size")
    if gpus < 1 or whole % gpus:
        fit = [str(n) for n in range(1, whole + 1) if whole % n == 0]
        raise recipe.error(
            "step_scheduler.global_batch_size",
            f"{whole} rows of a step can't be shared by {gpus} GPUs: use {', '.join(fit)} GPUs.",
        )
    if whole % (local * gpus):
        fit = [str(n) for n in range(1, whole // gpus + 1) if (whole // gpus) % n == 0]
        raise recipe.error(
            "step_scheduler.local_batch_size",
            f"local_batch_size {local} on {gpus} GPUs does not divide the {whole} rows of a step: "
            f"use {' or '.join(fit)}.",
        )
    return whole // (local * gpus)


def refuse_old_run(recipe: RecipeFile) -> None:
    """Raises:
    WorkshopError: the recipe's folder holds checkpoints, so NeMo would go on with them.
    """
    folder = Path(str(recipe.get("checkpoint.checkpoint_dir", "checkpoints/")))
    if any(folder.glob("epoch_*_step_*")):
        raise recipe.error(
            "checkpoint.checkpoint_dir",
            f"{folder} holds a run and NeMo would go on with it: give the recipe a new folder "
            "(fiqa_helpers.machinery.recipe.fresh_folder), or pass resume=True if that is what you want.",
        )


def refuse_other_model(recipe: RecipeFile) -> None:
    """Raises:
    WorkshopError: the run to be continued was made with another model; NeMo would begin anew in silence.
    """
    folder = Path(str(recipe.get("checkpoint.checkpoint_dir", "checkpoints/")))
    saved = folder / "LATEST" / "config.yaml"
    if not saved.is_file():
        return
    key = "model.pretrained_model_name_or_path"
    before, now = read_recipe(saved).get(key), recipe.get(key)
    if before != now:
        raise recipe.error(
            key,
            f"the run in {folder} was made with the model {before}, not {now}: use that one, or give the "
            "recipe a new folder (fiqa_helpers.machinery.recipe.fresh_folder).",
        )


def launch_line(
    path: Path | str, gpus: int = 1, nodes: int = 1, host: str = "", cpu: bool = False, python: str = ""
) -> str:
    """The command that runs the recipe on `gpus` GPUs of each of `nodes` nodes, to be typed on every node.

    `host` is the first node's name as the others reach it. With `cpu` the processes need no GPU.

    Raises:
        WorkshopError: the batch can't be shared like that, or several nodes and no host.
    """
    refuse_batch(read_recipe(Path(path)), gpus * nodes)
    start = f"{shlex.quote(python)} -m torch.distributed.run" if python else "torchrun"
    where = "--standalone"
    if nodes > 1:
        if not re.fullmatch(r"[A-Za-z0-9.-]+", host):
            raise WorkshopError(f"host is {host!r}: it must be the name of the first of the {nodes} nodes.")
        where = f"--nnodes {nodes} --rdzv-id fiqa --rdzv-backend c10d --rdzv-endpoint {host}:{PORT}"
    module = CPU_MODULE if cpu else MODULE
    return f"{start} {where} --nproc-per-node {gpus} -m {module} {shlex.quote(str(path))}"


def write_sbatch(
    path: Path | str,
    target: Path,
    gpus: int = 8,
    nodes: int = 1,
    hours: int = 4,
    partition: str = "",
    account: str = "",
    setup: str = "source .venv/bin/activate",
) -> Path:
    """Write a complete batch file for Slurm to `target`; returns it. `sbatch TARGET` submits it.

    Slurm sends SIGTERM two minutes before the time is up, at which NeMo saves a checkpoint and ends; the job
    then queues itself again and goes on from it, because the folder is the same. `setup` makes the
    environment's programs known.

    Raises:
        WorkshopError: the batch can't be shared like that, or a name with signs that Slurm does not take.
    """
    refuse_batch(read_recipe(Path(path)), gpus * nodes)
    for name, value in (("partition", partition), ("account", account)):
        if not re.fullmatch(r"[A-Za-z0-9_.,-]*", value):
            raise WorkshopError(f"{name} is {value!r}: use letters, digits and . , _ - only.")
    if re.search(r"\s", str(target.resolve())):
        raise WorkshopError(f"{target} has a space in its path, which Slurm does not take: use another.")
    if hours < 1:
        raise WorkshopError(f"hours is {hours}: a job needs at least one.")
    extra = "".join(
        f"#SBATCH --{name}={value}\n"
        for name, value in (("partition", partition), ("account", account))
        if value
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    written = _SBATCH.format(
        nodes=nodes,
        gpus=gpus,
        hours=f"{hours:02}",
        late=3600 * hours - 180,
        extra=extra,
        setup=setup,
        port=PORT,
        module=MODULE,
        logs=target.resolve().parent / "slurm-%j.log",
        recipe=shlex.quote(str(Path(path).resolve())),
        project=shlex.quote(str(Path(__file__).resolve().parents[2])),
    )
    target.write_text(written, encoding="utf-8")
    return target


_SBATCH = """\
#!/bin/bash
#SBATCH --job-name=fiqa-lora
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive
#SBATCH --time={hours}:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={logs}
{extra}
set -euo pipefail
cd {project}
{setup}

export HF_HUB_OFFLINE=1  # fetch the model on the login node first: jobs often have no network
export TOKENIZERS_PARALLELISM=false
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head_node=${{nodes[0]}}  # not `| head`: under pipefail a scontrol that still writes would end the job

# one torchrun a node; each starts {gpus} processes, one a GPU
status=0
srun torchrun \\
  --nnodes "$SLURM_NNODES" --nproc-per-node {gpus} \\
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:{port}" \\
  -m {module} {recipe} || status=$?

# ended near the time limit: that was Slurm's SIGTERM; the run is saved and goes on when its turn comes again
if (( status != 0 && SECONDS > {late} )); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


# --- Does a recipe do what it should? Everything but the weights is built, without a GPU.


@dataclass(frozen=True)
class RecipeReport:
    """What a recipe would do. Learning rates are one for each optimizer step, in order."""

    path: Path
    gpus: int
    rows: int
    accumulation: int  # forward passes that make a step, on each GPU
    steps_per_epoch: int
    steps: int
    learning_rates: list[float]
    lora_modules: list[str]
    trainable: int
    base_parameters: int
    batch: dict[str, tuple[int, ...]]  # shapes of the first batch on the first GPU
    trained_tokens: int  # in that batch
    trained_text: str  # the beginning of what the first row is trained on
    tokenizer: str

    def __str__(self) -> str:
        peak = max(self.learning_rates)
        return (
            f"{self.path.name} on {'one GPU' if self.gpus == 1 else f'{self.gpus} GPUs'}: {self.rows} rows, "
            f"{self.steps_per_epoch} steps an epoch, {self.steps} in all; accumulation {self.accumulation}\n"
            f"learning rate {self.learning_rates[0]:.1e} -> {peak:.1e} at step "
            f"{self.learning_rates.index(peak) + 1} -> {self.learning_rates[-1]:.1e}\n"
            f"LoRA on {len(self.lora_modules)} layers: {self.trainable:,} trainable of "
            f"{self.base_parameters:,} parameters\n"
            f"first batch {self.batch.get('input_ids')} with {self.trained_tokens} trained tokens (tokenizer "
            f"{self.tokenizer}), the first row from {self.trained_text!r}"
        )


def check_recipe(
    path: Path | str,
    gpus: int = 1,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    resume: bool = False,
) -> RecipeReport:
    """Build everything of a recipe but the weights and report it; nothing is launched or written.

    `tokenizer` stands in for the recipe's own where the hub can't be reached. With `resume` the folder of
    checkpoints may hold a run, which the recipe would go on with.

    Raises:
        WorkshopError: what is wrong, in which line or file, and the remedy.
    """
    recipe = read_recipe(Path(path))
    with _quiet():
        refuse_ignored(recipe)
        refuse_nonsense(recipe)
        refuse_values(recipe)
        refuse_batch(recipe, gpus)
        refuse_other_model(recipe) if resume else refuse_old_run(recipe)
        return _build(recipe, gpus, tokenizer)


def _build(recipe: RecipeFile, gpus: int, tokenizer: "PreTrainedTokenizerBase | None") -> RecipeReport:
    import torch
    from nemo_automodel.components.config.loader import load_yaml_config
    from nemo_automodel.recipes._typed_config import RecipeConfig

    _refuse_targets(recipe)
    config = RecipeConfig(load_yaml_config(str(recipe.path)))
    for tracker in ("wandb", "mlflow"):
        if tracker in recipe.values and find_spec(tracker) is None:
            raise recipe.error(
                tracker, f"{tracker} is not installed: `pip install {tracker}`, or remove the section."
            )
    with _errors_of(recipe, "model"):
        skeleton = _skeleton(str(recipe.get("model.pretrained_model_name_or_path")))
    base = sum(p.numel() for p in skeleton.parameters())
    with _errors_of(recipe, "peft"), torch.device("meta"):
        modules = _add_lora(recipe, skeleton, config.peft.instantiate())
    trainable = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)
    with _errors_of(recipe, "dataset"):
        tokenizer = tokenizer or config.dataset.tokenizer.instantiate()
        loader = config.dataloader.build(tokenizer=tokenizer, dp_rank=0, dp_world_size=gpus)
        for other in config.validation_dataloaders.values():
            other.build(tokenizer=tokenizer, dp_rank=0, dp_world_size=gpus)
        batch = next(iter(loader))
    if problem := fault_of_batch(batch, tokenizer.eos_token_id, recipe.get("dataset.max_length", 2048)):
        raise recipe.error("dataset", problem)
    with _errors_of(recipe, "step_scheduler"):
        local = recipe.whole_number("step_scheduler.local_batch_size")
        settings = replace(config.step_scheduler, preemption_signal=None)  # no signal handler in this process
        steps = settings.build(loader, gpus, local)
        total = min(steps.max_steps, steps.num_epochs * steps.epoch_len)
    with _errors_of(recipe, "optimizer"):
        _refuse_rate(recipe)
        optimizer = config.optimizer.build(skeleton, is_peft=True)
    _refuse_warmup(recipe, total)
    with _errors_of(recipe, "lr_scheduler"):
        schedule = config.lr_scheduler.build(optimizer, steps)[0]
        rates = []
        for _ in range(total):
            rates.append(optimizer[0].param_groups[0]["lr"])
            schedule.step(1)
    with _errors_of(recipe, "loss_fn"):
        config.loss_fn.build()
    with _errors_of(recipe, "checkpoint"):
        assert config.checkpoint.checkpoint_dir
    labels = batch["labels"][0]
    return RecipeReport(
        path=recipe.path,
        gpus=gpus,
        rows=len(loader.dataset),
        accumulation=steps.grad_acc_steps,
        steps_per_epoch=steps.epoch_len,
        steps=total,
        learning_rates=rates,
        lora_modules=modules,
        trainable=trainable,
        base_parameters=base,
        batch={name: tuple(values.shape) for name, values in batch.items()},
        trained_tokens=int((batch["labels"] != -100).sum()),
        trained_text=tokenizer.decode(labels[labels != -100][:12]),
        tokenizer=Path(tokenizer.name_or_path).name,
    )


def _refuse_targets(recipe: RecipeFile) -> None:
    """Each name of a function or class in the file must lead somewhere, and the recipe to one that trains."""
    from nemo_automodel.cli.utils import resolve_recipe_name
    from nemo_automodel.components.config.loader import _resolve_target
    from nemo_automodel.components.launcher.interactive import resolve_recipe_cls
    from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction as Parent

    for key in recipe.lines:
        if key.endswith(("._target_", ".collate_fn")):
            try:
                _resolve_target(recipe.get(key))
            except Exception as error:
                raise recipe.error(
                    key, f"there is no {recipe.get(key)} ({_first_line(error)}): correct it."
                ) from None
    try:
        found = resolve_recipe_cls(resolve_recipe_name(str(recipe.get("recipe"))))
    except Exception as error:
        raise recipe.error(
            "recipe", f"there is no recipe {recipe.get('recipe')!r} ({_first_line(error)})."
        ) from None
    if not (isinstance(found, type) and issubclass(found, Parent)):
        raise recipe.error("recipe", f"{found.__name__} is no recipe for fine-tuning: use FiqaRecipe.")


def _skeleton(name: str):
    """The model's architecture on the meta device; the 8B one also without the hub."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fiqa_helpers.machinery.machine import NEMOTRON
    from fiqa_helpers.model import reference_config

    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise WorkshopError(f"there is no folder {name}: name a model's folder or a hub id")
    try:  # what is on this machine, and the 8B model's architecture from this package: no waiting for the hub
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        config = reference_config() if name == NEMOTRON else AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _add_lora(recipe: RecipeFile, skeleton, peft) -> list[str]:
    """Attach NeMo's LoRA to `skeleton`; names of the layers. A pattern that matches none is refused."""
    import torch
    from nemo_automodel.components._peft.lora import apply_lora_to_linear_modules

    linear = [name for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)]
    for pattern in peft.target_modules:
        if not fnmatch.filter(linear, pattern):
            ends = sorted({f"*.{name.rpartition('.')[2]}" for name in linear})
            raise recipe.error(
                "peft.target_modules",
                f"{pattern} matches no layer of the model and NeMo would leave it out: choose of "
                f"{', '.join(ends)}.",
            )
    apply_lora_to_linear_modules(skeleton, peft)
    found = [name for name, module in skeleton.named_modules() if hasattr(module, "lora_A")]
    if not found:
        raise recipe.error("peft.target_modules", "no layer would get an adapter: name some layers.")
    return found


def _refuse_rate(recipe: RecipeFile) -> None:
    rate = recipe.get("optimizer.lr")
    if not isinstance(rate, float | int) or not 0 < rate < 1:
        raise recipe.error("optimizer.lr", f"lr is {rate!r}: it must be a number below 1, such as 2.0e-4.")


def _refuse_warmup(recipe: RecipeFile, total: int) -> None:
    warmup = recipe.get("lr_scheduler.lr_warmup_steps")
    if warmup is not None and recipe.whole_number("lr_scheduler.lr_warmup_steps", 0) >= total:
        raise recipe.error(
            "lr_scheduler.lr_warmup_steps", f"warm-up takes {warmup} of {total} steps: it must be shorter."
        )


@contextlib.contextmanager
def _errors_of(recipe: RecipeFile, section: str) -> Iterator[None]:
    """Turn what a section fails with into one sentence with its line."""
    try:
        yield
    except WorkshopError as error:
        if str(recipe.path) in str(error):
            raise
        raise recipe.error(section, str(error)) from None
    except Exception as error:
        raise recipe.error(
            section, f"{section} can't be built ({_first_line(error)}): correct it."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """NeMo narrates what it builds; a report follows."""
    logger = logging.getLogger("nemo_automodel")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# --- Start a recipe in processes of its own, follow it from its metrics, find the adapter that it leaves.

POLL = 0.3  # seconds between two looks at the metrics
PATIENCE = 60  # seconds that a stopped run is given to save its checkpoint
OUT_OF_MEMORY = (
    "set activation_checkpointing: true in the recipe's section distributed, or a smaller local_batch_size; "
)


class RecipePanel(LivePanel):
    """The live panel for a run in other processes: no samples, figures from its metrics files."""

    def __init__(self, title: str, png: Path | None = None, live: bool | None = None):
        super().__init__([], lambda questions: [], 0, title, png, live)

    def take(self, folder: Path) -> None:
        """Show what the run's metrics files hold by now. Steps are counted from 1, as the Trainer does."""
        self.history = read_metrics(folder)
        trained = [row for row in self.history if "loss" in row]
        if trained:
            self.step, self.total = trained[-1]["step"], trained[-1]["steps"]
        self.show(EVALUATING if self.step == self.total else TRAINING)

    def wants_to_stop(self) -> bool:
        """Was the Stop button pressed?"""
        return self.stop.is_set()

    def waits(self, phase: str) -> None:
        """Say what is going on before there are metrics."""
        self.show(phase)


def read_metrics(folder: Path) -> list[dict]:
    """Lines of training.jsonl and validation.jsonl joined by step, in the panel's words and units.

    A half line, which its writer has not finished, waits for the next look. A step that a resumed run took
    again counts once, as taken last.
    """
    rows: dict[int, dict] = {}
    names = {
        "training": {"loss": "loss", "lr": "learning_rate", "tps": "tokens_per_second", "mem": "memory_gib"},
        "validation": {"val_loss": "eval_loss"},
    }
    for file, columns in names.items():
        with contextlib.suppress(FileNotFoundError):
            for line in (folder / f"{file}.jsonl").read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    row = rows.setdefault(record["step"] + 1, {"step": record["step"] + 1})
                    row |= {ours: record[theirs] for theirs, ours in columns.items()}
                    if "steps" in record:
                        row |= {"steps": record["steps"]}
                        row |= {"seconds": record["num_tokens_per_step"] / max(record["tps"], 1e-9)}
    return [rows[step] for step in sorted(rows)]


def run_recipe(
    path: Path | str, panel: RecipePanel, processes: int = 1, cpu: bool = False, resume: bool = False
) -> Path:
    """Run the recipe on this machine and show it in `panel`; returns the folder of the adapter it left.

    The output of all processes goes to `run.log` in the recipe's checkpoint folder. Stop (the button or an
    interrupt) asks NeMo for a checkpoint and ends the run.

    Raises:
        WorkshopError: what `check_recipe` refuses, before any process is started; or the run failed.
    """
    check_recipe(path, processes, resume=resume)
    folder = Path(read_recipe(Path(path)).get("checkpoint.checkpoint_dir"))
    with disk_errors(folder, "give the recipe another checkpoint_dir"):
        folder.mkdir(parents=True, exist_ok=True)
    line = launch_line(path, processes, cpu=cpu, python=sys.executable)
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    cores = max(1, (os.cpu_count() or 1) // processes)
    environment.setdefault("OMP_NUM_THREADS", str(cores))  # torchrun's own choice is 1
    with open(folder / "run.log", "ab") as log, panel:
        began = log.tell()
        process = subprocess.Popen(
            shlex.split(line),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # the interrupt button is for the panel, which asks NeMo to stop
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        try:
            _follow(process, panel, folder)
        finally:
            _end(process)
            panel.take(folder)
        if process.returncode != 0 and not panel.stopped:
            raise WorkshopError(why_it_failed(folder / "run.log", began))
    return newest_adapter(folder)


def _follow(process: subprocess.Popen, panel: RecipePanel, folder: Path) -> None:
    while process.poll() is None:
        if (folder / "training.jsonl").exists():
            panel.take(folder)
        else:
            panel.waits("starting the processes and loading the model")
        if panel.wants_to_stop():
            panel.stopped = "Stop button"
            return
        time.sleep(POLL)


def _end(process: subprocess.Popen) -> None:
    """Ask a run that still goes to save and stop; end it for good if it does not."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            kill_all(process.pid)
    process.wait()


def kill_all(pid: int) -> None:
    """SIGKILL a torchrun and the processes it started, each of which has a session of its own."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        torchrun = psutil.Process(pid)
        family = [*torchrun.children(recursive=True), torchrun]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family[:-1], timeout=PATIENCE)


def _die_with_parent() -> None:
    """When the kernel dies, torchrun gets SIGTERM and ends its processes (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def why_it_failed(log: Path, began: int = 0) -> str:
    """One sentence from a run's log: the error that came first, which is seldom in the last line."""
    with log.open("rb") as file:
        file.seek(began)
        written = file.read().decode(errors="replace")
    pattern = r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)): ?(.*)$"
    for kind, reason in re.findall(pattern, written, re.MULTILINE):
        if "ChildFailedError" not in kind and reason:
            said = reason if kind.endswith("WorkshopError") else f"{kind.rpartition('.')[2]}: {reason}"
            remedy = OUT_OF_MEMORY if "OutOfMemoryError" in kind else ""
            return f"The recipe failed ({said[:300].rstrip('.')}): {remedy}look at {log}."
    return f"The recipe failed: look at the last lines of {log}."


def newest_adapter(folder: Path) -> Path:
    """The PEFT adapter in the newest checkpoint of a recipe run.

    Raises:
        WorkshopError: the run has saved none.
    """
    found = folder / "LATEST" / "model"
    if not (found / "adapter_model.safetensors").is_file():
        raise WorkshopError(
            f"{folder} holds no checkpoint with an adapter: did the run end before its first?"
        )
    return found.resolve()
