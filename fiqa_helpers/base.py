"""What everything stands on: errors in one sentence, folders, whole files, run cards, the exercise check."""

import contextlib
import errno
import hashlib
import json
import os
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import TextIO

# --- One sentence for the person in front of the screen, instead of a traceback forty frames deep.


class WorkshopError(Exception):
    """Something a person can put right: the message names the culprit and the remedy."""


def shown(value: object) -> str:
    """A value as a sentence quotes it: `repr`, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def install_notebook_handler() -> None:
    """Let IPython show a `WorkshopError` as its sentence alone.

    The cell still fails: papermill exits non-zero, nbmake reports it, Run All stops here. Outside IPython
    this does nothing.
    """
    from IPython import get_ipython

    def show(shell, kind, error, traceback, tb_offset=None) -> None:
        # The frames given here become the cell's error output: one line is enough.
        shell._showtraceback(kind, error, [f"{kind.__name__}: {error}"])

    shell = get_ipython()
    if shell is not None:
        shell.set_custom_exc((WorkshopError,), show)


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


def say(text: str) -> None:
    """A line for the person who waits: on stderr; in a notebook, where that looks like a fault, on stdout."""
    print(text, file=sys.stdout if "ipykernel" in sys.modules else sys.stderr, flush=True)


# --- Where things are: the project, the folders that a run writes to, the cache of packaged assets.


def project_root() -> Path:
    """The folder that holds `notebooks/` and `fiqa_helpers/`.

    Looked for from the working directory upwards, because papermill starts a kernel in the caller's
    folder and nbmake in the notebook's. A package installed with `pip install -e` is the fallback.

    Raises:
        WorkshopError: the notebooks are not in any parent folder.
    """
    here, package = Path.cwd(), Path(__file__).resolve().parent.parent
    for folder in [here, *here.parents, package]:
        if (folder / "fiqa_helpers" / "base.py").is_file() and (folder / "notebooks").is_dir():
            return folder
    raise WorkshopError(f"{here} is not inside the workshop's folder: start JupyterLab or papermill there.")


def cache_dir() -> Path:
    """Folder for downloaded assets, shared by every clone: `FIQA_CACHE`, or `~/.cache/fiqa-workshop`."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FIQA_CACHE") or home / "fiqa-workshop")


def _folder(name: str) -> property:
    """A folder of the workspace: made when it is first asked for."""
    return property(lambda workspace: workspace.made(name), doc=f"`{name}` in the workspace.")


@dataclass(frozen=True)
class Workspace:
    """The folders that a run writes to, under `workdir` (empty: the project folder)."""

    workdir: str = ""

    data = _folder("data")
    checkpoints = _folder("checkpoints")
    outputs = _folder("outputs")
    run_cards = _folder("outputs/run_cards")
    plots = _folder("outputs/plots")
    logs = _folder("outputs/logs")
    evaluation = _folder("outputs/evaluation")

    @cached_property
    def root(self) -> Path:
        """The workspace's own folder. Fixed when it is first asked for: a later chdir must not move it."""
        return Path(self.workdir).expanduser().resolve() if self.workdir else project_root()

    @property
    def final_model(self) -> Path:
        """The adapter that notebook 04 leaves; not made here."""
        return self.checkpoints / "final_model"

    def made(self, name: str) -> Path:
        """The folder `name` in the workspace, made if need be.

        Raises:
            WorkshopError: it can't be made or written to.
        """
        folder = self.root / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, "it is read-only for you")
        except OSError as error:
            raise WorkshopError(
                f"Cannot write to {folder} ({error.strerror}): "
                "set the parameter workdir to a folder you may write to."
            ) from None
        return folder

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


@contextlib.contextmanager
def disk_errors(place: Path, remedy: str) -> Iterator[None]:
    """Turn the error of a full disk inside the block into a `WorkshopError` that ends in `remedy`."""
    try:
        yield
    except Exception as error:  # safetensors, tokenizers and torch have words of their own for a full disk
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not full and not any(
            sign in str(error) for sign in ("os error 28", "inline_container", "iostream error")
        ):
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
PACKAGES = ["torch", "transformers", "peft", "datasets", "nemo-automodel", "nemo-evaluator"]
PACKAGES += ["liger-kernel", "triton"]  # not on every system


def write_card(path: Path, **content: object) -> dict:
    """Write `content` with time, versions and git revision added, as JSON; returns what was written."""
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
    """Installed versions of `PACKAGES`; one that is not installed is left out."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_revision() -> str:
    """Short commit of the working folder, `+` when it holds changes; "unknown" outside a clone."""
    here = shlex.quote(str(Path(__file__).parent))
    describe = "describe --always --dirty=+ --abbrev=12 --exclude='*'"
    status, said = subprocess.getstatusoutput(f"git -C {here} {describe}")
    return said if status == 0 else "unknown"


# --- What the check of an exercise says: not solved yet, what is wrong, or right and what that means.


def check(rule: Callable[..., str], *answers: object) -> None:
    """Print what `rule` finds in `answers`. Nothing is raised: an open exercise must not end a headless run.

    `rule` asserts one thing after the other, each with a hint as its message, and returns what a right answer
    means. Its name is the headline: `exercise_2`. Answers that still hold a `...` are not handed to it. A
    `WorkshopError` of the code under test is a hint as well.
    """
    try:
        if any(is_open(answer) for answer in answers):
            said = "○ not solved yet: put your answer in place of each ... above, run that cell, then this."
        elif not __debug__:
            said = "○ cannot be checked: Python was told to skip assert (PYTHONOPTIMIZE or -O). Unset that."
        else:
            said = f"✓ right. {rule(*answers)}"
    except (AssertionError, WorkshopError) as error:
        said = f"✗ not yet. {error}"
    except NameError as error:
        said = f"✗ not checked ({error}): run the cells above, from the top, or look for a typing mistake."
    except Exception as error:  # whatever an answer of the wrong kind, or broken code, can raise
        said = f"✗ not yet. Your answer cannot be checked, {type(error).__name__}: {error}"
    title = rule.__name__.replace("_", " ").capitalize()
    print(textwrap.fill(f"{title} {said}", 100, subsequent_indent="  "))


def is_open(answer: object) -> bool:
    """True for `...`, `None`, a collection that holds one, and a function that still returns `...`."""
    if isinstance(answer, dict):
        return any(map(is_open, answer.values()))
    if isinstance(answer, list | tuple | set):
        return any(map(is_open, answer))
    if hasattr(answer, "__code__"):  # a function: `return ..., ...` is a constant of its own, a tuple
        constants = answer.__code__.co_consts
        return ... in constants or any(isinstance(part, tuple) and ... in part for part in constants)
    return answer is None or answer is ...
