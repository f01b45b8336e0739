"""Rows of question and answers out of JSON, JSON lines, CSV and Parquet files, checked one by one.

Nothing in a file is trusted: what can be repaired without guessing is repaired and counted, anything else is
one sentence that names the file and the row.
"""

import ast
import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from fiqa_helpers.errors import WorkshopError

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
