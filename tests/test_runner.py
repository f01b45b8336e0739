"""`python -m fiqa_helpers run`: order, typed parameters, the right kernel, signals, failures as sentences."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from fiqa_helpers import __main__ as cli
from fiqa_helpers.base import WorkshopError, Workspace

PARAMETERS = 'profile: str = "auto"  # a\noverrides: str = ""  # b\nworkdir: str = ""  # c\n'
SENTENCE = "from fiqa_helpers.base import WorkshopError\n"


def write_notebook(path: Path, *sources: str, parameters: str = PARAMETERS) -> Path:
    """A notebook with a parameters cell and one code cell per source."""
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    return path


def run(path: Path, workspace: Workspace, **values: object) -> None:
    """Execute one notebook."""
    values = {"profile": "laptop", "overrides": "", "workdir": str(workspace.root)} | values
    cli.execute(path, workspace, values, "[1/1] test")


def printed(path: Path) -> str:
    notebook = nbformat.read(path, 4)
    return "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("", "00 01 04"),
        ("4", "04"),
        ("04,00", "00 04"),
        ("00-01", "00 01"),
        ("01-", "01 04"),
        (" 01 04", "01 04"),
    ],
)
def test_choice_of_notebooks(tmp_path, only, expected):
    """They run in the order of their numbers, nothing else runs; ONLY=40 is no success with nothing done."""
    for name in ("01_b.ipynb", "00_a.ipynb", "04_c.ipynb", "notes.ipynb"):
        (tmp_path / name).touch()
    assert [path.name[:2] for path in cli.choose(tmp_path, only)] == expected.split()
    with pytest.raises(WorkshopError, match="'40'.*00, 01, 04"):
        cli.choose(tmp_path, "00,40")


def test_own_parameters_reach_the_notebooks_that_have_them(tmp_path):
    """papermill merely warns of a name that a notebook lacks, and passes "48" on as text: both end a run."""
    plain = write_notebook(tmp_path / "01_plain.ipynb")
    train = write_notebook(
        tmp_path / "04_train.ipynb", parameters=PARAMETERS + 'on_existing: str = ""  # d\n'
    )
    other = write_notebook(tmp_path / "06_other.ipynb", parameters=PARAMETERS + "rows: int = 0  # d\n")
    found = cli.own_parameters([plain, train, other], ["rows=48"], fresh=True)
    assert found == {plain: {}, train: {"on_existing": "fresh"}, other: {"rows": 48}}
    assert cli.own_parameters([plain], [], fresh=True) == {plain: {}}, "nothing to begin anew is no mistake"
    assert cli.own_parameters([train], []) == {train: {}}
    with pytest.raises(WorkshopError, match="row: no such parameter in 01_plain, 06_other"):
        cli.own_parameters([plain, other], ["row=48"])


@pytest.mark.parametrize(("variable", "wins"), [("JUPYTER_DATA_DIR", False), ("JUPYTER_PATH", True)])
def test_users_own_kernel_is_passed_over_or_named(tmp_path, variable, wins):
    """One in the user's Jupyter folder loses against the environment's; JUPYTER_PATH beats both: named."""
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "Other", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    code = "from fiqa_helpers import __main__ as cli\ncli.use_own_kernel()"
    environment = os.environ | {variable: str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (result.returncode != 0) is wins, result.stderr
    assert ("kernel python3 runs /bin/false" in result.stderr) is wins


def test_parameters_arrive_typed_and_untouched(tmp_path):
    """Braces, quotes and spaces in values and paths: papermill formats paths and once ate the braces."""
    workspace = Workspace(str(tmp_path / "with {braces} and 'quotes'"))
    source = "import sys\nprint(repr(overrides)); print(repr(workdir)); print(sys.executable)"
    notebook = write_notebook(tmp_path / "09_values.ipynb", source)
    run(notebook, workspace, overrides='{prompt: "plain"}  # it\'s')
    lines = printed(workspace.outputs / "executed" / notebook.name).splitlines()
    assert lines[:2] == [repr('{prompt: "plain"}  # it\'s'), repr(str(workspace.root))]
    assert os.path.realpath(lines[2]) == os.path.realpath(sys.executable)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            f"{SENTENCE}raise WorkshopError('The disk is full: free some.')",
            "stopped: The disk is full: free some.",
        ),
        ("1 / 0", "stopped: ZeroDivisionError: division by zero"),
        ("import os; os._exit(137)", "stopped: its kernel died, most often because memory ran out"),
    ],
)
def test_a_failure_is_a_sentence(tmp_path, source, said):
    """A person reads the remedy, not forty lines of nbclient; the notebook so far is kept."""
    notebook = write_notebook(tmp_path / "09_fails.ipynb", "print('before')", source, "print('after')")
    with pytest.raises(WorkshopError) as caught:
        run(notebook, Workspace(str(tmp_path)))
    assert str(caught.value).startswith(f"09_fails {said}")
    assert printed(tmp_path / "outputs" / "executed" / "09_fails.ipynb") == "before\n"


# A kernel that computes, and one that trains: told to stop, it finishes what it is at, and says so.
COMPUTES = (
    "import os, pathlib, time\n_ = pathlib.Path({begun!r}).write_text(str(os.getpid()))\ntime.sleep(600)\n"
)
TRAINS = (
    SENTENCE
    + """import os, pathlib, signal, time
