"""FiQA's rows from the Hugging Face hub, under the names and revisions it is known by."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.errors import WorkshopError

if TYPE_CHECKING:
    from datasets import DatasetDict

NAMES = ("explodinggradients/fiqa", "vibrantlabsai/fiqa")
CONFIG = "main"
PARQUET = "refs/convert/parquet"  # the hub's own conversion, for the years when the data set was a script
REMEDY = "use data: packaged (the 648 rows of the test split), or give a folder with the split files as data"


def load_from_hub(revision: str = "") -> tuple[str, "DatasetDict"]:
    """(what was used, in words; its splits). `revision`: a branch, tag or commit; empty tries those known.

    Without a network, the copy that an earlier run left in the Hugging Face cache is used, and said so.

    Raises:
        WorkshopError: the hub can't be reached, or has FiQA under none of the known names.
    """
    from huggingface_hub.errors import HfHubHTTPError

    reasons = []
    for name in NAMES:
        for candidate in [revision] if revision else ["main", PARQUET]:
            try:
                commit = _commit(name, candidate)
                return f"{name}, config {CONFIG}, revision {commit}", _load(name, commit, candidate)
            except HfHubHTTPError as error:
                status = getattr(error.response, "status_code", "no answer")
                reasons.append(f"{name} at {candidate}: HTTP {status}")
            except (ValueError, RuntimeError) as error:  # a script repository, or one without this config
                reasons.append(f"{name} at {candidate}: {_first_line(error)}")
            except Exception as error:  # every HTTP library has a word of its own for "no network"
                return from_cache(revision, _first_line(error))
    raise WorkshopError(f"The hub has no usable FiQA ({'; '.join(reasons)}): {REMEDY}.")


def from_cache(revision: str, reason: str) -> tuple[str, "DatasetDict"]:
    """What an earlier run downloaded (of that commit, if one was asked for); the hub is not asked.

    Raises:
        WorkshopError: nothing of FiQA is in the cache. `reason` says why only the cache was looked at.
    """
    from datasets import config

    was_offline, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True  # else it asks the hub for half a minute
    try:
        for name in NAMES:
            with contextlib.suppress(Exception):  # each way of not being cached is another kind of error
                splits = _load(name, "")
                commit = Path(splits["train"].cache_files[0]["filename"]).parent.name
                if commit.startswith(revision):
                    return f"{name}, config {CONFIG}, revision {commit}, cached (no hub: {reason})", splits
    finally:
        config.HF_HUB_OFFLINE = was_offline
    raise WorkshopError(f"The hub cannot be reached ({reason}): {REMEDY}.") from None


def _commit(name: str, revision: str) -> str:
    """The commit hash behind `revision`, so that all files come from one state, which can be cited."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(name, revision=revision, timeout=20).sha or revision


def _load(name: str, commit: str, revision: str = "main") -> "DatasetDict":
    from datasets import load_dataset

    if revision != PARQUET:
        return load_dataset(name, CONFIG, revision=commit or None)
    files = {split: f"{CONFIG}/{split}/*.parquet" for split in ("train", "validation", "test")}
    return load_dataset(name, data_files=files, revision=commit)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0][:90]}"
