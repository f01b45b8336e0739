"""FiQA from the hub, the packaged rows or files of one's own: the same columns, every repair counted."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.assets import ASSETS, fiqa_test_file
from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.paths import Workspace, project_root
from fiqa_helpers.row_files import SUFFIXES, Row, clean_rows, read_rows
from fiqa_helpers.storage import atomic_writer, disk_errors

if TYPE_CHECKING:
    from datasets import DatasetDict

SPLITS = ("train", "validation", "test")
PROCESSED = {
    "train": "train_processed.json",
    "validation": "val_processed.json",
    "test": "test_processed.json",
}
MANIFEST = "processed.json"  # written last: says which three files belong together
REPEATED = "with a question that the split already has: the first one kept"
LEAKED = "with a question of a later split (validation, test): taken out, so that nothing leaks"

_SPLIT_NAME = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])")
_SALT = "fiqa-workshop-1:"  # another salt would be another split: keep it

Rows = list[tuple[str, list[str]]]  # question, answers
NamedRows = tuple[str, Iterable[tuple[int, Row]]]  # name for messages, numbered rows


@dataclass
class LoadReport:
    """What was loaded and what was put right on the way; `print` it."""

    source: str  # in words, with the revision
    rows: dict[str, int] = field(default_factory=dict)  # split -> rows that are left
    repairs: dict[str, Counter] = field(default_factory=dict)  # file or split -> what -> number of rows

    def __str__(self) -> str:
        counts = ", ".join(f"{self.rows[split]:,} {split}" for split in SPLITS)
        lines = [f"{self.source}: {counts} rows."]
        for what in sorted({kind for counter in self.repairs.values() for kind in counter}):
            numbers = {place: counter[what] for place, counter in self.repairs.items() if counter[what]}
            where = ", ".join(f"{place} {number:,}" for place, number in numbers.items())
            lines.append(f"Repaired: {sum(numbers.values()):,} rows {what} ({where}).")
        return "\n".join(lines)


def load_fiqa(source: str = "packaged", workspace: Workspace | None = None) -> "DatasetDict":
    """Splits `train`, `validation`, `test` with columns `question: str` and `ground_truths: list[str]`.

    `source` is "packaged" (the 648 rows of the test split, from the package index), "hub", "hub@REVISION", a
    folder of split files (JSON, JSON lines, CSV, Parquet), or a single file, which is split by hash. A
    relative path is looked for in the working directory, the workspace and the project. Prints what was used.

    Raises:
        WorkshopError: the source can't be reached or read, a row is wrong, or a split is empty.
    """
    splits, report = load_with_report(source, workspace)
    print(report)
    return splits


def load_with_report(source: str, workspace: Workspace | None = None) -> tuple["DatasetDict", LoadReport]:
    """As `load_fiqa`, with the report handed back instead of printed."""
    if source == "packaged":
        asset = ASSETS["fiqa_test"]
        report = LoadReport(f"Packaged FiQA rows ({asset.package} {asset.version}, {asset.licence})")
        return _split_one_file(fiqa_test_file(), (48, 100), report)
    if source == "hub" or source.startswith("hub@"):
        from fiqa_helpers.hub_rows import load_from_hub

        words, found = load_from_hub(source.removeprefix("hub").removeprefix("@"))
        files = {split: [(split, enumerate(found[split], 1))] for split in SPLITS if split in found}
        return _finish(files, LoadReport(words))
    path = _find(source, workspace)
    files = _row_files(path)
    if len(files) == 1:
        return _split_one_file(
            files[0], None, LoadReport(f"{files[0]}, a single file, split by hash 80/10/10")
        )
    named = {
        split: [(file.name, read_rows(file)) for file in found] for split, found in _by_split(files).items()
    }
    return _finish(named, LoadReport(str(path)))


def write_processed(splits: "DatasetDict", folder: Path, source: str = "") -> list[Path]:
    """Write the splits as `train_processed.json`, `val_processed.json`, `test_processed.json` in `folder`.

    Each is a JSON list of objects with `question`, `ground_truths` and `answer` (the first ground truth). A
    small `processed.json` with their fingerprints is written last, so that a mixture of two runs is noticed.

    Raises:
        WorkshopError: the disk is full or can't be written; the files of before stay whole.
    """
    manifest = {"source": source, "licence": ASSETS["fiqa_test"].licence, "splits": {}}
    written = [folder / PROCESSED[split] for split in SPLITS]
    with disk_errors(folder, "set the parameter workdir to another folder"):
        for split, path in zip(SPLITS, written, strict=True):
            with atomic_writer(path) as file:
                for number, row in enumerate(splits[split]):
                    answers = row["ground_truths"]
                    out = {"question": row["question"], "ground_truths": answers, "answer": answers[0]}
                    file.write(("[\n" if number == 0 else ",\n") + json.dumps(out, ensure_ascii=False))
                file.write("\n]\n")
            manifest["splits"][split] = {"rows": len(splits[split]), "sha256": fingerprint(splits[split])}
        with atomic_writer(folder / MANIFEST) as file:
            file.write(json.dumps(manifest, indent=1) + "\n")
    return written


def read_processed(folder: Path) -> "DatasetDict":
    """The splits that `write_processed` wrote, with columns `question` and `ground_truths`.

    Raises:
        WorkshopError: a file is missing or damaged, or the three are not of one run.
    """
    remedy = "run notebook 01_explore_fiqa first (or again)"
    for name in (*PROCESSED.values(), MANIFEST):
        if not (folder / name).is_file():
            raise WorkshopError(f"{folder / name} is missing: {remedy}.")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {split: manifest["splits"][split]["sha256"] for split in SPLITS}
    except (ValueError, KeyError, TypeError):
        raise WorkshopError(f"{folder / MANIFEST} is damaged: {remedy}.") from None
    paths = {split: folder / PROCESSED[split] for split in SPLITS}
    found = _datasets({s: list(clean_rows(read_rows(p), p.name, Counter())) for s, p in paths.items()})
    for split in SPLITS:
        if fingerprint(found[split]) != expected[split]:
            raise WorkshopError(f"{paths[split]} is not what notebook 01 wrote: {remedy}.")
    return found


def fingerprint(rows: Iterable[dict]) -> str:
    """SHA-256 (hex) over the rows in their order; any columns that JSON can hold."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row, sort_keys=True).encode("ascii") + b"\n")
    return total.hexdigest()


