"""Files that appear whole or not at all, locks between processes, and disk errors in one sentence."""

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from fiqa_helpers.errors import WorkshopError


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
