"""`python -m fiqa_helpers`: run, check, ask and compare: what they say and do, signals, exit codes."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import nbformat
import peft
import pytest

from fiqa_helpers import __main__ as cli
from fiqa_helpers import data, model
from fiqa_helpers.base import Workspace
from fiqa_helpers.machinery import assets, checkpoints, checks
from fiqa_helpers.profiles import PROFILES, load_profile

CARDS = Path(__file__).resolve().parent.parent / "notebooks" / "precomputed" / "run_cards"
PARAMETERS = 'profile: str = "auto"  # a\noverrides: str = ""  # b\nworkdir: str = ""  # c\n'
SENTENCE = "from fiqa_helpers.base import WorkshopError\n"


@pytest.fixture(autouse=True)
def process_kept():
    """What a command sets for its own process, variables and signals, is not left to the next test."""
    variables = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    os.environ.clear()
    os.environ.update(variables)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def command(*arguments: object) -> int:
    """Run it in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code or 0


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("ask", 2, "Usage:"),
        ("run --onyl 04", 2, "Usage:"),
        ("run --profile gpu81", 1, "gpu81"),
        ("run --profile laptop --overrides {max_step:2}", 1, "max_step"),
        ("run --profile laptop --only 00,40", 1, "--only names '40'"),
        ("run --profile laptop --only 00-06 -p row=48", 1, "row: no such parameter in 00_start_here"),
        ("check --profile laptop --overrides [1]", 1, "overrides"),
        ("ask --profile tiny --workdir {empty} Why?", 1, "There is no adapter in"),
    ],
)
def test_a_wrong_command_line_is_a_sentence(line, code, said, tmp_path, capsys):
    """Scripts tell a typing mistake (2) from a run that failed (1), and nobody reads a traceback."""
    assert command(*line.replace("{empty}", str(tmp_path)).split()) == code
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


# -- run


def write_notebook(path: Path, *sources: str, parameters: str = PARAMETERS) -> Path:
    """A notebook with a parameters cell and one code cell per source."""
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    return path


def printed(path: Path) -> str:
    notebook = nbformat.read(path, 4)
    return "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))


def test_choice_of_notebooks(tmp_path):
    """They run in the order of their numbers, and nothing else runs."""
    for name in ("01_b.ipynb", "00_a.ipynb", "04_c.ipynb", "notes.ipynb"):
        (tmp_path / name).touch()
    for only, expected in {"": "00 01 04", "04,00": "00 04", "00-03": "00 01", "01-": "01 04"}.items():
        assert [path.name[:2] for path in cli.choose(tmp_path, only)] == expected.split()


@pytest.mark.parametrize(("variable", "wins"), [("JUPYTER_DATA_DIR", False), ("JUPYTER_PATH", True)])
def test_users_own_kernel_is_passed_over_or_named(tmp_path, monkeypatch, capsys, variable, wins):
    """One in the user's Jupyter folder loses against the environment's; JUPYTER_PATH beats both: named."""
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "Other", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(cli, "execute", lambda *_: None)
    assert command("run", "--profile", "laptop", "--workdir", tmp_path) == wins
    assert ("kernel python3 runs /bin/false" in capsys.readouterr().err) is wins


