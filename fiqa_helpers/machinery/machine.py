"""What this machine is and can run, and what a training run needs of a GPU's memory."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fiqa_helpers.profiles import Profile

# --- What this machine is, and whether the workshop can run on it.

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """The first NVIDIA GPU. `problem` says why torch cannot use it; empty when it can."""

    name: str
    total_gib: float
    free_gib: float
    driver: str = ""
    capability: str = ""  # compute capability, such as 9.0
    bf16: bool = False  # computes in bf16 in hardware
    count: int = 1  # GPUs that this process may use
    problem: str = ""


def gpu() -> Gpu | None:
    """The first NVIDIA GPU, or None. One that torch cannot use is returned too, with its `problem`.

    torch is imported only where something says that a GPU is there.
    """
    seen = _from_nvidia_smi() or _from_proc()
    hints = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/dxg")
    if seen is None and "torch" not in sys.modules and not any(map(os.path.exists, hints)):
        return None
    import torch

    with warnings.catch_warnings():  # what torch would warn of stands in `problem`
        warnings.simplefilter("ignore")
        available = torch.cuda.is_available() and torch.version.cuda is not None
    if available:
        return _from_torch(seen)
    return replace(seen, problem=_why_not(seen)) if seen else None


def _from_torch(seen: Gpu | None) -> Gpu:
    """The GPU as torch sees it; free memory includes what other processes leave."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    major, minor = properties.major, properties.minor
    built_for = torch.cuda.get_arch_list()
    build, problem, free = f"torch {torch.__version__} is built for {', '.join(built_for)}", "", 0
    if not any(_covers(arch, major, minor) for arch in built_for):
        problem = f"{build} and this card is sm_{major}{minor}: install a torch version built for it."
    else:
        try:
            free = torch.cuda.mem_get_info(0)[0]
        except RuntimeError as error:  # busy in exclusive mode, or no memory left for a context
            problem = f"{str(error).splitlines()[0]}: end the other programs that use it (see nvidia-smi)."
    return Gpu(
        name=properties.name,
        total_gib=properties.total_memory / GIB,
        free_gib=free / GIB,
        driver=seen.driver if seen else "",
        capability=f"{major}.{minor}",
        bf16=major >= 8,
        count=torch.cuda.device_count(),
        problem=problem,
    )


def _covers(arch: str, major: int, minor: int) -> bool:
    """Whether code built for `arch` (sm_80, sm_90a, compute_90) runs on a card of capability major.minor."""
    kind, number = re.match(r"(sm|compute)_(\d+)", arch).groups()
    built = int(number[:-1]), int(number[-1])
    if kind == "compute":  # PTX, which the driver compiles for newer cards
        return built <= (major, minor)
    return built[0] == major and built[1] <= minor


def _why_not(seen: Gpu) -> str:
    """Why torch does not use the GPU that the driver lists, and what to do."""
    import torch

    build = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a build with CUDA."
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not re.match(r"\s*(\d|GPU-|MIG-)", hidden):
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides it: unset that variable."
    try:
        torch.cuda.init()
        said = "it lists no device"
    except (RuntimeError, AssertionError) as error:
        said = str(error).strip().splitlines()[0]
    if "too old" in said:
        return f"its driver {seen.driver} is too old for {build}: update the NVIDIA driver."
    return f"{build} cannot start CUDA with driver {seen.driver or 'unknown'} ({said}): see nvidia-smi."


