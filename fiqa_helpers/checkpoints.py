"""Which checkpoint may be resumed from; beginning, resuming and finishing a run."""

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.run_identity import define, lock, refuse_other
from fiqa_helpers.runcard import read_card, versions, write_card, write_json
from fiqa_helpers.storage import digest, disk_errors, to_disk

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from fiqa_helpers.paths import Workspace
    from fiqa_helpers.profiles import Profile

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"


def checkpoint_folder(run: Path | str, step: int) -> Path:
    """Where the Trainer keeps the checkpoint of `step`."""
    return Path(run) / f"{PREFIX}{step}"


def write_manifest(folder: Path) -> None:
    """Vouch for a finished checkpoint: size and sha256 of every file, written last and atomically.

    When it returns, all of it is on the disk, so that an older checkpoint may go.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            to_disk(path)
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": digest(path)}
        elif path.is_dir():
            to_disk(path)
    write_json(folder / MANIFEST, {"files": files})
    to_disk(folder.parent)


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None when every file is as its manifest says."""
    if not folder.is_dir():
        return "it is missing"
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        files = [(name, entry["size"], entry["sha256"]) for name, entry in listed.items()]
    except FileNotFoundError:
        return "it has no manifest, so writing it was interrupted"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is damaged"
    if not files:
        return "its manifest names no file"
    for name, size, sha256 in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if digest(path) != sha256:
            return f"{name} was changed after it was written"
    return None


def steps_of(run: Path) -> list[int]:
    """Steps of all checkpoint folders of a run, complete or not, newest first."""
    names = [path.name.removeprefix(PREFIX) for path in run.glob(f"{PREFIX}*") if path.is_dir()]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def newest_complete(run: Path) -> Path | None:
    """The newest checkpoint whose files are all intact; damaged newer ones are reported and set aside."""
    for step in steps_of(run):
        folder = checkpoint_folder(run, step)
        problem = fault(folder)
        if problem is None:
            return folder
        report_and_set_aside(folder, problem)
    return None


def refuse_other_start(run: Path, resume_from: Path | str | None) -> None:
    """Training begins at the newest whole checkpoint, or where there is none. A cell that is run again alone
    would begin at an older one, or at step 0 with weights that are trained already.

    Raises:
        WorkshopError: names both.
    """
    newest = newest_complete(run)
    there, wanted = newest.name if newest else None, Path(resume_from).name if resume_from else None
    if there != wanted:
        raise WorkshopError(
            f"{run.name} holds {there or 'no whole checkpoint'} and this would begin at "
            f"{wanted or 'step 0'}: restart the kernel and run all cells."
        )


def best_complete(run: Path, log_history: list[dict]) -> tuple[int, float] | None:
    """(step, validation loss) of the intact checkpoint with the lowest validation loss."""
    losses = {row["step"]: row["eval_loss"] for row in log_history if "eval_loss" in row}
    ranked = sorted((losses[step], step) for step in steps_of(run) if step in losses)
    return next(((step, loss) for loss, step in ranked if fault(checkpoint_folder(run, step)) is None), None)


def report_and_set_aside(folder: Path, problem: str) -> None:
    """Move a damaged checkpoint out of the way and say so; nothing is deleted."""
    if folder.exists():
        aside = set_aside(folder, folder.parent / "set_aside")
        print(f"{folder.name} is not used: {problem}. It is kept as {aside.relative_to(folder.parents[1])}.")


def set_aside(path: Path, into: Path) -> Path:
    """Move `path` into the folder `into` under a name with the time; returns where it is now."""
    into.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    target = into / f"{path.name}-{stamp}"
    count = 1
    while target.exists():
        count += 1
        target = into / f"{path.name}-{stamp}-{count}"
    return path.rename(target)


@dataclass(frozen=True)
class TrainingRun:
    """A run's folder, what defines the run, and where to take it up."""

    folder: Path
    definition: dict
    resume_from: Path | None  # newest complete checkpoint; None for a fresh start
    final_card: dict | None  # card of a finished adapter of this very run


def open_run(
    workspace: "Workspace", profile: "Profile", rows: dict[str, str], on_existing: str = "resume"
) -> TrainingRun:
    """Begin, resume or recognise as finished the training run in `checkpoints/run`; says which.

    `rows` are fingerprints of the splits. With `on_existing="fresh"` an earlier run and its adapter
    are moved to `checkpoints/earlier`, never deleted. The folder is this process's until the process ends.

    Raises:
        WorkshopError: the folder holds a run with other settings, rows, model or prompt (names them), another
            process trains in it, or it cannot be written.
    """
    if on_existing not in ("resume", "fresh"):
        raise WorkshopError(f"on_existing is {on_existing!r}: choose resume or fresh.")
    folder, final = workspace.checkpoints / "run", workspace.final_model
    definition = define(profile, rows)
    with disk_errors(workspace.checkpoints, "set the parameter workdir to another folder"):
        lock(workspace)
        if on_existing == "fresh":
            for path in (folder, final):
                if path.exists():
                    kept = set_aside(path, workspace.checkpoints / "earlier")
                    print(f"{path.name} of an earlier run is kept as {workspace.shown(kept)}.")
        folder.mkdir(parents=True, exist_ok=True)
        recorded = read_card(folder / "run.json")
        refuse_other(workspace.shown(folder), recorded, definition, begun=bool(steps_of(folder)))
        # also on resume: a changed MEMORY_ONLY setting is the run's from now on
        write_json(folder / "run.json", {"definition": definition, "versions": versions()})
        card = read_card(final / "run_card.json")
        if card and card.get("finished") and card.get("definition") == definition:
            problem = fault(final)
            if problem is None:
                return TrainingRun(folder, definition, None, card)
            report_and_set_aside(final, problem)
        return TrainingRun(folder, definition, newest_complete(folder), None)


def save_final(
    model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", folder: Path, **card: object
) -> dict:
    """Write adapter, tokenizer and run card to `folder`; an older adapter is kept in `earlier` beside it.

    Raises:
        WorkshopError: the disk is full or cannot be written; an older adapter is still there.
    """
    for leftover in folder.parent.glob(f".{folder.name}.*.partial"):  # of a process killed while saving
        shutil.rmtree(leftover, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        with disk_errors(folder.parent, "run this notebook again in a workdir with more space"):
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            written = write_card(partial / "run_card.json", **card)
            write_manifest(partial)
            if folder.exists():
                kept = set_aside(folder, folder.parent / "earlier")
                print(f"The earlier {folder.name} is kept as {kept.relative_to(folder.parent)}.")
            os.replace(partial, folder)
            to_disk(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return written
