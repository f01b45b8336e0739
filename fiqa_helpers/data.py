"""FiQA from the hub, the packaged rows or files of one's own: read, cleaned, split, written and read back.

Nothing in a file is trusted: what can be repaired without guessing is repaired and counted, anything else is
one sentence that names the file and the row.
"""

import ast
import contextlib
import csv
import hashlib
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from fiqa_helpers.base import WorkshopError, Workspace, atomic_writer, disk_errors, project_root
from fiqa_helpers.machinery.assets import ASSETS, fiqa_test_file

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from fiqa_helpers.metrics import Similarity

SPLITS = ("train", "validation", "test")
PROCESSED = dict(zip(SPLITS, (f"{name}_processed.json" for name in ("train", "val", "test")), strict=True))
MANIFEST = "processed.json"  # written last: says which three files belong together

# --- Loading: where the rows come from, and what was put right on the way.


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
    if source.partition("@")[0] == "hub":
        words, found = load_from_hub(source.partition("@")[2])
        return _made({split: [(split, enumerate(found.get(split, []), 1))] for split in SPLITS}, words)
    if source == "packaged":
        asset, path = ASSETS["fiqa_test"], fiqa_test_file()
        words = f"Packaged FiQA rows ({asset.package} {asset.version}, {asset.licence})"
        return _made({path.name: [(path.name, read_rows(path))]}, words, validation=48, test=100)
    path = _find(source, workspace)
    files = [path] if path.is_file() else sorted(path.iterdir())
    files = [file for file in files if file.suffix.lower() in READERS and file.name != MANIFEST]
    if not files:
        raise WorkshopError(f"{path} holds no rows: data must be {', '.join(READERS)} files.")
    if len(files) == 1:
        words, named = f"{files[0]}, a single file, split by hash 80/10/10", {files[0].name: files}
    else:
        words, named = str(path), {split: _files_of(split, files, path) for split in SPLITS}
    return _made({s: [(f.name, read_rows(f)) for f in found] for s, found in named.items()}, words)


def _find(source: str, workspace: Workspace | None) -> Path:
    for folder in [Path.cwd(), *([workspace.root] if workspace else []), project_root()]:
        path = folder / Path(source).expanduser()
        if source and path.exists():
            return path
    raise WorkshopError(f"data is {source!r}: it must be packaged, hub, or a folder or file that exists.")


def _files_of(split: str, files: list[Path], folder: Path) -> list[Path]:
    """The file whose name begins with `split`, or the complete shards of it (`train-00000-of-00002`)."""
    names = {"train": "train(ing)?", "validation": "validation|valid|val|dev", "test": "test"}
    found = [file for file in files if re.match(rf"({names[split]})(?![a-z])", file.name.lower())]
    if not found:
        remedy = "add it, or leave a single file, which is then split by hash"
        raise WorkshopError(f"{folder} has no file whose name begins with {split}: {remedy}.")
    shards = [re.search(r"-\d+-of-(\d+)\.", file.name) for file in found]
    if {int(shard[1]) if shard else 1 for shard in shards} != {len(found)}:
        listed = ", ".join(file.name for file in found[:4])
        raise WorkshopError(
            f"{folder} has {listed} for the {split} split: keep one file, or all the shards of one."
        )
    return found


HUB_NAMES = ("explodinggradients/fiqa", "vibrantlabsai/fiqa")
CONFIG = "main"
PARQUET = "refs/convert/parquet"  # the hub's own conversion, for the years when the data set was a script
REMEDY = "use data: packaged (the 648 rows of the test split), or give a folder with the split files as data"


def load_from_hub(revision: str = "") -> tuple[str, "DatasetDict"]:
    """(what was used, in words; its splits). `revision`: a branch, tag or commit; empty tries those known.

    Without a network, the copy that an earlier run left in the Hugging Face cache is used, and said so.

    Raises:
        WorkshopError: the hub can't be reached, or has FiQA under none of the known names.
    """
    from datasets import load_dataset
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    converted = {"data_files": {split: f"{CONFIG}/{split}/*.parquet" for split in SPLITS}}
    reasons = []
    for name, wanted in itertools.product(HUB_NAMES, [revision] if revision else ["main", PARQUET]):
        try:  # `load_dataset` alone would take any cached commit for one that the hub does not have
            commit = HfApi().dataset_info(name, revision=wanted, timeout=20).sha
            which = converted if wanted == PARQUET else {"name": CONFIG}
            splits = load_dataset(name, revision=commit, **which)
            return f"{name}, config {CONFIG}, revision {commit}", splits
        except (HfHubHTTPError, ValueError, RuntimeError) as error:  # not there, or a script repository
            reasons.append(f"{name} at {wanted}: {str(error).strip().splitlines()[0][:90]}")
        except Exception as error:  # every HTTP library has a word of its own for "no network"
            return from_cache(revision, f"{type(error).__name__}: {str(error)[:90]}")
    raise WorkshopError(f"The hub has no usable FiQA ({'; '.join(reasons)}): {REMEDY}.")


