"""What this machine is and can run, and what a training run needs of a GPU's memory."""

import json
import math
import os
import platform
import re
import resource
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# --- What this machine is.

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """The first NVIDIA GPU. `problem` says why torch cannot use it; empty when it can."""

    name: str = "the NVIDIA GPU"
    total_gib: float = 0.0
    free_gib: float = 0.0  # what other processes leave
    problem: str = ""


def gpu() -> Gpu | None:
    """The first NVIDIA GPU, or None. One that torch cannot use is returned too, with its `problem`.

    torch is imported only where a device file says that a GPU is there: that takes seconds.
    """
    devices = ("/dev/nvidiactl", "/dev/nvidia0", "/usr/lib/wsl/lib/libcuda.so.1")  # the last under WSL2
    if "torch" not in sys.modules and not any(map(os.path.exists, devices)):
        return None
    import torch

    try:
        free, total = torch.cuda.mem_get_info(0)
        free += torch.cuda.memory_reserved(0)  # our own, of a run before this one
        torch.zeros(1, device="cuda")  # a torch that was not built for this card fails here
    except (RuntimeError, AssertionError) as error:  # no driver, an old one, a hidden or a busy card
        if not any(map(os.path.exists, devices)):
            return None
        said, hidden = str(error).splitlines()[0], os.environ.get("CUDA_VISIBLE_DEVICES")
        return Gpu(problem=f"{said} (torch {torch.__version__}, CUDA_VISIBLE_DEVICES {hidden!r})")
    card = torch.cuda.get_device_properties(0)
    problem = "" if card.major >= 8 else "it does not compute in bf16"
    return Gpu(card.name, total / GIB, free / GIB, problem)


def cpu_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ram_gib() -> float:
    """Memory of the machine in GiB, or of the container where that is less."""
    import psutil

    limits = [psutil.virtual_memory().total]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limits += map(int, re.findall(r"^\d+$", _read(path), re.MULTILINE))
    return min(limits) / GIB


def peak_memory_gib(device: str = "cuda") -> float:
    """Largest memory so far in GiB: of this process, or for "cuda" what torch reserved on a GPU in use."""
    torch = sys.modules.get("torch")
    if device == "cuda" and torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / GIB
    peak = re.search(r"^VmHWM:\s*(\d+) kB", _read("/proc/self/status"), re.MULTILINE)
    # Else, on a Mac, in bytes; on Linux this would count what the parent process held at the start.
    own = int(peak[1]) * 1024 if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return own / GIB


def cpu_name() -> str:
    """Model of the CPU as the kernel names it."""
    model = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def describe() -> dict:
    """This machine as a run card keeps it. Memory in GiB; `gpu` is a dict, or None without one."""
    card = gpu()
    return {
        "system": platform.platform(terse=True),  # names WSL2, too
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": cpu_cores(),
        "ram_gib": round(ram_gib(), 1),
        "gpu": asdict(card) if card else None,
    }


def _read(path: Path | str) -> str:
    """The text of a file that is not everywhere; empty where it is not."""
    return Path(path).read_text(encoding="utf-8", errors="replace") if os.path.isfile(path) else ""


# --- What a training run needs of a GPU's memory, predicted from the profile and the model's configuration.
#
# Arithmetic only: no weights, no GPU, no torch. It holds for the training path of notebook 04 on a GPU
# (bf16, variable-length attention, Liger's kernels and fused loss, PEFT's LoRA layers),
# whose measured peaks stand in benchmarks/.

NEMOTRON = "nvidia/Llama-3.1-Nemotron-Nano-8B-v1"
BF16, FP32 = 2, 4  # bytes
LOGITS_CHUNK = 8  # of the loss, for fast.py too: a chunk's logits take 8 times its hidden states
# What the CUDA libraries and the allocator take beside the tensors: cuBLAS workspaces, blocks of memory that
# are not quite filled.
OVERHEAD = 0.5 * GIB


def nemotron_config() -> dict:
    """The 8B model's configuration (the JSON of this package), as a plain dictionary."""
    return json.loads(_read(Path(__file__).parent.parent / "nemotron_8b_config.json"))


