"""Profiles: one name that sets model, data, precision, batch layout and length of a run; overrides.

The defaults of `Profile` are the reference recipe; profiles.yaml holds what each profile changes of it.
`planned_profile` refuses a wrong override, `load_profile` also a machine that cannot make the run.
"""

import difflib
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from fiqa_helpers.base import WorkshopError
from fiqa_helpers.machinery import machine
from fiqa_helpers.machinery.machine import NEMOTRON


def _number(value: object) -> object:
    """YAML 1.1 reads 1e-4 (no dot) as text."""
    return float(value) if isinstance(value, str) else value


# Kinds of settings. They are strict: a number is no text, `true` is no number, 20.0 is no count.
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
AllOr = Literal[-1] | Count  # -1 is all
Number = Annotated[float, BeforeValidator(_number)]
Layer = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Layers = Annotated[tuple[Layer, ...], Field(min_length=1, strict=False)]  # YAML has lists


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Profile:
    """Everything that decides what a run computes; the defaults are the reference recipe. Lengths in tokens.

    pydantic checks names, types and ranges wherever one is made, also by `dataclasses.replace`.
    """

    name: str = "reference"
    title: str = "the reference recipe"
    model: Text = NEMOTRON  # hub id, folder, "packaged" (SmolLM2 from the package index) or "random" (tests)
    model_revision: Text = "main"  # hub revision: a branch, tag or commit hash
    data: Text = "hub"  # "hub", "packaged", a folder of split files or a single file
    device: Literal["cpu", "cuda"] = "cuda"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # the base model's weights and the forward pass
    layout: Literal["padded", "packed"] = "padded"  # rows side by side; or end to end, attention inside each
    max_length: int = Field(2048, ge=16)  # of a row, prompt and answer; longer rows are cut
    tokens_per_batch: int = Field(8192, ge=16)  # token budget of one forward pass
    batch_size: int = Field(16, ge=1, le=4096)  # rows of one optimizer step
    learning_rate: Number = Field(2e-4, gt=0, le=1)  # peak of AdamW's schedule
    epochs: Count = 3  # passes over the training rows, unless max_steps ends the run earlier
    max_steps: AllOr = -1  # optimizer steps; -1 means all of the epochs
    warmup_ratio: Number = Field(0.1, ge=0, le=1)  # part of the steps in which the learning rate rises
    lora_rank: int = Field(8, ge=1, le=1024)
    lora_alpha: int = Field(32, ge=1, le=4096)
    lora_dropout: Number = Field(0.05, ge=0, le=0.9)
    lora_targets: Layers = ("q_proj", "k_proj", "v_proj", "o_proj")
    gradient_checkpointing: bool = True
    training: Literal["reference", "topical"] = "reference"  # whole answers, or sentences on the question
    topical_words: int = Field(0, ge=0)  # with topical: words of each training answer that are kept
    train_rows: AllOr = -1  # rows used for training
    eval_rows: AllOr = -1  # validation rows
    eval_steps: Count = 50  # optimizer steps between evaluations (and checkpoints)
    sample_steps: Count = 100  # optimizer steps between sample answers
    max_new_tokens: int = Field(256, ge=1, le=8192)  # longest generated answer
    prompt: Literal["plain", "chat"] = "plain"
    seed: int = Field(42, ge=0, lt=2**32)

    def banner(self) -> str:
        """One line that keeps a laptop's figure from being read as an 8B one."""
        model = {"packaged": "SmolLM2-135M-Instruct", "random": "random weights"}.get(self.model, self.model)
        data = {"packaged": "packaged FiQA rows", "hub": "FiQA from the hub"}.get(self.data, self.data)
        return f"Profile {self.name} ({self.title}): {model}, {self.dtype} on {self.device}, {data}"


SETTINGS = [field.name for field in fields(Profile) if field.name not in ("name", "title")]
REFERENCE = Profile()
_CHANGES = yaml.safe_load(Path(__file__).with_name("profiles.yaml").read_text(encoding="utf-8"))
PROFILES = {name: Profile(name=name, **changes) for name, changes in _CHANGES.items()}

# What a notebook and the one before it, or an adapter and the run that uses it, have in common: otherwise two
# different things are compared.
MUST_AGREE = ("model", "model_revision", "data", "prompt", "training", "topical_words")

MEMORY_NEEDED = {"gpu80": 60, "gpu24": 21}  # GiB free on the card for profile auto to choose it


