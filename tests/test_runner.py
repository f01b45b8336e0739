"""The headless run: order, typed parameters, the right kernel, progress, failures in one sentence."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import nbformat
import pytest

from fiqa_helpers import __main__ as cli
from fiqa_helpers.__main__ import main, parser
from fiqa_helpers.base import WorkshopError, Workspace

PARAMETERS = 'profile: str = "auto"  # a\noverrides: str = ""  # b\nworkdir: str = ""  # c\n'


def write_notebook(path, *sources: str, parameters: str = PARAMETERS):
    """A notebook with a parameters cell and one code cell per source."""
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    for source in sources:
        cells.append(nbformat.v4.new_markdown_cell("## 9.1 A step"))
        cells.append(nbformat.v4.new_code_cell(source))
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    return path


def run(path, workspace, label="[1/1] test", **values):
    values = {"profile": "laptop", "overrides": "", "workdir": str(workspace.root)} | values
    return cli.execute(path, workspace, values, path.parent, label)


def outputs(path) -> str:
    notebook = nbformat.read(path, 4)
    return "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))


@pytest.fixture
def folder(tmp_path):
    for name in ("01_b.ipynb", "00_a.ipynb", "04_c.ipynb"):
        (tmp_path / name).touch()
    (tmp_path / "solutions").mkdir()
    (tmp_path / "notes.ipynb").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("", "00 01 04"),
        ("04", "04"),
        ("4", "04"),
        ("04,00", "00 04"),
        ("01 04", "01 04"),
        ("00-01", "00 01"),
        ("01-", "01 04"),
        (" 01 , 04 ", "01 04"),
    ],
)
def test_choice_of_notebooks(folder, only, expected):
    """They run in the order of their numbers, whatever order they are named in, and nothing else runs."""
    assert [path.name[:2] for path in cli.choose(folder, only)] == expected.split()


def test_unknown_notebook_is_an_error(folder):
    """`ONLY=40` must not end with success and nothing done."""
    with pytest.raises(WorkshopError, match="'40'.*00, 01, 04"):
        cli.choose(folder, "00,40")


def test_kernel_is_this_interpreter(tmp_path):
    """A kernel python3 in the user's Jupyter folder ran another Python, without torch."""
    cli.use_own_kernel()
    notebook = write_notebook(tmp_path / "09_kernel.ipynb", "import sys; print(sys.executable)")
    done = run(notebook, Workspace(str(tmp_path / "out")))
    assert os.path.realpath(outputs(done.output).strip()) == os.path.realpath(sys.executable)


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
    notebook = write_notebook(tmp_path / "09_values.ipynb", "print(repr(overrides)); print(repr(workdir))")
    done = run(notebook, workspace, overrides='{max_steps: 20, prompt: "plain"}  # it\'s')
    assert outputs(done.output).splitlines() == [
        repr('{max_steps: 20, prompt: "plain"}  # it\'s'),
        repr(str(workspace.root)),
    ]


def test_figure_comes_from_the_run_card_of_this_run(tmp_path):
    """A card left over from last week must not be shown as today's result."""
    workspace = Workspace(str(tmp_path))
    card = workspace.run_cards / "09.json"
    card.write_text('{"figure": "old"}')
    os.utime(card, (time.time() - 3600,) * 2)
    silent = write_notebook(tmp_path / "09_silent.ipynb", "pass")
    assert run(silent, workspace).figure == "no run card was written"
    source = f'import pathlib; _ = pathlib.Path({str(card)!r}).write_text(\'{{"figure": "loss 3.2"}}\')'
    done = run(write_notebook(tmp_path / "09_writes.ipynb", source), workspace)
    assert done.figure == "loss 3.2"
    assert "loss 3.2" in cli.summary([done], workspace)


def test_workshop_error_is_the_sentence_alone(tmp_path):
    """A person reads the remedy, not a traceback; the notebook so far is kept, with the error in it."""
    source = (
        "from fiqa_helpers.base import WorkshopError, install_notebook_handler\n"
        "install_notebook_handler()\nraise WorkshopError('The disk is full: free some space.')"
    )
    notebook = write_notebook(tmp_path / "09_fails.ipynb", "print('before')", source, "print('after')")
    with pytest.raises(WorkshopError) as caught:
        run(notebook, Workspace(str(tmp_path)))
    lines = str(caught.value).splitlines()
    assert lines[0] == "09_fails stopped: The disk is full: free some space."
    executed = tmp_path / "outputs" / "executed" / "09_fails.ipynb"
    assert lines[1] == f"Executed so far: {executed}"
    assert outputs(executed) == "before\n"


def test_other_errors_are_named_with_their_cell(tmp_path):
    """Anything unexpected keeps its kind, its text and where it happened."""
    notebook = write_notebook(tmp_path / "09_fails.ipynb", "1 / 0")
    with pytest.raises(WorkshopError, match=r"ZeroDivisionError: division by zero \(cell \d+\)"):
        run(notebook, Workspace(str(tmp_path)))


def test_dead_kernel_is_a_sentence(tmp_path):
    """The kernel killed for its memory used to end in forty lines of nbclient."""
    notebook = write_notebook(tmp_path / "09_dies.ipynb", "import os; os._exit(137)")
    with pytest.raises(WorkshopError, match="its kernel died, most often because memory ran out"):
        run(notebook, Workspace(str(tmp_path)))