def test_values_arrive_and_a_failure_is_a_sentence(tmp_path, monkeypatch, capsys):
    """papermill takes "48" for text and a caller's folder for the kernel's, and fails in forty lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "project_root", lambda: tmp_path)
    values = "import sys\nprint(repr(overrides), rows)\nprint(workdir)\nprint(sys.executable)"
    fails = f"{SENTENCE}raise WorkshopError('The disk is full: free some.')"
    dies = "import os; os._exit(9)"
    sources = {"01_values": [values], "02_fails": ["print('before')", fails], "03_dies": [dies]}
    for name, cells in sources.items():
        more = "rows: int = 0  # d\n" if name == "01_values" else ""
        write_notebook(tmp_path / "notebooks" / f"{name}.ipynb", *cells, parameters=PARAMETERS + more)
    cards, executed = (tmp_path / "a 'try'" / "outputs" / name for name in ("run_cards", "executed"))
    cards.mkdir(parents=True)
    (cards / "01.json").write_text('{"notebook": "01_values", "seconds": 90, "figure": "loss 3.2"}')
    overrides = '{prompt: "plain"}  # it\'s'
    line = ["run", "--profile", "laptop", "--workdir", "a 'try'", "--overrides", overrides]
    assert command(*line, "--only", "01", "-p", "rows=48") == 0
    assert re.search(r"^01_values +1\.5 min  loss 3\.2$", capsys.readouterr().out, re.MULTILINE)
    first, folder, python = printed(executed / "01_values.ipynb").splitlines()
    assert first == f"{overrides!r} 48" and folder == str(tmp_path / "a 'try'")
    assert os.path.realpath(python) == os.path.realpath(sys.executable)
    assert command(*line, "-p", "rows=48") == 1
    assert "\n02_fails stopped: The disk is full: free some.\n" in capsys.readouterr().err
    assert printed(executed / "02_fails.ipynb") == "before\n"
    assert command(*line, "--only", "03") == 1
    assert "03_dies stopped: its kernel died, most often because memory ran out" in capsys.readouterr().err


# A kernel that computes, and one that trains: told to stop, it finishes what it is at, and says so.
BEGINS = """import os, pathlib, time
_ = pathlib.Path(os.environ["BEGUN"]).write_text(str(os.getpid()))
"""
COMPUTES = f"{BEGINS}time.sleep(600)"
TRAINS = f"""{SENTENCE}import signal
told = []
_ = signal.signal(signal.SIGTERM, lambda *_: told.append(1))
{BEGINS}while not told:
    time.sleep(0.1)
