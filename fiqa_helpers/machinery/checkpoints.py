"""Checkpoints of a run: written whole, resumed, and refused when they are another run's."""

import contextlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from fiqa_helpers import base
from fiqa_helpers.base import WorkshopError, Workspace, digest, locked, read_card, write_card, write_json
from fiqa_helpers.profiles import Profile
from fiqa_helpers.rows import SYSTEM_TEXT

MANIFEST = "manifest.json"  # written last: whoever finds it knows that the files it names were all finished
PREFIX = "checkpoint-"
SHOWN_ONLY = ("name", "title", "sample_steps", "max_new_tokens")  # settings that training does not depend on
MEMORY_ONLY = ("tokens_per_batch", "gradient_checkpointing")  # the same sums in other portions

_locks = contextlib.ExitStack()  # held until this process ends, however it ends

# --- Whole or not.


def checkpoint_folder(run: Path | str, step: int) -> Path:
    """Where the Trainer keeps the checkpoint of `step`."""
    return Path(run) / f"{PREFIX}{step}"


def write_manifest(folder: Path) -> None:
    """Vouch for a finished checkpoint or adapter: SHA-256 of every file, written last."""
    (folder / MANIFEST).unlink(missing_ok=True)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): {"sha256": digest(path)} for path in paths}
    write_json(folder / MANIFEST, {"files": files})


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint or adapter, in a few words; None when it is as its manifest says."""
    files = (read_card(folder / MANIFEST) or {}).get("files")
    if not files:
        return "it has no readable manifest, so writing it was interrupted"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or digest(path) != entry["sha256"]:
            return f"{name} is missing or was changed"
    return None


def steps_of(run: Path) -> list[int]:
    """Steps of all checkpoint folders of a run, whole or not, newest first."""
    names = [path.name.removeprefix(PREFIX) for path in run.glob(f"{PREFIX}*") if path.is_dir()]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def newest_complete(run: Path) -> Path | None:
    """The newest whole checkpoint. A kill leaves a half-written one, which is passed over and named."""
    for step in steps_of(run):
        folder = checkpoint_folder(run, step)
        if (problem := fault(folder)) is None:
            return folder
        print(f"{folder.name} is not used: {problem}.")
    return None


def way_on(run: Path | str) -> str:
    """Which checkpoint is left, for the end of a sentence."""
    last = newest_complete(Path(run))
    return f"the next run goes on from {last.name}" if last else "no checkpoint was written yet"


def refuse_other_start(run: Path, resume_from: Path | str | None) -> None:
    """Training begins at the newest whole checkpoint, or at step 0 where there is none.

    A cell that is run again alone would begin at an older one, or at step 0 with weights that are trained.

    Raises:
        WorkshopError: it would begin elsewhere.
    """
    if newest_complete(run) != (resume_from and Path(resume_from)):
        raise WorkshopError("Training begins at the newest checkpoint: restart the kernel and run all cells.")


# --- Beginning, resuming and finishing a run.


@dataclass(frozen=True)
class TrainingRun:
    """A run's folder, what defines the run, and where to take it up."""

    folder: Path
    definition: dict
    resume_from: Path | None  # newest complete checkpoint; None for a fresh start
    final_card: dict | None  # card of a finished adapter of this very run


def open_run(
    workspace: Workspace, profile: Profile, rows: dict[str, str], on_existing: str = "resume"
) -> TrainingRun:
    """Begin, resume or recognise as finished the training run in `checkpoints/run`.

    `rows` are fingerprints of the splits. With `on_existing="fresh"` an earlier run and its adapter are moved
    to `checkpoints/earlier`, never deleted. The folder is this process's until the process ends.

    Raises:
        WorkshopError: the folder holds a run with other settings, rows, model or prompt (names them), or
            another process trains in it.
    """
    if on_existing not in ("resume", "fresh"):
        raise WorkshopError(f"on_existing is {on_existing!r}: it must be resume or fresh.")
    folder, final = workspace.checkpoints / "run", workspace.final_model
    take(folder)
    if on_existing == "fresh":
        set_aside(folder)
        set_aside(final)
    definition = define(profile, rows)
    refuse_other(folder, definition)
    folder.mkdir(exist_ok=True)
    write_json(folder / "run.json", {"definition": definition})
    card = read_card(final / "run_card.json") or {}
    if card.get("finished") and card.get("definition") == definition and fault(final) is None:
        return TrainingRun(folder, definition, None, card)
    return TrainingRun(folder, definition, newest_complete(folder), None)


@cache  # a cell may be run twice in one kernel
def take(folder: Path) -> None:
    """Keep other processes out of a run until this one ends.

    Raises:
        WorkshopError: another process has it.
    """
    busy = f"Another process trains in {folder}: shut down its kernel, or set workdir to another folder."
    _locks.enter_context(locked(folder.with_name(f".{folder.name}.lock"), busy))


def define(profile: Profile, rows: dict[str, str]) -> dict:
    """What makes two runs the same one: everything that decides what is computed, as plain JSON values."""
    free = SHOWN_ONLY + MEMORY_ONLY
    settings = {key: value for key, value in asdict(profile).items() if key not in free}
    settings |= {f"{split}_sha256": fingerprint for split, fingerprint in rows.items()}
    settings["prompt_sha256"] = sha256(SYSTEM_TEXT.encode()).hexdigest()
    return json.loads(json.dumps(settings))


def refuse_other(folder: Path, definition: dict) -> None:
    """Let a run go on only with what it was begun with.

    Raises:
        WorkshopError: with the differences.
    """
    known = (read_card(folder / "run.json") or {}).get("definition")
    if known is None and steps_of(folder):
        raise WorkshopError(f'{folder} holds checkpoints of an unknown run: set on_existing = "fresh".')
    known = known or definition
    changed = [key for key in definition if known.get(key) != definition[key]]
    said = "; ".join(f"{key} was {known.get(key)!r} and is now {definition[key]!r}" for key in changed)
    if said:
        raise WorkshopError(
            f"{folder} holds a run with other settings ({said}): use the old ones to go on with it, or set "
            'on_existing = "fresh" to keep it aside and begin anew.'
        )


def save_final(model, tokenizer, folder: Path, **card: object) -> dict:
    """Write the PEFT model's adapter, the tokenizer and a run card to `folder`; returns the card.

    The folder appears whole or not at all; an older adapter is kept in `earlier` beside it.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process killed while saving
    with base.disk_errors(folder.parent, "set workdir to another disk; the last checkpoint is intact"):
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        written = write_card(partial / "run_card.json", **card)
        write_manifest(partial)
    set_aside(folder)
    partial.rename(folder)
    return written


def set_aside(path: Path) -> None:
    """Move `path`, if it is there, to `earlier` beside it under a name with the time; nothing is deleted."""
    if path.exists():
        now = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1000}"
        target = path.parent / "earlier" / f"{path.name}-{now}"
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        print(f"The earlier {path.name} is kept as {target.relative_to(path.parent)}.")
