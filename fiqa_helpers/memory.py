"""What a training run needs of a GPU's memory, predicted from the profile and the model's configuration.

Arithmetic only: no weights, no GPU, no torch. It holds for the training path of notebook 04 on a GPU (bf16,
variable-length attention, Liger's kernels and fused loss, LoRA layers that keep no dropout masks), whose
measured peaks stand in benchmarks/.
"""

import json
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.profiles import NEMOTRON

if TYPE_CHECKING:
    from fiqa_helpers.profiles import Profile

GIB = 2**30
BF16, FP32 = 2, 4  # bytes
LOGITS_CHUNK = 8  # of the loss, for gpu_path.py too: a chunk's logits take 8 times its hidden states
# What the CUDA libraries and the allocator take beside the tensors: cuBLAS workspaces, blocks of memory that
# are not quite filled.
OVERHEAD = 0.5 * GIB


@dataclass(frozen=True)
class Ledger:
    """Bytes at the peak of a step, line by line."""

    weights: float  # frozen, bf16
    adapters: float  # fp32, and their bf16 copies of the forward pass
    gradients: float  # the same twice
    optimizer: float  # Adam's two averages, fp32
    activations: float  # kept between forward and backward pass
    workspace: float  # one layer's recomputation and gradients, logits of a chunk
    overhead: float

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(getattr(self, field.name) for field in fields(self))

    def gib(self) -> dict[str, float]:
        """Every line and the total, in GiB."""
        lines = {field.name: getattr(self, field.name) / GIB for field in fields(self)}
        return lines | {"total": self.total / GIB}


def nemotron_config() -> dict:
    """The 8B model's configuration (the JSON of this package), as a plain dictionary."""
    text = resources.files("fiqa_helpers").joinpath("nemotron_8b_config.json").read_text(encoding="utf-8")
    return json.loads(text)


def config_of(profile: "Profile") -> dict | None:
    """The configuration of the profile's model where it is known without a download, else None."""
    folder = Path(profile.model).expanduser()
    if profile.model == NEMOTRON:
        return nemotron_config()
    if not (folder / "config.json").is_file():
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config if {"num_key_value_heads", "intermediate_size"} <= config.keys() else None


def base_parameters(config: dict) -> int:
    """Parameters of a Llama with this configuration."""
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    attention = 2 * hidden * _query(config) + 2 * hidden * _key(config)
    layer = attention + 3 * hidden * middle + 2 * hidden
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return config["num_hidden_layers"] * layer + embeddings + hidden


def lora_parameters(config: dict, rank: int, targets: tuple[str, ...]) -> int:
    """Trainable parameters of LoRA on `targets` of every layer: rank x (inputs + outputs) each."""
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    sizes = {
        "q_proj": hidden + _query(config),
        "k_proj": hidden + _key(config),
        "v_proj": hidden + _key(config),
        "o_proj": _query(config) + hidden,
        "gate_proj": hidden + middle,
        "up_proj": hidden + middle,
        "down_proj": middle + hidden,
    }
    return config["num_hidden_layers"] * rank * sum(sizes[name] for name in targets if name in sizes)


def predict(profile: "Profile", config: dict, tokens: int | None = None) -> Ledger:
    """The ledger of `profile` on a model with this configuration, on a GPU.

    `tokens` of the largest forward pass; without it the profile's budget, `tokens_per_batch`.
    """
    tokens = tokens or profile.tokens_per_batch
    hidden, middle, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    weight = BF16 if profile.dtype == "bfloat16" else FP32
    trainable = lora_parameters(config, profile.lora_rank, profile.lora_targets)
    # Kept of a layer for each token: its input and the normed input, queries, keys and values, attention's
    # output, the sum after attention, and the MLP's gate and up projections.
    layer = weight * (3 * hidden + 2 * _query(config) + 2 * _key(config) + 2 * middle) * tokens
    inputs = weight * hidden * tokens  # all that checkpointing keeps of a layer
    backward = weight * (2 * middle + 4 * hidden) * tokens  # gradients on their way through one layer
    logits = LOGITS_CHUNK * weight * hidden * tokens
    kept = layers * (inputs if profile.gradient_checkpointing else layer)
    return Ledger(
        weights=weight * base_parameters(config),
        adapters=(FP32 + weight) * trainable,
        gradients=(FP32 + weight) * trainable,
        optimizer=2 * FP32 * trainable,
        activations=kept + 2 * inputs,  # and what the loss keeps: hidden states and their gradient
        workspace=max(backward + (layer if profile.gradient_checkpointing else 0), logits),
        overhead=OVERHEAD,
    )


def advice(profile: "Profile", config: dict, free: float) -> str:
    """What to change so that the run fits into `free` bytes; empty when it does.

    Tries, in this order, what costs least time: gradient checkpointing, then a smaller token budget.
    """
    needed = predict(profile, config).total
    if needed <= free:
        return ""
    begin = f"the run needs about {needed / GIB:.0f} GiB and {free / GIB:.0f} are free"
    checkpointed = replace(profile, gradient_checkpointing=True)
    if not profile.gradient_checkpointing and predict(checkpointed, config).total <= free:
        return f"{begin}: set gradient_checkpointing: true in overrides"
    budget = checkpointed.tokens_per_batch
    while budget > profile.max_length:
        budget = max(budget // 2, profile.max_length)
        if predict(checkpointed, config, budget).total <= free:
            also = "" if profile.gradient_checkpointing else "gradient_checkpointing: true and "
            return f"{begin}: set {also}tokens_per_batch: {budget} in overrides"
    return f"{begin}, less than any setting needs: use a larger card, a smaller model or profile laptop"


def _query(config: dict) -> int:
    return config["num_attention_heads"] * _head(config)


def _key(config: dict) -> int:
    return config["num_key_value_heads"] * _head(config)


def _head(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