time.sleep(1)
_ = signal.signal(signal.SIGTERM, signal.SIG_DFL)
raise WorkshopError("Told to stop after step 7: " + str(len(told)))
"""
RUN = """import pathlib, sys
from fiqa_helpers import __main__ as cli
cli.project_root = lambda: pathlib.Path(sys.argv[1])
cli.main(["run", "--profile", "laptop", "--workdir", sys.argv[1]])
"""


def wait_until(happened, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("source", "signals", "code", "said"),
    [
        (TRAINS, [signal.SIGTERM, signal.SIGTERM], 1, "Told to stop after step 7: 1"),
        (TRAINS.replace("sleep(1)", "sleep(600)"), [signal.SIGINT, signal.SIGINT], 130, "`--only 09-`"),
        (COMPUTES, [signal.SIGINT], 130, "`--only 09-` begins with it again."),
        pytest.param(TRAINS, [signal.SIGHUP], 1, "Told to stop after step 7: 1", marks=pytest.mark.slow),
        pytest.param(COMPUTES.replace("600", "3"), [signal.SIGHUP], 0, "", marks=pytest.mark.slow),  # nohup
    ],
)
def test_a_signal_reaches_the_kernel_and_is_waited_for(tmp_path, source, signals, code, said):
    """papermill alone dies of it and leaves a kernel behind, or one that ends without a checkpoint."""
    begun = tmp_path / "begun"
    write_notebook(tmp_path / "notebooks" / "09_long.ipynb", source)
    command = [*(() if code else ("nohup",)), sys.executable, "-c", RUN, tmp_path]
    shell = {"env": os.environ | {"BEGUN": str(begun)}, "start_new_session": True}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **shell) as process:
        wait_until(lambda: begun.exists() and begun.read_text())
        kernel = int(begun.read_text())
        for number in signals:
            process.send_signal(number)
            time.sleep(0.3)  # two of a kind at once would be one
        error = process.communicate(timeout=120)[1]
    assert process.returncode == code, error
    assert (f"09_long stopped: {said}" in error) is (code > 0) and "Traceback" not in error
    wait_until(lambda: not os.path.exists(f"/proc/{kernel}"))


# -- check: what is called ready is ready


def test_the_exit_code_goes_through_twenty_machines(tmp_path, monkeypatch, capsys, smollm2, fiqa_rows):
    """A loop over ssh sees nothing but the exit code; with everything in the cache every line is OK."""
    assets.fetch("minilm")
    arguments = ["check", "--offline", "--profile", "laptop", "--workdir", tmp_path]
    assert command(*arguments) == 0 and capsys.readouterr().out.endswith("Ready.\n")
    damaged = tmp_path / "cache" / assets.ASSETS["fiqa_test"].name_in_cache / "test.jsonl"
    damaged.parent.mkdir(parents=True)  # one byte too many: no network would replace it
    damaged.write_bytes(assets.fetch("fiqa_test").read_bytes() + b" ")
    monkeypatch.setenv("FIQA_CACHE", str(tmp_path / "cache"))
    assert command(*arguments) == 1
    said = capsys.readouterr().out
    assert said.count("make run ONLY=00") == 3, "Model, Data and MiniLM, each with its remedy"


def test_what_is_not_whole_is_not_ready(project, tmp_path, monkeypatch):
    """A download without a shard looks whole; a CSV that 01 would refuse is refused the night before."""
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = json.dumps({"weight_map": dict(zip("ab", shards, strict=True))})
    rows = (project / "docs" / "examples" / "harbour_lantern.csv").read_text("utf-8")
    files = {"config.json": "{}", "model.safetensors.index.json": index, shards[0]: "", "rows.csv": rows}
    for name, text in (files | {"wrong.csv": rows.replace("question", "title")}).items():
        (tmp_path / name).write_text(text, "utf-8")
    monkeypatch.setattr(checks, "_packages", lambda: (True, ""))  # pip takes seconds
    free = mock.Mock(free=14 * 2**30)  # too little for the 16 GB of a model that is not there yet
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: free)

    def ready(**changes: str) -> list[bool]:
        """Whether disk, model and data are."""
        profile = replace(PROFILES["gpu80"], **changes)
        results = checks.checks(Workspace(str(tmp_path)), profile, offline=True)
        return [result.ok for result in results if result.name in ("Disk", "Model", "Data")]

    assert ready(model=str(tmp_path), data="wrong.csv") == [False, False, False]
    (tmp_path / shards[1]).touch()
    assert ready(model=str(tmp_path), data="rows.csv") == [True, True, True]
    assert not ready(model="nobody/nothing")[1]


# -- ask, compare


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_tokenizer) -> Path:
    """What notebooks 01 and 04 leave on profile tiny: rows, and an adapter that changes something."""
    workspace = Workspace(str(tmp_path_factory.mktemp("commands")))
    data.write_processed(data.load_fiqa("packaged"), workspace.data)
    profile = load_profile("tiny")
    tuned = peft.get_peft_model(model.tiny_model(tiny_tokenizer), model.lora_config(profile))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data += 1.0
    card = {"profile": asdict(profile), "finished": True}
    checkpoints.save_final(tuned, tiny_tokenizer, workspace.final_model, **card)
    return workspace.root


def test_ask_answers_with_both_models_on_any_terminal(workdir, monkeypatch, capsys):
    """The adapter is really off in one; a character that the terminal lacks ended it after minutes."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    questions = ["Was kostet 1 €?", "What is an <b>ETF</b>?"]
    assert command("ask", "--profile", "tiny", "--workdir", workdir, *questions) == 0
    terminal.flush()
    said = terminal.buffer.getvalue().decode("ascii")
    assert "Profile tiny (random weights" in said
    blocks = said.partition("\n1. ")[2].split("\n2. ")
    assert [block.splitlines()[0] for block in blocks] == ["Was kostet 1 ??", questions[1]]
    for block in blocks:
        base, tuned = block.split("  tuned (")
        assert base.split(":\n", 1)[1].strip() != tuned.split(":\n", 1)[1].strip()
    monkeypatch.setattr(
        model, "load_base", lambda *_: pytest.fail("weights loaded for more than the context")
    )
    assert command("ask", "--profile", "tiny", "--workdir", workdir, "Why is money " * 5000) == 1
    assert "shorten the question" in capsys.readouterr().err


def test_compare_shows_what_differs(tmp_path, capsys):
    """Thirty equal settings would bury the one that was changed; an empty folder must not hide the others."""
    for name, rank in {"ann": 8, "bob": 16}.items():
        (tmp_path / name / "outputs" / "run_cards").mkdir(parents=True)
        for path in CARDS.glob("*.json"):
            card = json.loads(path.read_text("utf-8"))
            card["profile"]["lora_rank"], card["figure"] = rank, f"{path.stem} by {name}"
            (tmp_path / name / "outputs" / "run_cards" / path.name).write_text(json.dumps(card))
    assert command("compare", *(tmp_path / name for name in ("ann", "bob", "nobody"))) == 0
    said = dict(
        re.split(r"  +", line.strip(), maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:]
    )
    assert said["lora_rank"].split() == ["8", "16", "-"] and "epochs" not in said
    assert re.split(r"  +", said["notebook 04"]) == ["04 by ann", "04 by bob", "-"]
    assert "rows)" in said["topic, 95 %"] and "%" in said["ended by itself"]