def _find(source: str, workspace: Workspace | None) -> Path:
    for base in [Path.cwd(), *([workspace.root] if workspace else []), project_root()]:
        path = base / Path(source).expanduser()
        if source and path.exists():
            return path
    raise WorkshopError(f"data is {source!r}: it must be packaged, hub, or a folder or file that exists.")


def _row_files(path: Path) -> list[Path]:
    """The files with rows in a folder; of a single file, itself."""
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in found if file.suffix.lower() in SUFFIXES and file.name != MANIFEST]
    if not files:
        raise WorkshopError(f"{path} holds no rows: data must be {', '.join(SUFFIXES)} files.")
    return files


def _by_split(files: list[Path]) -> dict[str, list[Path]]:
    """Split -> its files (the shards of one format), by how their names begin."""
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for file in files:
        match = _SPLIT_NAME.match(file.name.lower())
        if match:
            name = match[1]
            found["validation" if name in ("valid", "val", "dev") else name].append(file)
    folder = files[0].parent
    for split, paths in found.items():
        if not paths:
            remedy = "add it, or leave a single file, which is then split by hash"
            raise WorkshopError(f"{folder} has no file whose name begins with {split}: {remedy}.")
        if len({path.suffix.lower() for path in paths}) > 1:
            names = ", ".join(path.name for path in paths[:4])
            raise WorkshopError(f"{folder} has the {split} split in several formats ({names}): keep one.")
    return found


def _split_one_file(
    path: Path, sizes: tuple[int, int] | None, report: LoadReport
) -> tuple["DatasetDict", LoadReport]:
    """Split the rows of `path` by the order of the SHA-256 of their questions, whatever their order there.

    `sizes` are the rows of validation and test; None takes a tenth of the rows each.
    """
    counter = report.repairs.setdefault(path.name, Counter())
    rows = {"test": list(clean_rows(read_rows(path), path.name, counter))}
    _drop_duplicates(rows, {"test": counter})
    rows = sorted(rows["test"], key=lambda row: hashlib.sha256((_SALT + row[0]).encode()).digest())
    validation, test = sizes or (len(rows) // 10, len(rows) // 10)
    if min(validation, test) == 0 or validation + test >= len(rows):
        raise WorkshopError(f"{path} has {len(rows)} usable rows: 10 are needed to split them.")
    parts = {"test": rows[:test], "validation": rows[test : test + validation]}
    parts["train"] = rows[test + validation :]
    report.rows = {split: len(parts[split]) for split in SPLITS}
    return _datasets(parts), report


def _finish(sources: dict[str, list[NamedRows]], report: LoadReport) -> tuple["DatasetDict", LoadReport]:
    """Clean every split, drop what is in two of them, refuse an empty one."""
    splits: dict[str, Rows] = {}
    for split in SPLITS:
        counter = report.repairs.setdefault(split, Counter())
        named = sources.get(split, [])
        splits[split] = [row for name, rows in named for row in clean_rows(rows, name, counter)]
    _drop_duplicates(splits, report.repairs)
    for split in SPLITS:
        if not splits[split]:
            raise WorkshopError(
                f"{report.source} has no usable {split} rows: check that split of the source."
            )
    report.rows = {split: len(splits[split]) for split in SPLITS}
    return _datasets(splits), report


def _drop_duplicates(splits: dict[str, Rows], repairs: dict[str, Counter]) -> None:
    """Keep the first row of each question, and take what test or validation have out of the training side."""
    owner: dict[bytes, str] = {}
    for split in [s for s in reversed(SPLITS) if s in splits]:  # the tests stay as they are
        kept = []
        for row in splits[split]:
            same = " ".join(row[0].casefold().split())  # case and the number of spaces don't count
            key = hashlib.sha256(same.encode()).digest()[:16]
            if key not in owner:
                owner[key] = split
                kept.append(row)
            elif owner[key] == split:
                repairs[split][REPEATED] += 1
            else:
                repairs[split][LEAKED] += 1
        splits[split] = kept


def _datasets(splits: dict[str, Rows]) -> "DatasetDict":
    from datasets import Dataset, DatasetDict, Features, List, Value

    features = Features({"question": Value("string"), "ground_truths": List(Value("string"))})
    made = DatasetDict()
    for split in SPLITS:
        questions, answers = zip(*splits[split], strict=True) if splits[split] else ((), ())
        made[split] = Dataset.from_dict({"question": questions, "ground_truths": answers}, features=features)
    return made
