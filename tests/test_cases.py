"""Files as people have them: each is read right or refused with a sentence that helps, never misread."""

import csv
import io
import json
from pathlib import Path

import pytest

from fiqa_helpers import data
from fiqa_helpers.base import WorkshopError

ANSWER = "I would, slowly. Account {} earns little, and fees matter more than timing. Keep six months apart."
ROWS = [(f"Should I move savings number {i} into an index fund?", ANSWER.format(i)) for i in range(40)]
BROKEN = "put quotation marks around each text and double those inside it"


def as_csv(rows, header=("question", "answer"), delimiter: str = ",") -> str:
    """As a spreadsheet writes it, every text in quotation marks."""
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return delimiter.join(header) + "\n" + text.getvalue()


def as_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def unclosed(text: str, line: int) -> str:
    """`text` without the last sign of `line`: a quotation mark that is not closed."""
    lines = text.splitlines(keepends=True)
    lines[line - 1] = lines[line - 1][:-2] + "\n"
    return "".join(lines)


def lists(written: str) -> str:
    rows = [[f"Is plan {i} taxed?", written] for i in range(12)]
    return as_csv(rows, header=("question", "ground_truths"))


GOOD = as_csv(ROWS)
BARE = "question,answer\n" + "".join(f"Q{i}?,Yes for {i}.\n" for i in range(400))  # no quotation mark
# The first row opens a quotation mark that the last one closes; all marks between are doubled: valid CSV.
SWALLOWED = 'question,answer\nQ?,"Yes.\n' + 'Q?,""No"", he said.\n' * 50 + 'Q?,No."\n'
BACKSLASH = "question,answer\n" + "".join(f'"Q{i}?","He said \\"wait\\" {i} times."\n' for i in range(12))
COMMAS = "question,answer\n" + "".join(f"Fund {i}?,Well, it depends, mostly on fees.\n" for i in range(12))
WRAPPED = {"data": [{"question": question, "answer": answer} for question, answer in ROWS]}
TURNS = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ROWS]

# name, content, parts of the sentence that refuses it
REFUSED = [
    ("unclosed_quote.csv", unclosed(GOOD, 11), ["row that begins at line 11", BROKEN]),
    ("unclosed_last.csv", unclosed(GOOD, 41), ["row that begins at line 41", "unexpected end of data"]),
    ("unclosed_in_bare.csv", BARE.replace("Yes for 9.", '"Yes for 9.'), ["row that begins at line 11"]),
    ("swallowed.csv", SWALLOWED, ["row that begins at line 2:", "line breaks and 100 quot"]),
    ("cut_off.csv", GOOD[: len(GOOD) * 2 // 3], ["row that begins at line 28", "unexpected end of data"]),
    ("cut_in_question.csv", BARE[:-14], ["row that begins at line 401", "fewer cells than the header"]),
    ("backslash_quotes.csv", BACKSLASH, ["row that begins at line 2", BROKEN]),
    ("unquoted_commas.csv", COMMAS, ["row that begins at line 2", "more or fewer cells", BROKEN]),
    ("cut_list.csv", lists("['Yes, it is.' ... 'No, if it is a Roth.']"), ["holds the text of a list"]),
    (
        "messages.jsonl",
        as_lines([{"messages": turns} for turns in TURNS]),
        ["has 'messages': write what"],
    ),
    ("three_rows.csv", as_csv(ROWS[:3]), ["3 usable rows: 10 are needed"]),
]

# name, content, rows that are read, the answers of the first test row (None: one of ROWS)
READ = [
    ("good.csv", GOOD, 40, None),
    ("semicolons.csv", "\ufeff" + as_csv(ROWS, delimiter=";"), 40, None),
    ("tabs.csv", as_csv(ROWS, delimiter="\t"), 40, None),
    ("numpy.csv", lists("['Yes, it\\'s.' \"No, it's a Roth.\"]"), 12, ["Yes, it's.", "No, it's a Roth."]),
    ("numpy_lines.csv", lists("['Yes, it is.'\n 'No.']"), 12, ["Yes, it is.", "No."]),
    ("pandas.csv", lists("['Yes, it is.', None]"), 12, ["Yes, it is."]),
    ("bracket.csv", lists("[As I said], yes."), 12, ["[As I said], yes."]),
    ("wrapped.json", json.dumps(WRAPPED, indent=2), 40, None),
    ("wrapped_line.json", json.dumps(WRAPPED), 40, None),
    ("empty_truths.jsonl", as_lines([row | {"ground_truths": []} for row in WRAPPED["data"]]), 40, None),
    ("blank_truths.jsonl", as_lines([row | {"ground_truths": [" "]} for row in WRAPPED["data"]]), 40, None),
]


def case_id(value: object) -> str:
    return value if isinstance(value, str) and len(value) < 30 else ""


@pytest.mark.parametrize(("name", "content", "parts"), REFUSED, ids=case_id)
def test_a_file_that_is_wrong_is_refused(tmp_path, name, content, parts):
    """A reader that goes on trains on a third of the rows, or on rows glued together, and nobody sees it."""
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(WorkshopError) as caught:
        data.load_with_report(str(tmp_path / name))
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not [part for part in parts if part not in str(caught.value)], str(caught.value)


@pytest.mark.parametrize(("name", "content", "rows", "answers"), READ, ids=case_id)
def test_a_file_that_is_odd_is_read_right(tmp_path, name, content, rows, answers):
    """A file that Excel, pandas or another tool wrote should not need a second export; every row counts."""
    (tmp_path / name).write_text(content, encoding="utf-8")
    splits, report = data.load_with_report(str(tmp_path / name))
    assert sum(report.rows.values()) == rows and not any(report.repairs.values())
    for row in splits["test"]:
        assert row["ground_truths"] == (answers or [dict(ROWS)[row["question"]]])


def write_splits(folder: Path, *names: str) -> None:
    for name in names:
        rows = ROWS[:20] if name.startswith("train") else ROWS[20:30]
        (folder / name).write_text(as_csv(rows), encoding="utf-8")


@pytest.mark.parametrize(
    "second", ["train_old.csv", "training.csv", "train.tsv", "train-00001-of-00003.csv"], ids=case_id
)
def test_two_files_for_one_split_are_named(tmp_path, second):
    """An old copy beside the new file, merged in silence, brings back the rows that were taken out."""
    write_splits(tmp_path, "train.csv", second, "validation.csv", "test.csv")
    with pytest.raises(WorkshopError, match="for the train split: keep one file") as caught:
        data.load_with_report(str(tmp_path))
    assert "train.csv" in str(caught.value) and second in str(caught.value)


def test_missing_shards_are_noticed(tmp_path):
    """Two of three parts of a download are two thirds of the rows."""
    write_splits(
        tmp_path, "train-00000-of-00003.csv", "train-00001-of-00003.csv", "validation.csv", "test.csv"
    )
    with pytest.raises(WorkshopError, match="for the train split: keep one file, or all the shards"):
        data.load_with_report(str(tmp_path))
