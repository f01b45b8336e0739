"""Is this folder a whole adapter of notebook 04, for this base model? Asked before anything is loaded."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.runcard import read_card

if TYPE_CHECKING:
    from fiqa_helpers.profiles import Profile

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CARD = "run_card.json"
MUST_AGREE = ("model", "model_revision", "data", "prompt")  # or the answers compare two different things
REMEDY = "run notebook 04_train first (or again)"


def check_adapter(folder: Path, profile: "Profile") -> dict:
    """The run card of the adapter in `folder`, once everything about it fits `profile`.

    Only safetensors are accepted: a pickled `adapter_model.bin` can run code when it is loaded.

    Raises:
        WorkshopError: no adapter, an incomplete or damaged one, or one for another base model, data set or
            prompt; says which and what to do.
    """
    if not folder.is_dir():
        raise WorkshopError(f"There is no adapter in {folder}: {REMEDY}.")
    names = {path.name for path in folder.iterdir()}
    if not names:
        raise WorkshopError(f"{folder} is empty: {REMEDY}.")
    if WEIGHTS not in names:
        unsafe = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")))
        if unsafe:
            raise WorkshopError(
                f"{folder} holds its weights as {unsafe[0]}, a pickle that could run code when it is loaded: "
                f"save the adapter as safetensors, or {REMEDY}."
            )
        raise WorkshopError(f"{folder} holds no {WEIGHTS}: {REMEDY}.")
    _check_config(folder)
    _check_weights(folder)
    card = read_card(folder / CARD)
    if card is None or not isinstance(card.get("profile"), dict):
        raise WorkshopError(f"{folder / CARD} is missing or damaged, so the base model is unknown: {REMEDY}.")
    for key in MUST_AGREE:
        trained, here = card["profile"].get(key), getattr(profile, key)
        if trained != here:
            raise WorkshopError(
                f"The adapter in {folder} was trained with {key} = {trained!r} and this run has {here!r}: "
                "give this notebook the profile and overrides of notebook 04, or train again."
            )
    return card


def files_of(folder: Path) -> list[dict[str, object]]:
    """Each file of an adapter's folder with its size in MB (10^6 bytes), the largest first."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return [{"file": name, "MB": round(size / 1e6, 3)} for name, size in ordered]


def _check_config(folder: Path) -> None:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError):
        raise WorkshopError(f"{folder / CONFIG} is missing or damaged: {REMEDY}.") from None
    if kind != "LORA":
        raise WorkshopError(f"{folder / CONFIG} describes a {kind} adapter and LORA is needed: {REMEDY}.")


def _check_weights(folder: Path) -> None:
    """The header of a safetensors file says how long it must be: a cut or foreign file fails here."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            found = [name for name in file.keys() if "lora_" in name]  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0][:100]
        raise WorkshopError(
            f"{folder / WEIGHTS} is not a whole safetensors file ({reason}): {REMEDY}."
        ) from None
    if not found:
        raise WorkshopError(f"{folder / WEIGHTS} holds no LoRA weights: {REMEDY}.")
