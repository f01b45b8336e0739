"""Run cards: what a notebook did, on what, for how long, so that the next one can check what it builds on."""

import json
import os
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from fiqa_helpers.storage import to_disk

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
