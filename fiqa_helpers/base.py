"""What everything stands on: errors in one sentence, folders, safe files, run cards, exercise checks."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TextIO

# --- One sentence for the person in front of the screen, instead of a traceback forty frames deep.


class WorkshopError(Exception):
    """Something a person can put right: the message names the culprit and the remedy."""


def shown(value: object, longest: int = 80) -> str:
    """A value as a sentence quotes it: `repr`, cut to `longest` characters."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write integers of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def a_type(kind: type) -> str:
    """The name of a type with its article: a float, an int."""
    return f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}"


def install_notebook_handler() -> None:
    """Let IPython show a `WorkshopError` as its sentence alone.

    The cell still fails: papermill exits non-zero, nbmake reports it, Run All stops here. Outside IPython
    this does nothing.
    """
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None:
        return

    def show(shell, kind, error, traceback, tb_offset=None) -> None:
        # The frames given here become the cell's error output: one line is enough.
        shell._showtraceback(kind, error, [f"{kind.__name__}: {error}"])

    shell.set_custom_exc((WorkshopError,), show)


# --- Where things are: the project, the folders that a run writes to, the cache of packaged assets.


def project_root() -> Path:
    """The folder that holds `notebooks/` and `fiqa_helpers/`.

    Looked for from the working directory upwards, because papermill starts a kernel in the caller's
    folder and nbmake in the notebook's. A package installed with `pip install -e` is the fallback.

    Raises:
        WorkshopError: the notebooks are not in any parent folder.
    """
    here = Path.cwd()
    package = Path(__file__).resolve().parent.parent
    for folder in [here, *here.parents, package]:
        if (folder / "fiqa_helpers" / "base.py").is_file() and (folder / "notebooks").is_dir():
            return folder
    raise WorkshopError(f"{here} is not inside the workshop's folder: start JupyterLab or papermill there.")


