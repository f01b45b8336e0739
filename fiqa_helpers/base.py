"""What everything stands on: errors in one sentence, folders, whole files, run cards, the exercise check.

`write_card` writes each run card and adds time, versions and commit to it; `read_card` reads it. What the
card of a notebook says is put together in `run.py`.
"""

import contextlib
import errno
import hashlib
import json
import os
import shlex
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TextIO

# --- One sentence for the person in front of the screen, instead of a traceback forty frames deep.


class WorkshopError(Exception):
    """Something a person can put right: the message names the culprit and the remedy.

    The cell fails as with any other error: papermill exits non-zero, nbmake reports it, Run All stops here.
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of the traceback: the sentence alone."""
        return [f"{type(self).__name__}: {self}"]


@cache
def is_interactive() -> bool:
    """True when a person sees this notebook live: JupyterLab, VS Code. False under papermill and nbmake.

    A live frontend allows the kernel to ask for input, a program that executes notebooks does not. Asked
    once, in the first cell: later requests may be a widget's and say nothing.
    """
    from IPython import get_ipython

    try:
        return get_ipython().kernel.get_parent()["content"]["allow_stdin"]
    except (AttributeError, LookupError):  # a terminal, a script, pytest
        return False


# --- Where things are: the project, the folders that a run writes to, the cache of packaged assets.


def project_root() -> Path:
    """The folder that holds `notebooks/` and `fiqa_helpers/`.

    Looked for from the working directory upwards, because papermill starts a kernel in the caller's
    folder and nbmake in the notebook's. A package installed with `pip install -e` is the fallback.

    Raises:
        WorkshopError: the notebooks are not in any parent folder.
    """
    here = Path.cwd()
    for folder in [here, *here.parents, Path(__file__).resolve().parent.parent]:
        if (folder / "fiqa_helpers" / "base.py").is_file() and (folder / "notebooks").is_dir():
            return folder
    raise WorkshopError(f"{here} is not inside the workshop's folder: start JupyterLab or papermill there.")


def cache_dir() -> Path:
    """Folder for downloaded assets, shared by every clone: `FIQA_CACHE`, or `~/.cache/fiqa-workshop`."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FIQA_CACHE") or home / "fiqa-workshop")


def writable_folder(folder: Path, setting: str) -> Path:
    """`folder`, made if need be; `setting` is where a person can name another one.

    Raises:
        WorkshopError: it can't be made or written to.
    """
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise WorkshopError(f"Cannot write to {folder}: set {setting} to a folder you may write to.")
    return folder


def _folder(name: str) -> property:
    """A folder of the workspace: made when it is first asked for."""
    return property(lambda self: writable_folder(self.root / name, "the parameter workdir"))


class Workspace:
    """The folders that a run writes to, under `workdir` (empty: the project folder)."""

    def __init__(self, workdir: str = ""):
        # Whole from the start: a later chdir must not move it.
        self.root = Path(workdir).expanduser().resolve() if workdir else project_root()

    data = _folder("data")
    checkpoints = _folder("checkpoints")
    outputs = _folder("outputs")
    run_cards = _folder("outputs/run_cards")
    plots = _folder("outputs/plots")
    logs = _folder("outputs/logs")
    evaluation = _folder("outputs/evaluation")

    @property
    def final_model(self) -> Path:
        """The adapter that notebook 04 leaves; not made here."""
        return self.checkpoints / "final_model"

    def shown(self, path: Path | str) -> str:
        """`path` as a reader should see it: relative to the workspace where possible."""
        path = Path(path)
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)


# --- Files that appear whole or not at all, one lock, and disk errors in one sentence.


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file that takes the place of `path` when the block ends well; readers never see half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a half."""
    with atomic_writer(path) as file:
        json.dump(content, file, indent=1, ensure_ascii=False, default=str)