def config_of(profile) -> dict | None:
    """The configuration of a `Profile`'s model where it is known without a download, else None."""
    if profile.model == NEMOTRON:
        return nemotron_config()
    config = json.loads(_read(Path(profile.model).expanduser() / "config.json") or "{}")
    return config if {"num_key_value_heads", "intermediate_size"} <= config.keys() else None


def linear_layers(config: dict) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each linear layer in one block of a Llama with this configuration."""
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    attention = {"q_proj": (hidden, query), "k_proj": (hidden, key), "v_proj": (hidden, key)}
    mlp = {"gate_proj": (hidden, middle), "up_proj": (hidden, middle), "down_proj": (middle, hidden)}
    return attention | {"o_proj": (query, hidden)} | mlp


def base_parameters(config: dict) -> int:
    """Parameters of a Llama with this configuration."""
    hidden = config["hidden_size"]
    block = sum(map(math.prod, linear_layers(config).values())) + 2 * hidden  # two norms
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return config["num_hidden_layers"] * block + embeddings + hidden


def lora_parameters(config: dict, rank: int, targets: tuple[str, ...]) -> int:
    """Trainable parameters of LoRA on `targets` of every block: rank x (inputs + outputs) each."""
    sizes = linear_layers(config)
    return config["num_hidden_layers"] * rank * sum(sum(sizes[name]) for name in targets)


def predict_memory(profile, config: dict, tokens: int | None = None) -> dict[str, float]:
    """GiB of a GPU at the peak of a step, line by line and in `total`: the memory ledger of a `Profile`.

    `config` is the model's; `tokens` those of the largest forward pass, without it the profile's budget,
    `tokens_per_batch`.
    """
    tokens = tokens or profile.tokens_per_batch
    hidden, middle, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    query, key = (linear_layers(config)[name][1] for name in ("q_proj", "k_proj"))
    weight = BF16 if profile.dtype == "bfloat16" else FP32
    trainable = lora_parameters(config, profile.lora_rank, profile.lora_targets)
    # Kept of a layer for each token: its input and the normed input, queries, keys and values, attention's
    # output, the sum after attention, and the MLP's gate and up projections.
    layer = weight * (3 * hidden + 2 * query + 2 * key + 2 * middle) * tokens
    inputs = weight * hidden * tokens  # all that checkpointing keeps of a layer
    backward = weight * (2 * middle + 4 * hidden) * tokens  # gradients on their way through one layer
    logits = LOGITS_CHUNK * weight * hidden * tokens
    kept = layers * (inputs if profile.gradient_checkpointing else layer)
    ledger = {
        "weights": weight * base_parameters(config),  # frozen
        "adapters": (FP32 + weight) * trainable,  # fp32, and their bf16 copies of the forward pass
        "gradients": (FP32 + weight) * trainable,  # the same
        "optimizer": 2 * FP32 * trainable,  # Adam's two averages
        "activations": kept + 2 * inputs,  # also what the loss keeps: hidden states and their gradient
        "workspace": max(backward + (layer if profile.gradient_checkpointing else 0), logits),
        "overhead": OVERHEAD,
    }
    ledger["total"] = sum(ledger.values())
    return {line: size / GIB for line, size in ledger.items()}


def memory_advice(profile, config: dict, free: float) -> str:
    """What to change in a `Profile` so that the run fits into `free` GiB; empty when it does.

    Tries, in this order, what costs least time: gradient checkpointing, then a smaller token budget.
    """
    needed = predict_memory(profile, config)["total"]
    if needed <= free:
        return ""
    begin = f"the run needs about {needed:.0f} GiB and {free:.0f} are free"
    budget = profile.tokens_per_batch
    also = [] if profile.gradient_checkpointing else ["gradient_checkpointing: true"]
    while budget >= profile.max_length:
        tried = replace(profile, gradient_checkpointing=True, tokens_per_batch=budget)
        if predict_memory(tried, config)["total"] <= free:
            less = [] if budget == profile.tokens_per_batch else [f"tokens_per_batch: {budget}"]
            return f"{begin}: set {' and '.join(also + less)} in overrides"
        budget //= 2
    return f"{begin}, less than any setting needs: use a larger card, a smaller model or profile laptop"
