"""An adapter written into its base model: a plain Hugging Face folder that any server loads, checked."""

import gc
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.storage import disk_errors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from fiqa_helpers.profiles import Profile

WEIGHTS = "adapter_model.safetensors"
PROBES = (
    "Should I pay off my mortgage early or invest?",
    "What is a bond?",
    "Is my pension safe? $5,000 at 3 %",
)


@dataclass(frozen=True)
class Merged:
    """A merged model, and how near it is to base and adapter apart, on every position of some prompts."""

    folder: Path
    positions: int
    largest_change: float  # of a logit
    same_top_token: float  # share of positions
    logit_spread: float  # standard deviation of all logits, to judge the change by

    def __str__(self) -> str:
        return (
            f"{self.folder.name}: over {self.positions} positions the logits differ from adapter-on-base by "
            f"at most {self.largest_change:.2g} (they spread by {self.logit_spread:.2g}); "
            f"{self.same_top_token:.1%} have the same likeliest token"
        )


def merge_adapter(profile: "Profile", adapter: Path, target: Path) -> Merged:
    """Write base and adapter as one model to the new folder `target`, load it again and compare the logits.

    In bf16 the sum of base and adapter is rounded once more, so logits move a little; in fp32 hardly at all.
    The tokenizer goes with it, with the padding token of the training. One model is in memory at a time.

    Raises:
        WorkshopError: the adapter is damaged or of another base model, `target` is there already, the disk is
            full, or the merged model answers differently.
    """
    from peft import PeftModel

    from fiqa_helpers import model

    if target.exists() and any(target.iterdir()):
        raise WorkshopError(f"{target} is not empty: name a new folder for the merged model.")
    refuse_other_base(adapter, model.model_path(profile))
    tokenizer = model.load_tokenizer(profile)
    _free_memory()
    tuned = PeftModel.from_pretrained(_plain_model(profile, model.model_path(profile)), str(adapter)).eval()
    expected = probe_logits(tuned, tokenizer, profile.prompt)
    merged = tuned.merge_and_unload()
    merged.generation_config.pad_token_id = tokenizer.pad_token_id
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with disk_errors(target.parent, "name a folder with more space"):
            merged.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            del tuned, merged
            _free_memory()
            report = _compare(partial, target, expected, tokenizer, profile)
            if target.exists():
                target.rmdir()
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def probe_logits(model: "PreTrainedModel", tokenizer, style: str) -> "torch.Tensor":
    """Logits in fp32 on the CPU, (positions, vocabulary), over the prompts of some questions."""
    import torch

    from fiqa_helpers.prompts import encode_prompt

    found = []
    with torch.no_grad():
        for question in PROBES:
            ids = torch.tensor([encode_prompt(question, tokenizer, style)], device=model.device)
            found.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    return torch.cat(found)


def refuse_other_base(adapter: Path, base: str) -> None:
    """Hold the shape of each of the adapter's matrices against the layer that it names in `base`.

    Only files' headers and the base's configuration are read.

    Raises:
        WorkshopError: the adapter is missing or damaged, or does not fit; names the file and the layer.
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    weights, config = adapter / WEIGHTS, adapter / "adapter_config.json"
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        with safe_open(weights, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0][:120]
        raise WorkshopError(
            f"{adapter} is not a whole adapter ({reason}): train it again or name another."
        ) from None
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    layers = dict(skeleton.named_modules())
    for name, shape in shapes.items():
        layer_name, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        layer = layers.get(layer_name)
        inner = shape[1] if part.startswith("A") else shape[0]
        fits = layer is not None and inner == (
            layer.in_features if part.startswith("A") else layer.out_features
        )
        if not fits:
            raise WorkshopError(
                f"{weights} does not fit {base} (layer {layer_name}): it was trained on "
                f"{settings.get('base_model_name_or_path') or 'another model'}; merge it with that one."
            )


def _free_memory() -> None:
    """Give back what deleted models held: two 8B models don't fit a 24 GB card."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # does nothing without CUDA


def _plain_model(profile: "Profile", name: str) -> "PreTrainedModel":
    """By transformers alone, as whoever gets the folder will load it (and NeMo's class can't save without its
    checkpointer)."""
    import torch
    from transformers import AutoModelForCausalLM

    revision = {} if Path(name).is_dir() else {"revision": profile.model_revision}
    loaded = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, profile.dtype), **revision)
    return loaded.to(profile.device).eval()


def _compare(folder: Path, target: Path, expected: "torch.Tensor", tokenizer, profile: "Profile") -> Merged:
    found = probe_logits(_plain_model(profile, str(folder)), tokenizer, profile.prompt)
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    report = Merged(
        folder=target,
        positions=len(expected),
        largest_change=(found - expected).abs().max().item(),
        same_top_token=same,
        logit_spread=expected.std().item(),
    )
    allowed = 0.01 if profile.dtype == "float32" else 0.5  # of the spread; bf16 keeps 8 bits of a number
    if not report.largest_change <= allowed * report.logit_spread:
        raise WorkshopError(f"The merged model is not base and adapter ({report}): it was not kept.")
    return report