def test_progress_in_a_log(tmp_path, capfd, monkeypatch):
    """A log gets a line at the start, one now and then, and one at the end: no control characters."""
    monkeypatch.setattr("fiqa_helpers.run.LOG_SECONDS", 1)
    notebook = write_notebook(tmp_path / "09_slow.ipynb", "import time; time.sleep(3)")
    run(notebook, Workspace(str(tmp_path)), label="[2/5] 09_slow")
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "[2/5] 09_slow  started"
    assert any("cell 4 of 4" in line and "9.1 A step" in line for line in lines[1:-1])
    assert lines[-1].startswith("[2/5] 09_slow  cell 4 of 4  0:0")
    assert lines[-1].endswith("done")
    assert not any("\r" in line or "\033" in line for line in lines)


def test_progress_on_a_terminal():
    """On a terminal the same line is rewritten, cut to its width, and closed with a newline."""
    controller, terminal = pty.openpty()
    code = (
        "import time\nfrom fiqa_helpers.run import progress\n"
        "with progress('[1/1] name') as report:\n    report(1, 2, 'x' * 300); time.sleep(1.2)\n"
    )
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "60"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=terminal, env=environment)
    seen = []
    reader = threading.Thread(target=lambda: seen.append(read_all(controller)))
    reader.start()
    process.wait(timeout=60)
    os.close(terminal)
    reader.join(timeout=10)
    os.close(controller)
    rewritten = seen[0].split("\r\033[K")[1:]
    assert len(rewritten) >= 2
    assert all(len(line.strip("\r\n")) < 60 for line in rewritten)
    assert rewritten[-1].strip().endswith("done")
    assert seen[0].endswith("\n")


def read_all(descriptor: int) -> str:
    text = b""
    while True:
        try:
            piece = os.read(descriptor, 4096)
        except OSError:  # Linux reports the closed other end of a terminal like this
            return text.decode()
        if not piece:
            return text.decode()
        text += piece


def test_fresh_reaches_only_notebooks_that_have_it(tmp_path, monkeypatch):
    """papermill merely warns of a parameter that a notebook does not have; start() refuses it."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    write_notebook(folder / "01_plain.ipynb", "pass")
    write_notebook(folder / "04_train.ipynb", parameters=PARAMETERS + 'on_existing: str = "resume"  # d\n')
    passed = {}
    monkeypatch.setattr(cli, "project_root", lambda: tmp_path)
    monkeypatch.setattr(cli, "use_own_kernel", lambda: None)
    monkeypatch.setattr(cli, "execute", lambda nb, ws, values, *rest: passed.update({nb.stem: values}))
    cli.run_all(profile="laptop", workdir=str(tmp_path), fresh=True)
    assert "on_existing" not in passed["01_plain"]
    assert passed["04_train"]["on_existing"] == "fresh"
    cli.run_all(profile="laptop", workdir=str(tmp_path))
    assert "on_existing" not in passed["04_train"]


def test_relative_workdir_means_the_callers_folder(tmp_path, monkeypatch):
    """The kernel works in the project folder, so a relative workdir has to be resolved before."""
    (tmp_path / "notebooks").mkdir()
    write_notebook(tmp_path / "notebooks" / "01_plain.ipynb", "pass")
    passed = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "project_root", lambda: tmp_path)
    monkeypatch.setattr(cli, "use_own_kernel", lambda: None)
    monkeypatch.setattr(cli, "execute", lambda nb, ws, values, *rest: passed.append(values))
    cli.run_all(profile="laptop", workdir="try")
    cli.run_all(profile="laptop")
    assert [values["workdir"] for values in passed] == [str(tmp_path / "try"), ""]


def test_interrupt_is_a_sentence_and_leaves_no_kernel(tmp_path):
    """Ctrl-C reaches runner and kernel at once: no forty lines, status 130, nothing left computing."""
    (tmp_path / "notebooks").mkdir()
    begun = tmp_path / "begun"
    source = "import os, pathlib, time\n"
    source += f"_ = pathlib.Path({str(begun)!r}).write_text(str(os.getpid()))\ntime.sleep(600)"
    write_notebook(tmp_path / "notebooks" / "09_long.ipynb", source)
    code = (
        "import pathlib, sys\nfrom fiqa_helpers import __main__ as cli\n"
        f"cli.project_root = lambda: pathlib.Path({str(tmp_path)!r})\n"
        f"sys.exit(cli.main(['run', '--profile', 'laptop', '--workdir', {str(tmp_path)!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until(lambda: begun.exists() and begun.read_text())
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Interrupted. The next run resumes" in error
    assert "Traceback" not in error
    kernel = int(begun.read_text())
    wait_until(lambda: not os.path.exists(f"/proc/{kernel}") if os.path.isdir("/proc/self") else True)


def wait_until(happened, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--profile", "gpu81"], "profile is 'gpu81'"),
        (["run", "--profile", "laptop", "--overrides", "{max_step: 2}"], "did you mean max_steps?"),
        (["run", "--profile", "laptop", "--only", "99"], "no such notebook"),
        (["check", "--profile", "laptop", "--overrides", "[1]"], "write a YAML mapping"),
    ],
)
def test_wrong_arguments_end_in_a_sentence(arguments, said, capsys):
    """Before any kernel starts, with exit status 1 and no traceback."""
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_help_names_every_option():
    """`--help` is the manual."""
    result = subprocess.run(
        [sys.executable, "-m", "fiqa_helpers", "run", "--help"], capture_output=True, text=True, check=True
    )
    for option in ("--profile", "--overrides", "--workdir", "--only", "--fresh"):
        assert option in result.stdout
    assert parser().parse_args(["run"]).profile == "auto"
