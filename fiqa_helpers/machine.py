"""What this machine is, and whether the workshop can run on it."""

import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

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
