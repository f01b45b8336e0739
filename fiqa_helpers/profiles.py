"""Profiles: one name that sets model, data, precision, batch layout and length of a run; overrides."""

import contextlib
import difflib
from dataclasses import dataclass, fields, replace

from fiqa_helpers.base import WorkshopError, a_type, shown
from fiqa_helpers.machinery.machine import NEMOTRON

# --- The parameter `overrides`: a YAML mapping, checked against names, types and ranges before anything
# runs.

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


# --- Profiles: one name that sets model, data, precision, batch layout and length of a run for a machine.


@dataclass(frozen=True)
class Profile:
    """Everything that decides what a run computes. Lengths are in tokens, memory in GiB."""

    name: str
    title: str
    model: str  # hub id, folder, "packaged" (SmolLM2 from the package index) or "random" (tests)
    model_revision: str  # hub revision: a branch, tag or commit hash
    data: str  # "hub", "packaged" or a folder of split files
    device: str  # "cpu" or "cuda"
    dtype: str  # "float32" or "bfloat16": the base model's weights and the forward pass
    layout: str  # "padded": rows side by side; "packed": rows end to end, attention kept inside each
    max_length: int  # tokens of a row, prompt and answer together; longer rows are cut
    tokens_per_batch: int  # token budget of one forward pass
    batch_size: int  # rows of one optimizer step
    learning_rate: float  # peak of AdamW's schedule
    epochs: int  # passes over the training rows, unless max_steps ends the run earlier
    max_steps: int  # optimizer steps; -1 means all of the epochs
    warmup_ratio: float  # part of the steps in which the learning rate rises
    lora_rank: int
    lora_alpha: int
    lora_dropout: float
    lora_targets: tuple[str, ...]
    gradient_checkpointing: bool
    training: str  # "reference": answers as they are; "topical": their sentences on the question
    topical_words: int  # with topical: how many words of each training answer are kept; 0 is all
    train_rows: int  # rows used for training; -1 means all
    eval_rows: int  # validation rows; -1 means all
    eval_steps: int  # optimizer steps between evaluations (and checkpoints)
    sample_steps: int  # optimizer steps between sample answers
    max_new_tokens: int  # longest generated answer
    prompt: str  # "plain" or "chat"
    seed: int

    def banner(self) -> str:
        """One line that keeps a laptop's figure from being read as an 8B one."""
        model = {"packaged": "SmolLM2-135M-Instruct", "random": "random weights"}.get(self.model, self.model)
        data = {"packaged": "packaged FiQA rows", "hub": "FiQA from the hub"}.get(self.data, self.data)
        return f"Profile {self.name} ({self.title}): {model}, {self.dtype} on {self.device}, {data}"


REFERENCE = Profile(
    name="reference",
    title="the reference recipe",
    model=NEMOTRON,
    model_revision="main",
    data="hub",
    device="cuda",
    dtype="bfloat16",
    layout="padded",
    max_length=2048,
    tokens_per_batch=8192,
    batch_size=16,
    learning_rate=2e-4,
    epochs=3,
    max_steps=-1,
    warmup_ratio=0.1,
    lora_rank=8,
    lora_alpha=32,
    lora_dropout=0.05,
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj"),
    gradient_checkpointing=True,
    training="reference",
    topical_words=0,
    train_rows=-1,
    eval_rows=-1,
    eval_steps=50,
    sample_steps=100,
    max_new_tokens=256,
    prompt="plain",
    seed=42,
)

_LAPTOP = replace(
    REFERENCE,
    name="laptop",
    title="2 CPU cores, no GPU",
    model="packaged",
    data="packaged",
    device="cpu",
    dtype="float32",
    max_length=320,
    tokens_per_batch=1024,
    batch_size=8,
    learning_rate=4e-3,  # with so few steps; chosen among 48 settings (benchmarks/RECIPE.md)
    epochs=1,
    max_steps=24,
    gradient_checkpointing=False,
    training="topical",
    topical_words=100,
    train_rows=400,
    eval_rows=16,
    eval_steps=8,
    sample_steps=12,
    max_new_tokens=128,
)
_GPU80 = replace(
    REFERENCE, name="gpu80", title="one 80 GB GPU", layout="packed", gradient_checkpointing=False
)

PROFILES = {
    "laptop": _LAPTOP,
    "gpu24": replace(_GPU80, name="gpu24", title="one 24 GB GPU", gradient_checkpointing=True),
    "gpu80": _GPU80,
    "tiny": replace(
        _LAPTOP,
        name="tiny",
        title="random weights, for tests only",
        model="random",
        training="reference",
        topical_words=0,
        max_length=128,
        tokens_per_batch=512,
        batch_size=4,
        max_steps=4,
        train_rows=24,
        eval_rows=4,
        eval_steps=2,
        sample_steps=2,
        max_new_tokens=8,
    ),
}