def _from_nvidia_smi() -> Gpu | None:
    """The first GPU in nvidia-smi's list, which needs no CUDA runtime."""
    tool = shutil.which("nvidia-smi") or "/usr/lib/wsl/lib/nvidia-smi"
    query = ["--query-gpu=name,driver_version,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run([tool, *query], capture_output=True, text=True, timeout=30)
        name, driver, total, free = [part.strip() for part in run.stdout.splitlines()[0].split(",")]
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return None
    mib = [int(value) if value.isdigit() else 0 for value in (total, free)]
    return Gpu(name=name, driver=driver, total_gib=mib[0] / 1024, free_gib=mib[1] / 1024)


def _from_proc() -> Gpu | None:
    """The GPU as the kernel module lists it, where nvidia-smi is missing (containers)."""
    for information in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        model = re.search(r"^Model:\s*(.+)$", information.read_text(), re.MULTILINE)
        module = Path("/proc/driver/nvidia/version").read_text()
        driver = re.search(r"Kernel Module\D*([\d.]+)", module)
        return Gpu(model[1].strip() if model else "NVIDIA GPU", 0.0, 0.0, driver=driver[1] if driver else "")
    return None


def cpu_cores() -> int:
    """CPU cores that this process may use: affinity and container limit included."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = _read("/sys/fs/cgroup/cpu.max").split()
    if len(limit) == 2 and limit[0].isdigit():
        cores = min(cores, max(1, round(int(limit[0]) / int(limit[1]))))
    return cores


def ram_gib() -> float:
    """Memory of the machine in GiB, or of the container where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(path).strip()
        if text.isdigit():
            total = min(total, int(text))
    return total / GIB


def peak_memory_gib() -> float:
    """Largest memory so far in GiB: of this process, or what torch reserved on the GPU if one is in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / GIB
    peak = re.search(r"^VmHWM:\s*(\d+) kB", _read("/proc/self/status"), re.MULTILINE)
    if peak:  # ru_maxrss would count what the parent process held when it started this one
        return int(peak[1]) * 1024 / GIB
    import resource

    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB
    )


def system_name() -> str:
    """Operating system in a few words, WSL2 included."""
    if sys.platform != "linux":
        return platform.platform(terse=True)
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        name = "Linux"
    return f"{name} under WSL2" if "microsoft" in platform.release().lower() else name


@cache
def cpu_name() -> str:
    """Model of the CPU as the kernel names it."""
    model = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def describe() -> dict:
    """This machine as a run card keeps it. Memory and disk in GiB; `gpu` is a dict, or None without one."""
    card = gpu()
    return {
        "system": system_name(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": cpu_cores(),
        "ram_gib": round(ram_gib(), 1),
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / GIB, 1),
        "gpu": asdict(card) if card else None,
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# --- What a training run needs of a GPU's memory, predicted from the profile and the model's configuration.
#
# Arithmetic only: no weights, no GPU, no torch. It holds for the training path of notebook 04 on a GPU
# (bf16, variable-length attention, Liger's kernels and fused loss, LoRA layers that keep no dropout masks),
# whose measured peaks stand in benchmarks/.

NEMOTRON = "nvidia/Llama-3.1-Nemotron-Nano-8B-v1"
BF16, FP32 = 2, 4  # bytes
LOGITS_CHUNK = 8  # of the loss, for fast.py too: a chunk's logits take 8 times its hidden states
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


def predict_memory(profile: "Profile", config: dict, tokens: int | None = None) -> Ledger:
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


def memory_advice(profile: "Profile", config: dict, free: float) -> str:
    """What to change so that the run fits into `free` bytes; empty when it does.

    Tries, in this order, what costs least time: gradient checkpointing, then a smaller token budget.
    """
    needed = predict_memory(profile, config).total
    if needed <= free:
        return ""
    begin = f"the run needs about {needed / GIB:.0f} GiB and {free / GIB:.0f} are free"
    checkpointed = replace(profile, gradient_checkpointing=True)
    if not profile.gradient_checkpointing and predict_memory(checkpointed, config).total <= free:
        return f"{begin}: set gradient_checkpointing: true in overrides"
    budget = checkpointed.tokens_per_batch
    while budget > profile.max_length:
        budget = max(budget // 2, profile.max_length)
        if predict_memory(checkpointed, config, budget).total <= free:
            also = "" if profile.gradient_checkpointing else "gradient_checkpointing: true and "
            return f"{begin}: set {also}tokens_per_batch: {budget} in overrides"
    return f"{begin}, less than any setting needs: use a larger card, a smaller model or profile laptop"


def _query(config: dict) -> int:
    return config["num_attention_heads"] * _head(config)


def _key(config: dict) -> int:
    return config["num_key_value_heads"] * _head(config)


def _head(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