@contextlib.contextmanager
def locked(path: Path, busy: str = "") -> Iterator[None]:
    """Hold the lock file `path`; the lock dies with its process, however that ends.

    Where another process holds it, wait, or refuse with the sentence `busy` if there is one. Other users of a
    shared folder may take the lock, too.

    Raises:
        WorkshopError: `busy`.
    """
    from filelock import FileLock, Timeout

    try:
        with FileLock(path, timeout=0 if busy else -1, mode=0o666):
            yield
    except Timeout:
        raise WorkshopError(busy) from None


FULL_DISK = ("os error 28", "os error 122", "inline_container", "iostream error")  # of the libraries below us


@contextlib.contextmanager
def disk_errors(place: Path, remedy: str) -> Iterator[None]:
    """Turn the error of a full disk inside the block into a `WorkshopError` that ends in `remedy`."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not full and not any(words in str(error) for words in FULL_DISK):
            raise
        raise WorkshopError(f"The disk of {place} is full: free some space or {remedy}.") from None


def digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, the SHA-256 over one line `hash  relative/name` per file, sorted."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted((p.relative_to(path).as_posix(), p) for p in path.rglob("*") if p.is_file())
    return hashlib.sha256("".join(f"{digest(p)}  {name}\n" for name, p in files).encode()).hexdigest()


# --- Run cards: what a notebook did, on what, for how long, so that the next one can check what it builds
# on.

# Of these the version decides a result.
PACKAGES = ("torch", "transformers", "peft", "datasets", "nemo-automodel", "nemo-evaluator")


def write_card(path: Path, **content: object) -> dict:
    """Write a run card: `content` with time, versions and git revision added, as JSON. Returns it.

    Every card is written here: those of notebooks (their content comes from `run.Run.finish`), of a training
    run (`machinery/checkpoints.py`), of an evaluation (`evaluate.py`) and of benchmarks.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    card = {"written": now, **content, "versions": versions(), "git_revision": git_revision()}
    write_json(path, card)
    return card


def read_card(path: Path) -> dict | None:
    """The card at `path`; None when there is none, or when it is not one."""
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return card if isinstance(card, dict) else None


def versions() -> dict[str, str]:
    """Installed versions of `PACKAGES`."""
    return {package: metadata.version(package) for package in PACKAGES}


def git_revision() -> str:
    """Short commit of the working folder, `+` when it holds changes; "unknown" outside a clone."""
    here = shlex.quote(str(Path(__file__).parent))
    status, said = subprocess.getstatusoutput(f"git -C {here} describe --always --dirty=+ --exclude='*'")
    return said if status == 0 else "unknown"


# --- What the check of an exercise says: not solved yet, what is wrong, or right and what that means.


def check(rule: Callable[..., str], *answers: object) -> None:
    """Print what `rule` finds in `answers`. Nothing is raised: an open exercise must not end a headless run.

    `rule` asserts one thing after the other, each with a hint as its message, and returns what a right answer
    means. Its name is the headline: `exercise_2`. Answers that still hold a `...` are not handed to it. A
    `WorkshopError` of the code under test is a hint as well.
    """
    try:
        if any(map(is_open, answers)):
            said = "○ not solved yet: put your answer in place of each ... above, run that cell, then this."
        else:
            said = f"✓ right. {rule(*answers)}"
    except (AssertionError, WorkshopError) as error:
        said = f"✗ not yet. {error}"
    except Exception as error:  # whatever an answer of the wrong kind, or broken code, can raise
        said = f"✗ not yet. Your answer cannot be checked, {type(error).__name__}: {error}"
    title = rule.__name__.replace("_", " ").capitalize()
    print(textwrap.fill(f"{title} {said}", 100, subsequent_indent="  "))


def is_open(answer: object) -> bool:
    """True for `...`, `None`, a list, tuple or set that holds one, and a function that still has a `...`."""
    if hasattr(answer, "__code__"):
        return "Ellipsis" in repr(answer.__code__.co_consts)
    parts = answer if isinstance(answer, list | tuple | set) else [answer]
    return any(part is None or part is ... for part in parts)