# The words that `training` stands for; a number in `overrides` goes before it.
TRAININGS = {"reference": {"topical_words": 0}, "topical": {"topical_words": 100}}

# What a notebook and the one before it, or an adapter and the run that uses it, have in common: otherwise two
# different things are compared.
MUST_AGREE = ("model", "model_revision", "data", "prompt", "training", "topical_words")

MEMORY_NEEDED = {"gpu24": 21, "gpu80": 60}  # GiB free on the card for profile auto to choose it


def load_profile(profile: str = "auto", overrides: str = "") -> Profile:
    """The named profile with `overrides`, a YAML mapping such as `{max_steps: 20, learning_rate: 1e-4}`.

    `auto` takes the largest profile that fits this machine and prints why. A profile that was asked for by
    name and cannot run here is refused; nothing falls back in silence.

    Raises:
        WorkshopError: unknown profile, unknown or impossible override, or a machine that cannot run it.
    """
    chosen = planned_profile(profile, overrides)
    _refuse_if_impossible(chosen)
    return chosen


def planned_profile(profile: str = "auto", overrides: str = "") -> Profile:
    """`load_profile` for a run that will be elsewhere: whether this machine can make it is not asked."""
    if profile == "auto":
        profile, reason = choose_profile()
        print(f"Profile auto chose {profile}: {reason}.")
    if profile not in PROFILES:
        raise WorkshopError(f"profile is {shown(profile)}: choose one of auto, {', '.join(PROFILES)}.")
    kinds = {field.name: field.type for field in fields(Profile) if field.name not in ("name", "title")}
    wanted = parse_overrides(overrides, kinds)
    if "training" in wanted:
        wanted = TRAININGS[wanted["training"]] | wanted
    elif "topical_words" in wanted:
        wanted["training"] = "topical" if wanted["topical_words"] else "reference"
    chosen = replace(PROFILES[profile], **wanted)
    if (chosen.training == "topical") != (chosen.topical_words > 0):
        raise WorkshopError(
            f"training is {chosen.training} and topical_words {chosen.topical_words}: set one of the two."
        )
    if chosen.tokens_per_batch < chosen.max_length:
        raise WorkshopError(
            f"tokens_per_batch is {chosen.tokens_per_batch}, less than one row of max_length "
            f"{chosen.max_length}: raise tokens_per_batch or lower max_length."
        )
    return chosen


def choose_profile() -> tuple[str, str]:
    """(name, reason) of the largest profile that this machine can run."""
    from fiqa_helpers.machinery import machine

    gpu = machine.gpu()
    if gpu is None:
        return "laptop", "no NVIDIA GPU was found"
    if gpu.problem:
        return "laptop", f"{gpu.name} cannot be used: {gpu.problem}"
    if not gpu.bf16:
        return "laptop", f"{gpu.name} does not compute in bf16, which the GPU profiles need"
    for name in ("gpu80", "gpu24"):
        if gpu.free_gib >= MEMORY_NEEDED[name]:
            return name, f"{gpu.name} has {gpu.free_gib:.0f} GiB free, {MEMORY_NEEDED[name]} are needed"
    return (
        "laptop",
        f"{gpu.name} has {gpu.free_gib:.0f} GiB free, {MEMORY_NEEDED['gpu24']} are needed for gpu24",
    )


def differences(profile: Profile) -> list[dict[str, object]]:
    """Each setting of `profile` that differs from the reference run: rows of setting, reference, here."""
    skip = {"name", "title", "model_revision"}
    return [
        {
            "setting": field.name,
            "reference": getattr(REFERENCE, field.name),
            "here": getattr(profile, field.name),
        }
        for field in fields(Profile)
        if field.name not in skip and getattr(profile, field.name) != getattr(REFERENCE, field.name)
    ]


def _refuse_if_impossible(profile: Profile) -> None:
    """A run that this machine cannot make stops here, with the remedy, before anything is downloaded."""
    if profile.device != "cuda":
        return
    from fiqa_helpers.machinery import machine

    gpu = machine.gpu()
    if gpu is None:
        raise WorkshopError(
            f"Profile {profile.name} needs an NVIDIA GPU and none was found: "
            "use profile laptop, or a machine with one."
        )
    if gpu.problem:
        raise WorkshopError(f"Profile {profile.name} cannot use {gpu.name}: {gpu.problem}")
    if profile.dtype == "bfloat16" and not gpu.bf16:
        raise WorkshopError(
            f"{gpu.name} does not compute in bf16: "
            "use a GPU of the Ampere generation or newer, or profile laptop."
        )
    config = machine.config_of(profile)
    problem = machine.memory_advice(profile, config, gpu.free_gib * machine.GIB) if config else ""
    if problem:
        raise WorkshopError(f"On {gpu.name} {problem}, or end what else uses the card.")
