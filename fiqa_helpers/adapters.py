"""Is this folder a whole adapter of notebook 04, for this base model? Asked before anything is loaded."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.checkpoints import MANIFEST, fault
from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.profiles import MUST_AGREE, REFERENCE
from fiqa_helpers.run_identity import model_files
from fiqa_helpers.runcard import read_card

if TYPE_CHECKING:
    from fiqa_helpers.profiles import Profile

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CARD = "run_card.json"
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
    shapes = _check_weights(folder)
    card = read_card(folder / CARD)
    if card is None or not isinstance(card.get("profile"), dict):
        raise WorkshopError(f"{folder / CARD} is missing or damaged, so the base model is unknown: {REMEDY}.")
    for key in MUST_AGREE:
        trained = card["profile"].get(key, getattr(REFERENCE, key))  # an older card does not name all of them
        here = getattr(profile, key)
        if trained != here:
            raise WorkshopError(
                f"The adapter in {folder} was trained with {key} = {trained!r} and this run has {here!r}: "
                "give this notebook the profile and overrides of notebook 04, or train again."
            )
    trained = card.get("definition", {}).get("model_files", "")
    here = model_files(profile)
    if trained != here and min(len(trained), len(here)) >= 40:  # hashes: of a folder, or of a commit
        raise WorkshopError(
            f"The adapter in {folder} was trained on other weights of {profile.model} ({trained[:12]}, here "
            f"{here[:12]}): set model or model_revision in overrides to those, or train again."
        )
    damage = fault(folder) if (folder / MANIFEST).is_file() else None
    if damage:
        raise WorkshopError(f"The adapter in {folder} is damaged ({damage}): {REMEDY}.")
    _check_shapes(folder, profile, shapes)
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


def _check_weights(folder: Path) -> dict[str, list[int]]:
    """Name and shape of each tensor. The file's header says how long it must be: a cut file fails here."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0][:100]
        raise WorkshopError(
            f"{folder / WEIGHTS} is not a whole safetensors file ({reason}): {REMEDY}."
        ) from None
    if not any("lora_" in name for name in shapes):
        raise WorkshopError(f"{folder / WEIGHTS} holds no LoRA weights: {REMEDY}.")
    return shapes


def _check_shapes(folder: Path, profile: "Profile", shapes: dict[str, list[int]]) -> None:
    """Weights of another architecture load with a warning, or end in a traceback: hold them against those
    that PEFT makes for this base model, on the meta device, where neither needs memory."""
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    from fiqa_helpers.model import base_config

    config = base_config(profile)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's: the base model lay in another folder
            tuned = get_peft_model(
                AutoModelForCausalLM.from_config(config), PeftConfig.from_pretrained(folder)
            )
        needed = {name: list(tensor.shape) for name, tensor in get_peft_model_state_dict(tuned).items()}
    except (ValueError, TypeError, RuntimeError) as error:  # such as: no layer of that name
        raise WorkshopError(
            f"{folder / CONFIG} does not fit {profile.model} ({str(error).splitlines()[0][:100]}): {REMEDY}."
        ) from None
    other = sorted(name for name in {**needed, **shapes} if needed.get(name) != shapes.get(name))
    if other:
        raise WorkshopError(
            f"The adapter in {folder} was made for another model than {profile.model} ({other[0]} is "
            f"{shapes.get(other[0], 'missing')} and must be {needed.get(other[0], 'absent')}): {REMEDY}."
        )
