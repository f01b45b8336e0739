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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.base import WorkshopError, Workspace, atomic_writer, disk_errors, project_root, write_json
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
    rows: dict[str, int]  # split -> rows that are left
    repairs: dict[str, Counter]  # file or split -> what -> number of rows

    def __str__(self) -> str:
        counts = ", ".join(f"{number:,} {split}" for split, number in self.rows.items())
        lines = [f"{self.source}: {counts} rows."]
        for place, counter in self.repairs.items():
            lines += [f"Repaired: {number:,} rows {what} ({place})." for what, number in counter.items()]
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
    kind, _, revision = source.partition("@")
    if kind == "hub":
        return _made(*files_of_hub(revision))
    if source == "packaged":
        asset, path = ASSETS["fiqa_test"], fiqa_test_file()
        words = f"Packaged FiQA rows ({asset.package} {asset.version}, {asset.licence})"
        return _made(words, {path.name: [path]}, validation=48, test=100)
    path = _find(source, workspace)
    files = [path] if path.is_file() else sorted(path.iterdir())
    files = [file for file in files if file.suffix.lower() in READERS and file.name != MANIFEST]
    if not files:
        raise WorkshopError(f"{path} holds no rows: data must be {', '.join(READERS)} files.")
    if len(files) == 1:
        return _made(f"{files[0]}, a single file, split by hash 80/10/10", {files[0].name: files})
    return _made(str(path), {split: _files_of(split, files, path) for split in SPLITS})


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


def files_of_hub(revision: str = "") -> tuple[str, dict[str, list[Path]]]:
    """(what was used, in words; the Parquet files of each split).

    `revision` is a branch, tag or commit; empty tries those known. Without a network, the copy that an
    earlier run left in the Hugging Face cache is used, and said so.

    Raises:
        WorkshopError: neither the hub nor the cache has FiQA under one of the known names.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = {"repo_type": "dataset", "allow_patterns": f"{CONFIG}/*.parquet"}
    reasons, offline = [], ""
    for name, branch in itertools.product(HUB_NAMES, [revision] if revision else ["main", PARQUET]):
        try:
            if not offline:  # `snapshot_download` alone would not say that it falls back to the cache
                HfApi().dataset_info(name, revision=branch, timeout=20)
        except HfHubHTTPError as error:
            reasons.append(f"{name} at {branch}: {str(error).splitlines()[0][:90]}")
            continue
        except Exception as error:  # every HTTP library has a word of its own for "no network"
            offline = f", cached (no hub: {type(error).__name__}: {str(error)[:90]})"
        with contextlib.suppress(LocalEntryNotFoundError):
            kept = Path(snapshot_download(name, revision=branch, local_files_only=bool(offline), **wanted))
            both = "{0}/{1}*.parquet", "{0}/{1}/*.parquet"  # a branch's files, and converted ones
            found = {s: sorted(f for p in both for f in kept.glob(p.format(CONFIG, s))) for s in SPLITS}
            if all(found.values()):
                return f"{name}, config {CONFIG}, revision {kept.name}{offline}", found
    reason = f"cannot be reached{offline}" if offline else f"has no usable FiQA ({'; '.join(reasons)})"
    raise WorkshopError(f"The hub {reason}: {REMEDY}.")


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
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text) if text.strip() else []
        if isinstance(rows, dict):
            rows = rows["data"] if isinstance(rows.get("data"), list) else [rows]
        return enumerate(rows if isinstance(rows, list) else [rows], 1)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":  # else the file goes on behind a first object
            raise ValueError(f"line {error.lineno} is not JSON: {error.msg}") from None
    return _read_json_lines(text)


def _read_json_lines(text: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error.msg}") from None
            yield number, row


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
    words: str, files: dict[str, list[Path]], validation: int = 0, test: int = 0
) -> tuple["DatasetDict", LoadReport]:
    """The splits of `files`: split (or the name of one file, to be split by hash) -> its files.

    `validation` and `test` are numbers of rows for a single file; 0 takes a tenth of them.
    """
    from datasets import Dataset, DatasetDict

    repairs = {place: Counter() for place in files}
    splits = {
        place: [row for path in paths for row in clean_rows(read_rows(path), path.name, repairs[place])]
        for place, paths in files.items()
    }
    _drop_duplicates(splits, repairs)
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
    made = DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})
    return made, LoadReport(words, {split: len(rows) for split, rows in splits.items()}, repairs)


_SALT = "fiqa-workshop-1:"  # another salt would be another split: keep it


def _drop_duplicates(splits: dict[str, list[Row]], repairs: dict[str, Counter]) -> None:
    """Keep the first row of each question, and take what test or validation have out of the training side."""
    owner: dict[str, str] = {}
    for split in reversed(splits):  # the tests stay as they are
        rows, splits[split] = splits[split], []
        for row in rows:
            same = " ".join(row["question"].casefold().split())  # case and the number of spaces don't count
            if same not in owner:
                splits[split].append(row)
            else:
                repairs[split][REPEATED if owner[same] == split else LEAKED] += 1
            owner.setdefault(same, split)


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
            rows = (row | {"answer": row["ground_truths"][0]} for row in splits[split])
            with atomic_writer(folder / PROCESSED[split]) as file:
                lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
                file.write(f"[\n{lines}\n]\n")
            manifest["splits"][split] = {"rows": len(splits[split]), "sha256": fingerprint(splits[split])}
        write_json(folder / MANIFEST, manifest)
    return [folder / PROCESSED[split] for split in SPLITS]


def read_processed(folder: Path) -> "DatasetDict":
    """The splits that `write_processed` wrote, with columns `question` and `ground_truths`.

    Raises:
        WorkshopError: a file is missing or damaged, or the three are not of one run.
    """
    from datasets import Dataset, DatasetDict

    found = DatasetDict()
    try:
        path = folder / MANIFEST
        expected = json.loads(path.read_text(encoding="utf-8"))["splits"]
        for split in SPLITS:
            path = folder / PROCESSED[split]
            rows = json.loads(path.read_text(encoding="utf-8"))
            found[split] = Dataset.from_list(rows).select_columns(["question", "ground_truths"])
            if fingerprint(found[split]) != expected[split]["sha256"]:
                raise ValueError("these are rows of another run")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise WorkshopError(
            f"{path} is missing or not what notebook 01 wrote: run notebook 01_explore_fiqa first."
        ) from None
    return found


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
        problem = f"every answer has under {SHORTEST} words or holds a link"
        raise WorkshopError(f"topical_words leaves no training row ({problem}): use training: reference.")
    parts = [kept[start : start + 32] for start in range(0, len(kept), 32)]
    for part in tqdm(parts, desc="Comparing sentences, 32 answers a step", file=sys.stdout, leave=False):
        texts = [[row["question"], *sentences(row["ground_truths"][0])] for row in part]
        similarity.embed([text for row in texts for text in row])  # together, which is faster
        for row in part:
            row["ground_truths"] = [topical(row["question"], row["ground_truths"][0], words, similarity)]
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
