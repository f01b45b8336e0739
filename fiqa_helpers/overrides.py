"""The parameter `overrides`: a YAML mapping, checked against names, types and ranges before anything runs."""

import contextlib
import difflib

from fiqa_helpers.errors import WorkshopError

CHOICES = {
    "device": ("cpu", "cuda"),
    "dtype": ("float32", "bfloat16"),
    "layout": ("padded", "packed"),
    "prompt": ("plain", "chat"),
}
RANGES = {
    "max_length": (16, 131_072),
    "tokens_per_batch": (16, 1_048_576),
    "batch_size": (1, 4096),
    "learning_rate": (0.0, 1.0),
    "epochs": (1, 1000),
    "max_steps": (-1, 10_000_000),
    "warmup_ratio": (0.0, 1.0),
    "lora_rank": (1, 1024),
    "lora_alpha": (1, 4096),
    "lora_dropout": (0.0, 0.9),
    "train_rows": (-1, 100_000_000),
    "eval_rows": (-1, 100_000_000),
    "eval_steps": (1, 1_000_000),
    "sample_steps": (1, 1_000_000),
    "max_new_tokens": (1, 8192),
    "seed": (0, 2**32 - 1),
}


def parse_overrides(text: str, kinds: dict[str, type]) -> dict[str, object]:
    """The YAML mapping `text`, its values held against `kinds` (name -> type) and the ranges above.

    Raises:
        WorkshopError: not a mapping, a name that is not in `kinds`, or a value of the wrong type or size.
    """
    import yaml

    try:
        values = yaml.safe_load(text) if text.strip() else {}
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict):
        raise WorkshopError(f"overrides is {text!r}: write a YAML mapping such as {{max_steps: 20}}.")
    checked = {}
    for key, value in values.items():
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(kinds)}."
            raise WorkshopError(f"overrides names {key!r}, which no profile has: {hint}")
        checked[key] = _value(key, value, kinds[key])
    return checked


def _value(key: str, value: object, kind: object) -> object:
    """One override in its type, or a sentence saying what it should be."""
    if key == "lora_targets":
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not all(isinstance(n, str) and n for n in names):
            raise WorkshopError(f"lora_targets is {value!r}: write a list such as [q_proj, v_proj].")
        return tuple(names)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 (no dot) as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise WorkshopError(f"{key} is {value!r}, a {type(value).__name__}: it must be a {kind.__name__}.")
    if key in CHOICES and value not in CHOICES[key]:
        raise WorkshopError(f"{key} is {value!r}: choose one of {', '.join(CHOICES[key])}.")
    low, high = RANGES.get(key, (None, None))
    if low is not None and not low <= value <= high:  # also refuses nan
        raise WorkshopError(f"{key} is {value}: it must lie between {low} and {high}.")
    if key in ("max_steps", "train_rows", "eval_rows") and value == 0:
        raise WorkshopError(f"{key} is 0: use a positive number, or -1 for all.")
    if key == "learning_rate" and value == 0:
        raise WorkshopError("learning_rate is 0: nothing would be learned; the reference value is 2e-4.")
    if isinstance(value, str) and not value:
        raise WorkshopError(f"{key} is empty: leave it out of overrides to keep the profile's value.")
    return value