def from_cache(revision: str, reason: str) -> tuple[str, "DatasetDict"]:
    """What an earlier run downloaded (of that commit, if one was asked for); the hub is not asked.

    Raises:
        WorkshopError: nothing of FiQA is in the cache. `reason` says why only the cache was looked at.
    """
    from datasets import config, load_dataset

    with mock.patch.object(config, "HF_HUB_OFFLINE", True):  # else it asks the hub for half a minute
        for name in HUB_NAMES:
            with contextlib.suppress(Exception):  # each way of not being cached is another kind of error
                splits = load_dataset(name, CONFIG)
                commit = Path(splits["train"].cache_files[0]["filename"]).parent.name
                if commit.startswith(revision):
                    return f"{name}, config {CONFIG}, revision {commit}, cached (no hub: {reason})", splits
    raise WorkshopError(f"The hub cannot be reached ({reason}): {REMEDY}.") from None


# --- Reading a file: (number, row) of each row.

Row = dict[str, object]
MOST_QUOTES = 100  # in a cell with line breaks: beyond, an open quotation mark has most likely swallowed rows


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(number, row) of each row: the line it begins at; in a JSON list or Parquet its place, from 1.

    Raises:
        WorkshopError: the file is not text in UTF-8, or not of the format its name says.
    """
    try:
        yield from READERS[path.suffix.lower()](path)
    except ValueError as error:  # the decoder's, json's and pyarrow's are ValueErrors, too
        raise WorkshopError(
            f"{path} cannot be read ({str(error)[:200]}): correct it there, or export it again in UTF-8."
        ) from None


def _read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    """Strict: in silence, a quotation mark that is not closed would swallow the rows behind it."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        delimiter = max(",;\t", key=file.readline().count)
        file.seek(0)
        reader, begins = csv.DictReader(file, delimiter=delimiter, strict=True), 2
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise csv.Error("it has more or fewer cells than the header")
                if any("\n" in cell and cell.count('"') >= MOST_QUOTES for cell in row.values()):
                    raise csv.Error(f"a cell with line breaks and {MOST_QUOTES} quotation marks or more")
                yield begins, row
                begins = reader.line_num + 1
        except csv.Error as error:
            remedy = "put quotation marks around each text and double those inside it"
            raise ValueError(f"the row that begins at line {begins}: {error}; {remedy}") from None


def _read_json(path: Path) -> Iterator[tuple[int, Row]]:
    """One object per line, a list of objects, or an object with that list as its `data`."""
    with path.open(encoding="utf-8-sig") as file:
        first = next(filter(str.strip, file), "{}")
        file.seek(0)
        try:
            one_per_line = isinstance(json.loads(first), dict)
        except ValueError:  # the beginning of a value that goes over several lines
            one_per_line = False
        for number, text in enumerate(file if one_per_line else [file.read()], 1):
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number + error.lineno - 1} is not JSON: {error.msg}") from None
            if isinstance(value, dict) and isinstance(value.get("data"), list):
                yield from enumerate(value["data"], 1)
            elif isinstance(value, list) and not one_per_line:
                yield from enumerate(value, 1)
            else:
                yield number, value


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow.parquet

    return enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)


READERS = dict.fromkeys([".json", ".jsonl", ".ndjson"], _read_json)
READERS |= {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}

# --- Cleaning: the usable rows, no question twice, none in two splits.

EMPTY = "without a question or an answer: left out"
BROKEN = "with characters that no text has (NUL, terminal escapes, half a surrogate pair): these removed"
REPEATED = "with a question that the split already has: the first one kept"
LEAKED = "with a question of a later split (validation, test): taken out, so that nothing leaks"

_BROKEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
# A text as Python writes it, and a list of such texts as pandas (with commas) and numpy (without) leave it.
_ITEM = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|None|nan"""
_LIST = re.compile(rf"\[\s*(?:{_ITEM})(?:(?:\s*,\s*|\s+)(?:{_ITEM}))*\s*\]", re.DOTALL)


def clean_rows(rows: Iterable[tuple[int, Row]], name: str, repairs: Counter) -> Iterator[Row]:
    """Each usable row as `question` (a text) and `ground_truths` (a list of texts); `repairs` counts.

    Answers stand in `ground_truths` (a list, or the text of one) or, where that is empty, in `answer`. `name`
    is for messages.

    Raises:
        WorkshopError: a column is missing or holds something that is not text.
    """
    for number, row in rows:
        where = f"{name}, row {number}"
        columns = list(row) if isinstance(row, dict) else [f"a {type(row).__name__}"]
        given = [column for column in ("ground_truths", "answer") if column in columns]
        if "question" not in columns or not given:
            found = ", ".join(repr(str(column)[:30]) for column in columns[:6]) or "none"
            raise WorkshopError(
                f"{where}, needs the columns question and ground_truths (or answer) and has {found}: "
                "write what was asked in the one and what was answered in the other."
            )
        question = _texts([row["question"]], f"{where}: question")
        answers = [_texts(_as_list(row[column], where), f"{where}: {column}") for column in given]
        texts = [*question, *next(filter(None, answers), [])]
        clean = [_BROKEN.sub("", text).strip() for text in texts]
        if any(map(_BROKEN.search, texts)):
            repairs[BROKEN] += 1
        if question and clean[0] and any(clean[1:]):
            yield {"question": clean[0], "ground_truths": [text for text in clean[1:] if text]}
        else:
            repairs[EMPTY] += 1


def _texts(values: list, where: str) -> list[str]:
    """Those of `values` that hold something; each must be a text or nothing."""
    wrong = [type(value).__name__ for value in values if not isinstance(value, str | None)]
    if wrong:
        raise WorkshopError(f"{where} holds a {wrong[0]} where text belongs: correct the row or delete it.")
    return [value for value in values if value and value.strip()]


def _as_list(answers: object, where: str) -> list:
    """The list that a text spells (as JSON, or as pandas puts it in a CSV), else the text as only answer."""
    if not isinstance(answers, str):
        return answers if isinstance(answers, list) else [answers]
    text = answers.strip()
    if not re.match(r"\[\s*(['\"\]]|None)", text) or not text.endswith("]"):
        return [answers]
    with contextlib.suppress(ValueError):
        return json.loads(text)
    if not _LIST.fullmatch(text):
        raise WorkshopError(f"{where} holds the text of a list that cannot be read: export it as JSON.")
    return [ast.literal_eval(i) for i in re.findall(_ITEM, text, re.DOTALL) if i not in ("None", "nan")]


def _made(
    named: dict[str, list[tuple[str, Iterable]]], words: str, validation: int = 0, test: int = 0
) -> tuple["DatasetDict", LoadReport]:
    """The splits of `named`: split (or one file, to be split by hash) -> its files: name, numbered rows.

    `validation` and `test` are numbers of rows for a single file; 0 takes a tenth of them.
    """
    from datasets import Dataset, DatasetDict

    report = LoadReport(words, repairs={place: Counter() for place in named})
    splits = {
        place: [row for name, rows in files for row in clean_rows(rows, name, report.repairs[place])]
        for place, files in named.items()
    }
    _drop_duplicates(splits, report.repairs)
    if len(splits) == 1:
        ((name, rows),) = splits.items()
        if len(rows) < 10:
            raise WorkshopError(f"{name} has {len(rows)} usable rows: 10 are needed to split them.")
        rows.sort(key=lambda row: hashlib.sha256((_SALT + row["question"]).encode()).digest())
        validation, test = validation or len(rows) // 10, test or len(rows) // 10
        parts = rows[test + validation :], rows[test : test + validation], rows[:test]
        splits = dict(zip(SPLITS, parts, strict=True))
    for split, rows in splits.items():
        if not rows:
            raise WorkshopError(f"{words} has no usable {split} rows: check that split of the source.")
    report.rows = {split: len(rows) for split, rows in splits.items()}
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()}), report


_SALT = "fiqa-workshop-1:"  # another salt would be another split: keep it


def _drop_duplicates(splits: dict[str, list[Row]], repairs: dict[str, Counter]) -> None:
    """Keep the first row of each question, and take what test or validation have out of the training side."""
    owner: dict[str, str] = {}
    for split in reversed(splits):  # the tests stay as they are
        kept = []
        for row in splits[split]:
            same = " ".join(row["question"].casefold().split())  # case and the number of spaces don't count
            if same not in owner:
                kept.append(row)
            else:
                repairs[split][REPEATED if owner[same] == split else LEAKED] += 1
            owner.setdefault(same, split)
        splits[split] = kept


# --- Writing the splits for the later notebooks, and reading them back.


def write_processed(splits: "DatasetDict", folder: Path, source: str = "") -> list[Path]:
    """Write the splits as `train_processed.json`, `val_processed.json`, `test_processed.json` in `folder`.

    Each is a JSON list of objects with `question`, `ground_truths` and `answer` (the first ground truth). A
    small `processed.json` with their fingerprints is written last, so that a mixture of two runs is noticed.

    Raises:
        WorkshopError: the disk is full; the files of before stay whole.
    """
    manifest = {"source": source, "licence": ASSETS["fiqa_test"].licence, "splits": {}}
    with disk_errors(folder, "set the parameter workdir to another folder"):
        for split in SPLITS:
            with atomic_writer(folder / PROCESSED[split]) as file:
                for number, row in enumerate(splits[split]):
                    row = row | {"answer": row["ground_truths"][0]}
                    file.write((",\n" if number else "[\n") + json.dumps(row, ensure_ascii=False))
                file.write("\n]\n")
            manifest["splits"][split] = {"rows": len(splits[split]), "sha256": fingerprint(splits[split])}
        with atomic_writer(folder / MANIFEST) as file:
            file.write(json.dumps(manifest, indent=1) + "\n")
    return [folder / PROCESSED[split] for split in SPLITS]


def read_processed(folder: Path) -> "DatasetDict":
    """The splits that `write_processed` wrote, with columns `question` and `ground_truths`.

    Raises:
        WorkshopError: a file is missing or damaged, or the three are not of one run.
    """
    from datasets import Dataset, DatasetDict

    found = DatasetDict()
    try:
        for split in SPLITS:
            path = folder / PROCESSED[split]
            rows = json.loads(path.read_text(encoding="utf-8"), object_hook=_without_answer)
            found[split] = Dataset.from_list(rows)
        path = folder / MANIFEST
        expected = json.loads(path.read_text(encoding="utf-8"))["splits"]
        for split in SPLITS:
            if fingerprint(found[split]) != expected[split]["sha256"]:
                path = folder / PROCESSED[split]
                raise ValueError("these are rows of another run")
    except (OSError, ValueError, LookupError, TypeError):
        raise WorkshopError(
            f"{path} is missing or not what notebook 01 wrote: run notebook 01_explore_fiqa first."
        ) from None
    return found


def _without_answer(row: dict) -> Row:
    return {"question": row["question"], "ground_truths": row["ground_truths"]}


def fingerprint(rows: Iterable[dict]) -> str:
    """SHA-256 (hex) over the rows in their order; any columns that JSON can hold."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row, sort_keys=True).encode("ascii") + b"\n")
    return total.hexdigest()