def cache_dir() -> Path:
    """Folder for downloaded assets, shared by every clone: `FIQA_CACHE`, or `~/.cache/fiqa-workshop`."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fiqa-workshop"
    return Path(os.environ.get("FIQA_CACHE") or default)


@dataclass(frozen=True)
class Workspace:
    """The folders that a run writes to, under `workdir` (empty: the project folder)."""

    workdir: str = ""

    @cached_property
    def root(self) -> Path:
        if not self.workdir:
            return project_root()
        try:
            return Path(self.workdir).expanduser().resolve()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, ~ of an unknown user
            raise WorkshopError(
                f"workdir is {shown(self.workdir)}, which is no folder's name ({error}): set another."
            ) from None

    def _folder(self, *parts: str) -> Path:
        folder = self.root.joinpath(*parts)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "it is read-only for you")
        except OSError as error:
            raise WorkshopError(
                f"Cannot write to {shown(str(folder), 200)} ({error.strerror}): "
                "set the parameter workdir to a folder you may write to."
            ) from None
        return folder

    @property
    def data(self) -> Path:
        return self._folder("data")

    @property
    def checkpoints(self) -> Path:
        return self._folder("checkpoints")

    @property
    def final_model(self) -> Path:
        return self.checkpoints / "final_model"

    @property
    def outputs(self) -> Path:
        return self._folder("outputs")

    @property
    def run_cards(self) -> Path:
        return self._folder("outputs", "run_cards")

    @property
    def plots(self) -> Path:
        return self._folder("outputs", "plots")

    @property
    def logs(self) -> Path:
        return self._folder("outputs", "logs")

    @property
    def evaluation(self) -> Path:
        return self._folder("outputs", "evaluation")

    def shown(self, path: Path | str) -> str:
        """`path` as a reader should see it: relative to the workspace where possible."""
        path = Path(path)
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)


# --- Files that appear whole or not at all, locks between processes, and disk errors in one sentence.


def say(text: str) -> None:
    """A line for the person who waits: on stderr; in a notebook, where that looks like a fault, on stdout."""
    print(text, file=sys.stdout if "ipykernel" in sys.modules else sys.stderr, flush=True)


@contextlib.contextmanager
def exclusive(cache: Path, name: str) -> Iterator[Path]:
    """Hold the lock `name` in `cache` and hand out an empty working folder beside it, gone at the end.

    What a killed process left behind lies in such a folder and is removed by the next one to hold the lock;
    the lock itself dies with its process.

    Raises:
        WorkshopError: the disk is full or can't be written, here or inside the block.
    """
    from filelock import FileLock, Timeout

    with disk_errors(cache, "set FIQA_CACHE to another folder"):
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f".{name}.lock")
        try:
            lock.acquire(timeout=2)
        except Timeout:
            say(f"Another process is preparing {name}: waiting for it ...")
            lock.acquire()
        try:
            for leftover in cache.glob(f".tmp-{name}-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(
                prefix=f".tmp-{name}-", dir=cache, ignore_cleanup_errors=True
            ) as work:
                yield Path(work)
        finally:
            lock.release()


@contextlib.contextmanager
def disk_errors(place: Path, remedy: str) -> Iterator[None]:
    """Turn disk errors inside the block into a `WorkshopError` that names `place` and ends in `remedy`."""
    try:
        yield
    except WorkshopError:
        raise
    except Exception as error:  # safetensors and tokenizers have exceptions of their own for a full disk
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
            raise WorkshopError(f"The disk of {place} is full: free some space or {remedy}.") from None
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise WorkshopError(f"Cannot write to {place}: {remedy}.") from None
        if isinstance(error, OSError):
            raise WorkshopError(f"{place} cannot be used ({error}): {remedy}.") from None
        raise


def check_space(cache: Path, needed: int) -> None:
    """Refuse early what would not fit. `needed` in bytes.

    Raises:
        WorkshopError: with both figures.
    """
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise WorkshopError(
            f"{cache} has {free / 1e6:,.0f} MB free and {needed / 1e6:,.0f} MB are needed: "
            "free some space or set FIQA_CACHE to another folder."
        )


def publish(made: Path, target: Path) -> None:
    """Move the finished folder `made` to `target` in one step. Call it while holding the lock.

    A damaged `target` is moved out of the way first; a kill in between leaves none: the next call repairs it.
    """
    for path in made.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # some libraries write private files; the cache may be shared
            to_disk(path)
    if target.exists():
        os.replace(target, made.parent / "damaged")  # in the working folder: it goes with it
    os.replace(made, target)


def digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, the SHA-256 over one line `hash  relative/name` per file, sorted."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted((p.relative_to(path).as_posix(), p) for p in path.rglob("*") if p.is_file())
    return hashlib.sha256("".join(f"{digest(p)}  {name}\n" for name, p in files).encode()).hexdigest()


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file that takes the place of `path` when the block ends well; readers never see half of it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".tmp-{path.name}-")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # a temporary file is private; the finished one is not
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def to_disk(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk: they survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system can do that to a folder
            raise
    finally:
        os.close(handle)


def is_interactive() -> bool:
    """True when a Jupyter server started this kernel for a person; papermill and nbmake: False."""
    return "JPY_SESSION_NAME" in os.environ


# --- Run cards: what a notebook did, on what, for how long, so that the next one can check what it builds
# on.

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "nemo-automodel",
    "nemo-evaluator",
    "liger-kernel",
    "triton",
)


def write_card(path: Path, **content: object) -> dict:
    """Write `content` with time, versions and git revision added, as JSON; returns what was written.

    The values of secret environment variables (tokens, keys, passwords) are blanked wherever they stand.
    """
    card = {"written": datetime.now(UTC).isoformat(timespec="seconds"), **content}
    card |= {"versions": versions(), "git_revision": git_revision()}
    card = without_secrets(card)
    write_json(path, card)
    return card


def without_secrets(content: object) -> object:
    """`content` (dicts, lists and plain values) with each secret of the environment replaced by ***."""
    name = re.compile(r"TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|API_?KEY|_KEY$", re.IGNORECASE)
    secrets = [value for key, value in os.environ.items() if name.search(key) and len(value) >= 8]
    secrets.sort(key=len, reverse=True)  # one that contains another goes first

    def clean(value: object) -> object:
        if isinstance(value, dict):
            return {clean(key): clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        if isinstance(value, Path):
            value = str(value)
        if isinstance(value, str):
            for secret in secrets:
                value = value.replace(secret, "***")
        return value

    return clean(content)


def read_card(path: Path) -> dict | None:
    """The card at `path`; None when there is none, or when it is not one."""
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return card if isinstance(card, dict) else None


def write_json(path: Path, content: object) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a half."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, ensure_ascii=False, default=str)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_revision() -> str:
    """Short commit of the working folder, `+` when it holds changes; "unknown" outside a clone."""
    git = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    folder = Path(__file__).resolve().parent
    try:
        run = subprocess.run(git, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.strip() or "unknown"


# --- What the check of an exercise says: not solved yet, what is wrong, or right and what that means.

WIDTH = 100  # characters of a line


def check(rule: Callable[..., str], *answers: object) -> None:
    """Print what `rule` finds in `answers`. Nothing is raised: an open exercise must not end a headless run.

    `rule` asserts one thing after the other, each with a hint as its message, and returns what a right answer
    means. Its name is the headline: `exercise_2`. Answers that still hold a `...` are not handed to it. A
    `WorkshopError` of the code under test is a hint as well.
    """
    try:
        if any(is_open(answer) for answer in answers):
            said = (
                "○ not solved yet: put your answer in place of each ... above, run that cell, then this one."
            )
        else:
            said = f"✓ right. {rule(*answers)}"
    except (AssertionError, WorkshopError) as error:
        said = f"✗ not yet. {error}"
    except NameError as error:
        said = f"✗ not checked ({error}): run the cells above, from the top, or look for a typing mistake."
    except (
        Exception
    ) as error:  # whatever an answer of the wrong kind, or code that is still broken, can raise
        said = f"✗ not yet. Your answer cannot be checked, {type(error).__name__}: {error}"
    title = rule.__name__.replace("_", " ").capitalize()
    print(textwrap.fill(f"{title} {said}", WIDTH, subsequent_indent="  "))


def is_open(answer: object) -> bool:
    """True for `...`, `None`, a collection that holds one, and a function that still returns `...`."""
    if isinstance(answer, list | tuple | set | dict):
        return any(is_open(part) for part in (answer.values() if isinstance(answer, dict) else answer))
    if hasattr(answer, "__code__"):  # a function: `return ..., ...` is a constant of its own, a tuple
        constants = answer.__code__.co_consts
        return ... in constants or any(isinstance(part, tuple) and ... in part for part in constants)
    return answer is None or answer is ...
