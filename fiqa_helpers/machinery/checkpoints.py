"""Checkpoints of a run: written whole, taken up again, and refused when they are another run's."""

import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.base import (
    WorkshopError,
    digest,
    disk_errors,
    read_card,
    to_disk,
    versions,
    write_card,
    write_json,
)
from fiqa_helpers.model import model_files
from fiqa_helpers.rows import SYSTEM_TEXT

if TYPE_CHECKING:
    from datasets import Dataset
    from filelock import BaseFileLock
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from fiqa_helpers.base import Workspace
    from fiqa_helpers.profiles import Profile

# --- What makes two training runs the same one, and the lock that keeps two processes out of one run.

SHOWN_ONLY = ("name", "title", "sample_steps", "max_new_tokens")  # settings that training does not depend on
MEMORY_ONLY = ("tokens_per_batch", "gradient_checkpointing")  # the same sums in other portions
WORDS = {"prompt_sha256": "the prompt template", "model_files": "the model's files"}
# fmt: off
DECISIVE = (  # arguments that a run must be resumed with
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim",
    "adam_beta1", "adam_beta2", "adam_epsilon", "seed", "data_seed", "bf16", "fp16",
    "logging_steps", "eval_steps",
)
# fmt: on

_locks: "dict[Path, BaseFileLock]" = {}  # held until this process ends, however it ends


def define(profile: "Profile", rows: dict[str, str]) -> dict:
    """Everything that decides what a run computes, as plain JSON values."""
    settings = {key: value for key, value in asdict(profile).items() if key not in SHOWN_ONLY}
    settings |= {f"{split}_sha256": digest for split, digest in rows.items()}
    settings["prompt_sha256"] = hashlib.sha256(SYSTEM_TEXT.encode()).hexdigest()
    settings["model_files"] = model_files(profile)
    return json.loads(json.dumps(settings))


def refuse_other(place: str, recorded: dict | None, definition: dict, begun: bool) -> None:
    """Let a run go on only with what it was begun with; a change of memory settings alone is announced.

    `recorded` is what run.json holds, `begun` whether there are checkpoints, `place` the folder for messages.

    Raises:
        WorkshopError: with the differences.
    """
    known = (recorded or {}).get("definition")
    if not isinstance(known, dict):
        if begun:
            raise WorkshopError(
                f"{place} holds checkpoints and no readable run.json, so what they belong to is unknown: "
                'set on_existing = "fresh" to keep them aside and begin anew.'
            )
        return
    changed = [key for key in {**known, **definition} if known.get(key) != definition.get(key)]
    said = "; ".join(_change(key, known.get(key), definition.get(key)) for key in changed)
    if set(changed) - set(MEMORY_ONLY):
        raise WorkshopError(
            f"{place} holds a run with other settings ({said}): use the old ones to go on with it, or set "
            'on_existing = "fresh" to keep it aside and begin anew.'
        )
    before, now = recorded.get("versions", {}), versions()
    updated = [
        f"{name} {before[name]} -> {now.get(name)}" for name in before if before[name] != now.get(name)
    ]
    if begun and (said or updated):
        said = "; ".join(filter(None, [said, *updated]))
        print(f"The run goes on with a difference ({said}): results may differ in the last digits.")


def decisive_arguments(
    arguments: "TrainingArguments", adapters: "dict[str, LoraConfig]", **rows: "Dataset"
) -> dict[str, object]:
    """What a Trainer was given that its run depends on, as JSON gives it back: also what a cell changed."""
    values = {name: getattr(arguments, name) for name in DECISIVE}
    for config in adapters.values():
        values |= {"lora_r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
        values["lora_targets"] = sorted(config.target_modules)
    values |= {f"{split}_sha256": _encoded(encoded) for split, encoded in rows.items()}
    return {n: v if isinstance(v, bool | int | float | str | None) else str(v) for n, v in values.items()}


def _encoded(rows: "Dataset") -> str:
    """SHA-256 over token ids and labels: rows, tokenizer, template and mask are all in it."""
    total = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(1000):
        for column in (batch["input_ids"], batch["labels"]):
            lists = column.combine_chunks()
            for numbers in (lists.value_lengths(), lists.flatten()):
                total.update(numbers.to_numpy().astype("int64").tobytes())
    return total.hexdigest()


def refuse_other_arguments(checkpoint: str, before: dict[str, object], now: dict[str, object]) -> None:
    """A checkpoint goes on with the arguments it was written with, or not at all.

    Raises:
        WorkshopError: with the differences.
    """
    changed = [_change(name, before[name], now.get(name)) for name in before if before[name] != now.get(name)]
    if changed:
        raise WorkshopError(
            f"{checkpoint} was written with other training arguments ({'; '.join(changed)}): use the "
            'old ones, or set on_existing = "fresh" to begin anew.'
        )


def _change(key: str, before: object, now: object) -> str:
    if key.endswith("_sha256") or key in WORDS:
        return f"{WORDS.get(key, f'the {key.removesuffix("_sha256")} rows')} changed ({key})"
    return f"{key} was {before!r} and is now {now!r}"


def lock(workspace: "Workspace") -> None:
    """Take the training run for this process. The lock is the system's: it ends with a killed process too.

    Raises:
        WorkshopError: another process has it.
    """
    from filelock import FileLock, Timeout

    path = workspace.checkpoints / ".run.lock"
    if path in _locks:
        return
    taken, owner = FileLock(path), path.with_suffix(".pid")
    try:
        taken.acquire(timeout=0)
    except Timeout:
        process = owner.read_text(encoding="ascii").strip() if owner.is_file() else "unknown"
        raise WorkshopError(
            f"Another process ({process}) has the run in {workspace.shown(workspace.checkpoints)}: wait for "
            "it, shut down its kernel, or set the parameter workdir to another folder."
        ) from None
    except NotImplementedError:  # some network file systems
        print("This file system has no locks: make sure that only one process trains here.")
        return
    _locks[path] = taken
    owner.write_text(f"{os.getpid()}\n", encoding="ascii")


# --- Which checkpoint may be resumed from; beginning, resuming and finishing a run.

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
