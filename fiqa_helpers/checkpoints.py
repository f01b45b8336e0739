"""Which checkpoint may be resumed from, and whether this run is still the one that wrote it."""

import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.runcard import read_card, write_card, write_json

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
    """Vouch for a finished checkpoint: size and sha256 of every file, written last and atomically."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    write_json(folder / MANIFEST, {"files": files})


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None when every file is as its manifest says."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "it has no manifest, so writing it was interrupted"
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["size"]:
            return f"{name} has {path.stat().st_size} bytes, not {wanted['size']}"
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != wanted["sha256"]:
                return f"{name} was changed after it was written"
    return None


def newest_complete(run: Path) -> Path | None:
    """The newest checkpoint whose files are all intact; damaged newer ones are reported and set aside."""
    steps = [int(path.name.removeprefix(PREFIX)) for path in run.glob(f"{PREFIX}*[0-9]") if path.is_dir()]
    for step in sorted(steps, reverse=True):
        folder = checkpoint_folder(run, step)
        problem = fault(folder)
        if problem is None:
            return folder
        aside = set_aside(folder, run / "set_aside")
        print(f"{folder.name} is not used: {problem}. It is kept as {aside.relative_to(run.parent)}.")
    return None


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

    `rows` are fingerprints of the encoded splits. With `on_existing="fresh"` an earlier run and its adapter
    are moved to `checkpoints/earlier`, never deleted.

    Raises:
        WorkshopError: the folder holds a run with other settings, rows, model or prompt; names them.
    """
    if on_existing not in ("resume", "fresh"):
        raise WorkshopError(f"on_existing is {on_existing!r}: choose resume or fresh.")
    folder = workspace.checkpoints / "run"
    definition = define(profile, rows)
    if on_existing == "fresh":
        earlier = workspace.checkpoints / "earlier"
        for path in (folder, workspace.final_model):
            if path.exists():
                print(
                    f"{path.name} of an earlier run is kept as {workspace.shown(set_aside(path, earlier))}."
                )
    folder.mkdir(parents=True, exist_ok=True)
    recorded = read_card(folder / "run.json")
    if recorded is None:
        write_json(folder / "run.json", definition)
    elif recorded != definition:
        changes = [
            f"{key} was {recorded.get(key)!r} and is now {definition.get(key)!r}"
            for key in {**recorded, **definition}
            if recorded.get(key) != definition.get(key)
        ]
        raise WorkshopError(
            f"{workspace.shown(folder)} holds a run with other settings ({'; '.join(changes)}): use the old "
            'ones to go on with it, or set on_existing = "fresh" to keep it aside and begin anew.'
        )
    card = read_card(workspace.final_model / "run_card.json")
    finished = card if card and card.get("definition") == definition and card.get("finished") else None
    return TrainingRun(folder, definition, None if finished else newest_complete(folder), finished)


def define(profile: "Profile", rows: dict[str, str]) -> dict:
    """Everything that decides what a run computes, as plain JSON values."""
    shown_only = ("name", "title", "sample_steps", "max_new_tokens")
    settings = {key: value for key, value in asdict(profile).items() if key not in shown_only}
    return json.loads(json.dumps(settings | {f"{split}_sha256": digest for split, digest in rows.items()}))


def save_final(
    model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", folder: Path, **card: object
) -> dict:
    """Write adapter, tokenizer and run card to `folder`; an older one gives way to a complete one only."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        written = write_card(partial / "run_card.json", **card)
        old = set_aside(folder, folder.parent / "earlier") if folder.exists() else None
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if old is not None:
        shutil.rmtree(old)
    return written