def load_profile(profile: str = "auto", overrides: str = "") -> Profile:
    """The named profile with `overrides`, a YAML mapping such as `{max_steps: 20, learning_rate: 1e-4}`.

    `auto` takes the largest profile that fits this machine and prints why. A profile that was asked for by
    name and cannot run here is refused; nothing falls back in silence.

    Raises:
        WorkshopError: unknown profile, unknown or impossible override, or a machine that cannot run it.
    """
    chosen = planned_profile(profile, overrides)
    if chosen.device == "cuda":
        gpu, config = machine.gpu(), machine.config_of(chosen)
        problem = _trouble(gpu) or (config and machine.memory_advice(chosen, config, gpu.free_gib))
        if problem:
            raise WorkshopError(f"Profile {chosen.name} cannot run here: {problem}. Profile laptop can.")
    return chosen


def planned_profile(profile: str = "auto", overrides: str = "") -> Profile:
    """`load_profile` for a run that will be elsewhere: whether this machine can make it is not asked."""
    wanted = _mapping(overrides)
    try:
        chosen = replace(PROFILES[profile_name(profile)], **wanted)
    except ValidationError as error:
        first, *others = error.errors()
        name = first["loc"][0]
        said = " or ".join([first["msg"], *(other["msg"] for other in others if other["loc"][0] == name)])
        raise WorkshopError(f"{name} is {first['input']!r:.80}: {said}.") from None
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


def profile_name(profile: str) -> str:
    """The name of a profile that there is; `auto` is resolved, and its reason printed."""
    if profile == "auto":
        profile, reason = choose_profile()
        print(f"Profile auto chose {profile}: {reason}.")
    if profile not in PROFILES:
        raise WorkshopError(f"profile is {profile!r:.80}: choose one of auto, {', '.join(PROFILES)}.")
    return profile


def _mapping(overrides: str) -> dict[str, Any]:
    """The settings that `overrides` names; of training and topical_words, one brings the other along.

    Raises:
        WorkshopError: no mapping, or a name that no profile has.
    """
    try:
        wanted = yaml.safe_load(overrides) or {}
    except Exception:  # PyYAML lets ValueError, IndexError and RecursionError through
        wanted = None
    if not isinstance(wanted, dict):
        raise WorkshopError(f"overrides is {overrides!r:.80}: write a YAML mapping like {{max_steps: 20}}.")
    for key in wanted:
        if key not in SETTINGS:
            near = difflib.get_close_matches(str(key).lower(), SETTINGS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(SETTINGS)}."
            raise WorkshopError(f"overrides names {key!r:.80}, which no profile has: {hint}")
    if "training" in wanted:
        return {"topical_words": 100 if wanted["training"] == "topical" else 0} | wanted
    if "topical_words" in wanted:
        return {"training": "topical" if wanted["topical_words"] else "reference"} | wanted
    return wanted


def from_card(settings: dict[str, Any]) -> Profile:
    """The profile that a run card holds, also one of an older version: what it lacks is the reference's."""
    return Profile(**{name: settings[name] for name in Profile.__dataclass_fields__ if name in settings})


def disagreement(settings: dict[str, Any], profile: Profile) -> str:
    """In which of MUST_AGREE a card's settings and `profile` differ, for a sentence; empty if in none."""
    there = from_card({key: settings[key] for key in MUST_AGREE if key in settings})
    pairs = {key: (getattr(there, key), getattr(profile, key)) for key in MUST_AGREE}
    said = [f"{key} = {old!r} and this one has {new!r}" for key, (old, new) in pairs.items() if old != new]
    return ", ".join(said)


def choose_profile() -> tuple[str, str]:
    """(name, reason) of the largest profile that this machine can run."""
    gpu = machine.gpu()
    if why := _trouble(gpu):
        return "laptop", why
    for name, needed in MEMORY_NEEDED.items():
        free = f"{gpu.name} has {gpu.free_gib:.0f} GiB free, {needed} are needed"
        if gpu.free_gib >= needed:
            return name, free
    return "laptop", f"{free} for {name}"


def _trouble(gpu: machine.Gpu | None) -> str:
    """Why nothing can be computed on `gpu`; empty when it can."""
    if gpu is None:
        return "no NVIDIA GPU was found"
    return gpu.problem and f"{gpu.name} cannot be used: {gpu.problem}"


def differences(profile: Profile) -> list[dict[str, object]]:
    """Each setting of `profile` that differs from the reference run: rows of setting, reference, here."""
    return [
        {"setting": name, "reference": getattr(REFERENCE, name), "here": getattr(profile, name)}
        for name in SETTINGS
        if name != "model_revision" and getattr(profile, name) != getattr(REFERENCE, name)
    ]
