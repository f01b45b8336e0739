"""Can this machine run the workshop: each requirement, OK or FAIL with a remedy.

`make check` is content with a package index or a hub that answers. `offline=True`, which is `make preflight`,
wants model and data on the disk: for the night before a lesson in a room without a network.
"""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from jupyter_client.kernelspec import KernelSpecManager

from fiqa_helpers.base import WorkshopError, Workspace, cache_dir, versions
from fiqa_helpers.data import load_fiqa
from fiqa_helpers.machinery import assets, machine
from fiqa_helpers.profiles import Profile

# GiB of memory and of disk that a run asks for: SmolLM2 here, the 16 GB of Nemotron 8B's weights there.
NEEDS = {"laptop": (7, 3), "tiny": (2, 1), "gpu24": (20, 24), "gpu80": (20, 24)}
FETCH = "run `make run ONLY=00` while there is a network, or name a folder: FIQA_WHEELS, or in overrides"
KERNEL = f"run `{sys.executable} -m ipykernel install --sys-prefix`, then restart JupyterLab"
CARD = "take profile laptop, or a working NVIDIA card of the Ampere generation or newer, for bf16"

Found = tuple[bool, str]  # whether a requirement is met, and what there is


class Check(NamedTuple):
    """One requirement: `remedy` says what to do when it is not met."""

    name: str
    ok: bool
    detail: str
    remedy: str


def checks(workspace: Workspace, profile: Profile, offline: bool = False) -> list[Check]:
    """All requirements of a run with `profile` in `workspace`; takes seconds, and downloads no model."""
    from huggingface_hub.constants import HF_HUB_CACHE

    packaged = profile.model in ("packaged", "random")

    def model(offline: bool) -> Found:
        return _packaged("smollm2", offline) if packaged else _model(profile, offline)

    kept = model(offline=True)
    memory, disk = NEEDS[profile.name]
    disk = min(disk, 2) if kept[0] else disk  # the model is on the disk already
    models = cache_dir() if packaged else Path(HF_HUB_CACHE)
    found = {
        "Python": (_python(), "run `make env` with Python 3.12 or 3.13 on Linux, or WSL2 on Windows"),
        "Packages": (_packages(), "run `make env`, or pip install -c constraints.txt -e ."),
        "Jupyter": (kernel(), KERNEL),
        "Memory, CPU": (_memory(memory), f"{memory} GiB are needed: close programs, or take profile laptop"),
        "Disk": (_disk(models, disk), f"{disk} GiB are needed: set FIQA_CACHE or HF_HOME to another disk"),
        "GPU": (_gpu(profile), CARD),
        "Model": (kept if kept[0] or offline else model(offline), FETCH),
        "Data": (_data(profile, workspace, offline), FETCH),
        "MiniLM": (_packaged("minilm", offline), FETCH),
    }
    return [Check(name, *outcome, remedy) for name, (outcome, remedy) in found.items()]


def report(results: list[Check]) -> str:
    """The checks as plain text: one line each, the remedy under a failed one."""
    lines = []
    for check in results:
        lines.append(f"{'OK  ' if check.ok else 'FAIL'}  {check.name:15}  {check.detail}")
        lines += [] if check.ok else [f"{'':23}-> {check.remedy}"]
    failed = sum(not check.ok for check in results)
    lines.append(f"{failed} of {len(results)} requirements are not met." if failed else "Ready.")
    return "\n".join(lines)


def _python() -> Found:
    ok = sys.platform == "linux" and sys.version_info[:2] in ((3, 12), (3, 13))
    return ok, f"{platform.python_version()} ({sys.executable}) on {platform.platform(terse=True)}"


def _packages() -> Found:
    """What pip says of the project's requirements."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "check"]
    said = subprocess.run(pip, capture_output=True, text=True).stdout.splitlines()
    wrong = [line for line in said if line.startswith("fiqa-workshop ")]
    return not wrong, "; ".join(wrong) or ", ".join(f"{name} {number}" for name, number in versions().items())


def kernel() -> Found:
    """The kernel `python3`, which every notebook names, runs the interpreter of this environment."""
    command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    # jupyter_client starts a bare `python` as the running interpreter.
    bare = command in ("python", "python3", f"python3.{sys.version_info.minor}")
    path = sys.executable if bare else shutil.which(command) or command
    return os.path.realpath(path) == os.path.realpath(sys.executable), f"Jupyter's kernel python3 runs {path}"


def _memory(needed: int) -> Found:
    ram = machine.ram_gib()
    return ram >= needed, f"{ram:.1f} GiB, {machine.cpu_cores()} cores ({machine.cpu_name()})"


def _disk(folder: Path, needed: int) -> Found:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free / machine.GIB
    return free >= needed, f"{free:.1f} GiB free in {folder}"


def _gpu(profile: Profile) -> Found:
    card, needless = machine.gpu(), profile.device == "cpu"
    if card is None:
        return needless, "none"
    detail = f"{card.name}, {card.problem or f'{card.free_gib:.1f} of {card.total_gib:.1f} GiB free'}"
    return needless or not card.problem, detail


def _packaged(key: str, offline: bool) -> Found:
    """An asset of the package index: whole in the cache, in a wheel beside the project, or to be fetched."""
    asset = assets.ASSETS[key]
    if assets.in_cache(key):
        return True, f"{asset.title}, whole, in {cache_dir()}"
    if wheel := assets.local_wheel(asset):
        return True, f"{asset.title}, to be taken out of {wheel}"
    pip = [sys.executable, "-m", "pip", "index", "versions", "--timeout=10", "--retries=0", asset.package]
    found = not offline and subprocess.run(pip, capture_output=True).returncode == 0
    return found, f"{asset.title} is {'to be fetched with pip' if found else f'not in {cache_dir()}'}"


def _model(profile: Profile, offline: bool) -> Found:
    """A folder or a copy in the Hugging Face cache with all the shards of a model, or else the hub's."""
    from huggingface_hub import HfApi, snapshot_download

    name, revision = profile.model, profile.model_revision
    with contextlib.suppress(OSError, ValueError):  # it is in no cache, or the name is no hub's
        folder = Path(name).expanduser()
        if not folder.is_dir():
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        index = folder / "model.safetensors.index.json"
        shards = json.loads(index.read_text("utf-8"))["weight_map"] if index.is_file() else {}
        files = ["config.json", *(shards.values() or ["model.safetensors"])]
        if all((folder / file).is_file() for file in files):
            return True, f"{name}, whole, in {folder}"
    with contextlib.suppress(Exception):  # a dozen kinds, all meaning that it cannot be had
        if not offline and HfApi().model_info(name, revision=revision, timeout=10):
            return True, f"{name} is on the hub"
    return False, f"{name} is not whole on this disk, nor to be had from the hub"


def _data(profile: Profile, workspace: Workspace, offline: bool) -> Found:
    """The packaged rows; or FiQA of the hub or one's own files, read once as notebook 01 reads them."""
    if profile.data == "packaged":
        return _packaged("fiqa_test", offline)
    try:
        found = load_fiqa(profile.data, workspace)
    except WorkshopError as error:
        return False, str(error)
    return True, found["test"].info.description