told = []
_ = signal.signal(signal.SIGTERM, lambda *_: told.append(1))
_ = pathlib.Path({begun!r}).write_text(str(os.getpid()))
while not told:
    time.sleep(0.1)
time.sleep(1)
_ = signal.signal(signal.SIGTERM, signal.SIG_DFL)
raise WorkshopError("Told to stop after step 7: " + str(len(told)))
"""
)
RUN = """import pathlib, signal, sys
from fiqa_helpers import __main__ as cli
cli.project_root = lambda: pathlib.Path({folder!r})
if "nohup" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
cli.main(["run", "--profile", "laptop", "--workdir", {folder!r}])
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
        (TRAINS, [signal.SIGINT], 130, "Told to stop after step 7: 1"),
        (TRAINS.replace("sleep(1)", "sleep(600)"), [signal.SIGINT, signal.SIGINT], 130, "SIGINT came"),
        (COMPUTES, [signal.SIGINT], 130, "SIGINT came; `--only 09-` begins with it again."),
        pytest.param(TRAINS, [signal.SIGHUP], 1, "Told to stop after step 7: 1", marks=pytest.mark.slow),
        pytest.param(COMPUTES.replace("600", "3"), [signal.SIGHUP], 0, "", marks=pytest.mark.slow),  # nohup
    ],
)
def test_a_signal_reaches_the_kernel_and_is_waited_for(tmp_path, source, signals, code, said):
    """papermill alone dies of it and leaves a kernel behind, or one that ends without a checkpoint.

    Whoever logs out on purpose, with nohup, means the run to go on.
    """
    begun = tmp_path / "begun"
    write_notebook(tmp_path / "notebooks" / "09_long.ipynb", source.replace("{begun!r}", repr(str(begun))))
    command = [sys.executable, "-c", RUN.format(folder=str(tmp_path)), "" if code else "nohup"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_until(lambda: begun.exists() and begun.read_text())
        kernel = int(begun.read_text())
        for number in signals:
            process.send_signal(number)
            time.sleep(0.3)  # two of a kind at once would be one
        error = process.communicate(timeout=120)[1]
    assert process.returncode == code, error
    assert (f"09_long stopped: {said}" in error) is (code > 0) and "Traceback" not in error
    wait_until(lambda: not os.path.exists(f"/proc/{kernel}"))


def test_a_run_in_the_callers_folder(tmp_path, monkeypatch, capsys):
    """The kernel works in the project folder, so a relative workdir is resolved before; then the results."""
    write_notebook(tmp_path / "notebooks" / "01_plain.ipynb")
    cards = tmp_path / "try" / "outputs" / "run_cards"
    cards.mkdir(parents=True)
    (cards / "01.json").write_text('{"notebook": "01_plain", "seconds": 90, "figure": "loss 3.2"}')
    passed = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "project_root", lambda: tmp_path)
    monkeypatch.setattr(cli, "execute", lambda nb, ws, values, *rest: passed.append(values["workdir"]))
    for arguments in (["--workdir", "try"], []):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["run", "--profile", "laptop", *arguments])
    assert passed == [str(tmp_path / "try"), ""]
    assert re.search(r"^01_plain +1\.5 min  loss 3\.2$", capsys.readouterr().out, re.MULTILINE)
