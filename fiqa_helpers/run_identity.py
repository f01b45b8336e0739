"""What makes two training runs the same one, and the lock that keeps two processes out of one run."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.prompts import SYSTEM_TEXT
from fiqa_helpers.runcard import versions

if TYPE_CHECKING:
    from datasets import Dataset
    from filelock import BaseFileLock
    from peft import LoraConfig
    from transformers import TrainingArguments

    from fiqa_helpers.paths import Workspace
    from fiqa_helpers.profiles import Profile

SHOWN_ONLY = ("name", "title", "sample_steps", "max_new_tokens")  # settings that training does not depend on
MEMORY_ONLY = ("tokens_per_batch", "gradient_checkpointing")  # the same sums in other portions
WORDS = {"prompt_sha256": "the prompt template", "model_files": "the model's files"}
SAMPLES, SAMPLE_BYTES = 16, 65536  # of each file of a model folder
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


def model_files(profile: "Profile") -> str:
    """What tells one model from another of the same name: a commit of the hub, or a hash of a folder.

    Of each file in a folder the name, the size and 16 samples of 64 KiB are hashed: other weights differ in
    all of them, and 16 GB need not be read.
    """
    folder = Path(profile.model).expanduser()
    if not folder.is_dir():
        if "/" not in profile.model:  # packaged (its hash is pinned) or random
            return profile.model
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(profile.model, "config.json", revision=profile.model_revision)
        return Path(config).parent.name if isinstance(config, str) else profile.model_revision
    total = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        size = path.stat().st_size
        total.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for part in range(SAMPLES):
                file.seek(size * part // SAMPLES)
                total.update(file.read(SAMPLE_BYTES))
    return total.hexdigest()


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
