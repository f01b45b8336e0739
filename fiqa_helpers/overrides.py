"""The parameter `overrides`: a YAML mapping, checked against names, types and ranges before anything runs."""

import contextlib
import difflib

from fiqa_helpers.errors import WorkshopError, a_type, shown

CHOICES = {
    "device": ("cpu", "cuda"),
    "dtype": ("float32", "bfloat16"),
    "layout": ("padded", "packed"),
    "prompt": ("plain", "chat"),
    "training": ("reference", "topical"),
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
    "topical_words": (0, 100_000),
    "train_rows": (-1, 100_000_000),
    "eval_rows": (-1, 100_000_000),
    "eval_steps": (1, 1_000_000),
    "sample_steps": (1, 1_000_000),
    "max_new_tokens": (1, 8192),
    "seed": (0, 2**32 - 1),
}


TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)  # Llama's linear layers
LONGEST = 10_000  # characters; nobody writes more by hand


def parse_overrides(text: str, kinds: dict[str, type]) -> dict[str, object]:
    """The YAML mapping `text`, its values held against `kinds` (name -> type) and the ranges above.

    Raises:
        WorkshopError: not a mapping, a name that is not in `kinds`, or a value of the wrong type or size.
    """
    checked = {}
    for key, value in _mapping(text).items():
        if key not in kinds:
            near = difflib.get_close_matches(str(key).lower(), kinds, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(kinds)}."
            raise WorkshopError(f"overrides names {shown(key)}, which no profile has: {hint}")
        checked[key] = _targets(value) if key == "lora_targets" else _value(key, value, kinds[key])
    return checked


def _mapping(text: str) -> dict:
    """What the YAML says, with every key given once."""
    import yaml

    values, names = "unreadable", []
    with contextlib.suppress(Exception):  # PyYAML lets ValueError, IndexError and RecursionError through
        if len(text) <= LONGEST:
            values = yaml.safe_load(text)
            names = [key.value for key, _ in yaml.compose(text).value] if values else []
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise WorkshopError(f"overrides is {shown(text)}: write a YAML mapping such as {{max_steps: 20}}.")
    for name in names:
        if names.count(name) > 1:
            raise WorkshopError(f"overrides gives {name} twice: keep one of the two.")
    return values


def _targets(value: object) -> tuple[str, ...]:
    """The names of the layers that get an adapter."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise WorkshopError(f"lora_targets is {shown(value)}: write a list such as [q_proj, v_proj].")
    for name in names:
        if name not in TARGETS:
            raise WorkshopError(f"lora_targets names {shown(name)}: known are {', '.join(TARGETS)}.")
    return tuple(names)


def _value(key: str, value: object, kind: type) -> object:
    """One override in its type, or a sentence saying what it should be."""
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 (no dot) as text
        with contextlib.suppress(ValueError):
            value = float(value)
    right = isinstance(value, (int, float) if kind is float else kind)
    if not right or (isinstance(value, bool) and kind is not bool):
        raise WorkshopError(f"{key} is {shown(value)}, {a_type(type(value))}: it must be {a_type(kind)}.")
    if key in CHOICES and value not in CHOICES[key]:
        raise WorkshopError(f"{key} is {shown(value)}: choose one of {', '.join(CHOICES[key])}.")
    low, high = RANGES.get(key, (None, None))
    if low is not None and not low <= value <= high:  # also refuses nan
        raise WorkshopError(f"{key} is {shown(value)}: it must lie between {low} and {high}.")
    if key in ("max_steps", "train_rows", "eval_rows") and value == 0:
        raise WorkshopError(f"{key} is 0: use a positive number, or -1 for all.")
    if key == "learning_rate" and value == 0:
        raise WorkshopError("learning_rate is 0: nothing would be learned; the reference value is 2e-4.")
    if value == "":
        raise WorkshopError(f"{key} is empty: leave it out of overrides to keep the profile's value.")
    if isinstance(value, str) and not value.isprintable():
        raise WorkshopError(f"{key} is {shown(value)}: it holds characters that cannot be printed.")
    return float(value) if kind is float else value