# --- Training answers reduced to what answers the question, for the profile setting `training: topical`.
#
# Never for rows to test on: their references stay as people wrote them. What it does for the small model is
# in benchmarks/RECIPE.md.

SHORTEST = 20  # words; what is shorter mostly points to somewhere else
LINK = re.compile(r"http|www\.")


def topical_answers(rows: "Dataset", words: int, similarity: "Similarity") -> "Dataset":
    """Of each answer the sentences nearest to its question, `words` words at most.

    Rows whose answer has under SHORTEST words or a link are left out. Only the first ground truth is kept, as
    only that is trained on.

    Raises:
        WorkshopError: no row is left.
    """
    from datasets import Dataset
    from tqdm import tqdm

    kept = []
    for row in rows:
        answer = row["ground_truths"][0]
        if len(answer.split()) >= SHORTEST and not LINK.search(answer):
            kept.append(row | {"ground_truths": [unquoted(answer)]})
    if not kept:
        raise WorkshopError(
            f"topical_words leaves no training row: all answers have under {SHORTEST} words or hold a link. "
            "Use training: reference, or rows with longer answers."
        )
    with tqdm(desc="Comparing sentences", total=len(kept), unit="row", file=sys.stdout, leave=False) as bar:
        for start in range(0, len(kept), 32):
            part = kept[start : start + 32]  # `similarity` meets them together, which is faster
            texts = [[row["question"], *sentences(row["ground_truths"][0])] for row in part]
            similarity.embed([text for row in texts for text in row])
            for row in part:
                row["ground_truths"] = [topical(row["question"], row["ground_truths"][0], words, similarity)]
            bar.update(len(part))
    return Dataset.from_list(kept, features=rows.features)


def topical(question: str, answer: str, words: int, similarity: "Similarity") -> str:
    """The sentences of `answer` nearest to the question, in their order, as far as `words` words reach.

    At least one sentence, however long.
    """
    found = sentences(answer)
    vectors = similarity.embed([question, *found])
    near = vectors[1:] @ vectors[0]
    kept: list[int] = []
    for place in sorted(range(len(found)), key=lambda place: -near[place]):
        if kept and sum(len(found[i].split()) for i in [*kept, place]) > words:
            break
        kept.append(place)
    return " ".join(found[place] for place in sorted(kept))


def sentences(answer: str) -> list[str]:
    """`answer` cut behind each full stop, question mark or exclamation mark that white space follows."""
    return re.split(r"(?<=[.!?])\s+", answer.strip())


def unquoted(answer: str) -> str:
    """`answer` without the quotes that a CSV export has put around it and doubled inside."""
    quoted = len(answer) > 1 and answer[0] == answer[-1] == '"'
    return answer[1:-1].replace('""', '"').strip() if quoted else answer
