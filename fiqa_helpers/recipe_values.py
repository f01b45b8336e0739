"""What each value of a recipe may be, so that nonsense is named with its line before anything is built.

NeMo AutoModel takes many values unseen: a misspelt `lora_A_init` gives another start of the adapter, the text
"nonsense" where true or false belongs counts as true.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fiqa_helpers.errors import shown
from fiqa_helpers.recipe_schema import RecipeFile


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
