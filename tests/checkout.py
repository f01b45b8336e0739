"""A copy of the checkout in which `make` runs for real: its environment is the one that runs the tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
# What `make test VENV=...` hands down: without them a `make` started here is one in a new shell.
HANDED_DOWN = {"VENV", "PROFILE", "OVERRIDES", "WORKDIR", "ONLY", "FRESH", "ARGS", "PYTHON", "EXTRAS"}


def checkout(folder: Path) -> Path:
    """Copy the project's files to `folder` (what git knows, or would add), with an environment in `.venv`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(command, cwd=PROJECT, text=True).splitlines():
        if (PROJECT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, folder / name)
    key = subprocess.check_output([folder / "scripts" / "make_env.sh", "--key"], text=True)
    venv = folder / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / ".fiqa-workshop-stamp").write_text(key)
    (venv / ".fiqa-workshop-project").write_text(f"{folder.resolve()}\n")
    for path in Path(sys.executable).parent.iterdir():  # papermill, jupyter and the others
        (venv / "bin" / path.name).symlink_to(path)
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (venv / "bin" / "python").chmod(0o755)
    return folder


def nothing_set() -> dict[str, str]:
    """The variables of this process without those of the project and of make."""
    ours = ("MAKE", "MFLAGS", "FIQA_")
    return {k: v for k, v in os.environ.items() if k not in HANDED_DOWN and not k.startswith(ours)}


def new_shell(folder: Path, **more: str) -> dict[str, str]:
    """The variables of a shell in which the environment of `folder` is active and nothing else was set."""
    path = f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}"
    return nothing_set() | {"PATH": path, "PYTHONPATH": str(folder)} | more
