"""FiQA from the hub, the packaged rows or files of one's own: the same columns, every repair counted."""

import ast
import contextlib
import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.base import WorkshopError, Workspace, atomic_writer, disk_errors, project_root
from fiqa_helpers.machinery.assets import ASSETS, fiqa_test_file
from fiqa_helpers.show import EvalProgress

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from fiqa_helpers.metrics import Similarity

# --- Rows of question and answers out of JSON, JSON lines, CSV and Parquet files, checked one by one.
#
# Nothing in a file is trusted: what can be repaired without guessing is repaired and counted, anything else
# is one sentence that names the file and the row.

MAX_CHARACTERS = 100_000  # of a question or an answer; FiQA's longest test answer has about 9,000
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")

EMPTY = "without a question or an answer: left out"
TOO_LONG = f"with a text longer than {MAX_CHARACTERS:,} characters: left out"
CONTROLS = "with control characters (NUL, terminal escapes): the characters removed"
SURROGATES = "with half a surrogate pair: replaced by the sign for unknown characters"

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")

Row = dict[str, object]


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(number, row) of each row in the file, numbered as an editor shows the lines (Parquet: from 1).

    Raises:
        WorkshopError: the file is missing, empty, not text in UTF-8, or not of the format its name says.
    """
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    try:
        if path.stat().st_size == 0:
            raise WorkshopError(f"{path} is empty: put rows of question and answer in it, or remove it.")
        yield from readers.get(path.suffix.lower(), _read_json)(path)
    except UnicodeDecodeError as error:
        raise WorkshopError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8.") from None
    except OSError as error:
        raise WorkshopError(f"{path} cannot be read ({error}): check the file or copy it again.") from None


def clean_rows(
    rows: Iterable[tuple[int, Row]], name: str, repairs: Counter
) -> Iterator[tuple[str, list[str]]]:
    """(question, answers) of each usable row; `repairs` counts what was put right, `name` is for messages.

    Answers stand in `ground_truths` (a list, or the text of one) or in `answer`.

    Raises:
        WorkshopError: a column is missing or holds something that is not text.
    """
    for number, row in rows:
        if not isinstance(row, dict):
            raise WorkshopError(
                f"{name}, row {number}, is not an object with columns: write one object per row."
            )
        column = next((c for c in ("ground_truths", "answer") if row.get(c) is not None), None)
        column = column or next((c for c in ("ground_truths", "answer") if c in row), None)
        if "question" not in row or column is None:
            found = ", ".join(repr(str(c)[:30]) for c in list(row)[:6]) or "none"
            raise WorkshopError(
                f"{name}, row {number}, needs the columns question and ground_truths (or answer) and has "
                f"{found}: rename the columns."
            )
        answers = row[column]
        if isinstance(answers, str):
            answers = _as_list(answers)
        texts = [row["question"], *(answers if isinstance(answers, list) else [answers])]
        for text, where in zip(texts, ["question", *[column] * len(texts)], strict=False):
            if text is not None and not isinstance(text, str):
                raise WorkshopError(
                    f"{name}, row {number}: {where} holds a {type(text).__name__} where text belongs: "
                    "correct the row or delete it."
                )
        if any(len(text) > MAX_CHARACTERS for text in texts if text):
            repairs[TOO_LONG] += 1
            continue
        for kind, pattern, sign in ((CONTROLS, _CONTROL, ""), (SURROGATES, _SURROGATE, "\ufffd")):
            if any(pattern.search(text) for text in texts if text):
                repairs[kind] += 1
                texts = [text and pattern.sub(sign, text) for text in texts]
        question, *answers = [(text or "").strip() for text in texts]
        answers = [answer for answer in answers if answer]
        if not question or not answers:
            repairs[EMPTY] += 1
            continue
        yield question, answers


def _as_list(text: str) -> list:
    """The list that `text` spells (as JSON, or as Python in a CSV export), else the text as only answer."""
    if not text.lstrip().startswith("[") or len(text) > MAX_CHARACTERS:
        return [text]
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
    return [text]


def _read_json(path: Path) -> Iterator[tuple[int, Row]]:
    """A JSON list of objects, or one object per line, whatever the file is called."""
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        if start == "[":
            yield from enumerate(_parsed(file.read(), path, "line"), 1)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parsed(line, path, f"line {number}")


def _parsed(text: str, path: Path, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        at = f"line {error.lineno}" if where == "line" and hasattr(error, "lineno") else where
        reason = getattr(error, "msg", "nested too deeply")
        raise WorkshopError(f"{path} is not JSON at {at} ({reason}): correct it there.") from None


def _read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    limit = csv.field_size_limit(2**31 - 1)  # the default of 128 KiB would end in csv's own error
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey="(more cells than columns)")
            for row in reader:
                if "(more cells than columns)" in row:
                    raise WorkshopError(
                        f"{path}, line {reader.line_num}, has more cells than the header has columns: "
                        "put quotes around texts with commas."
                    )
                yield reader.line_num, row
    except csv.Error as error:
        raise WorkshopError(
            f"{path} is not CSV at line {reader.line_num} ({error}): correct it there."
        ) from None
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = [n for n in file.schema_arrow.names if n in ("question", "ground_truths", "answer")]
            for batch in file.iter_batches(batch_size=1000, columns=wanted or None):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0][:100]
        raise WorkshopError(f"{path} is not a Parquet file ({reason}): export it again.") from None


# --- FiQA's rows from the Hugging Face hub, under the names and revisions it is known by.

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
    from huggingface_hub.errors import HfHubHTTPError

    reasons = []
    for name in HUB_NAMES:
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
        for name in HUB_NAMES:
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


# --- FiQA from the hub, the packaged rows or files of one's own: the same columns, every repair counted.

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


# --- Training answers reduced to what answers the question, for the profile setting `topical_words`.
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

    def wanted(row: dict) -> bool:
        answer = row["ground_truths"][0]
        return len(answer.split()) >= SHORTEST and not LINK.search(answer)

    def on_topic(row: dict) -> dict:
        answer = unquoted(row["ground_truths"][0])
        return {"ground_truths": [topical(row["question"], answer, words, similarity)]}

    kept = rows.filter(wanted, load_from_cache_file=False)
    if not len(kept):
        raise WorkshopError(
            f"topical_words leaves no training row: all answers have under {SHORTEST} words or hold a link. "
            "Use training: reference, or rows with longer answers."
        )
    texts = [[row["question"], *sentences(unquoted(row["ground_truths"][0]))] for row in kept]
    _embed("Comparing sentences with their questions", texts, similarity)
    return kept.map(on_topic, load_from_cache_file=False)


def _embed(label: str, texts: Sequence[Sequence[str]], similarity: "Similarity") -> None:
    """Let `similarity` meet the texts of all answers, with progress; afterwards it knows them."""
    progress = EvalProgress(label, len(texts), reused=0)
    for start in range(0, len(texts), 32):
        part = texts[start : start + 32]
        similarity.embed([text for answer in part for text in answer])
        progress.done += len(part)
        progress.show()
    progress.close()


def topical(question: str, answer: str, words: int, similarity: "Similarity") -> str:
    """The sentences of `answer` nearest to the question, in their order, as far as `words` words reach.

    At least one sentence, however long.
    """
    found = sentences(answer)
    near = similarity.embed(found) @ similarity.embed([question])[0]
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
    if len(answer) > 1 and answer[0] == answer[-1] == '"':
        return answer[1:-1].replace('""', '"').strip()
    return answer
