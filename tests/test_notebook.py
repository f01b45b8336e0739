"""What every notebook begins and ends with: parameters, errors in one sentence, folders, run cards, quiet."""

import json
import logging
import os
import subprocess
import sys
import threading
import warnings

import nbformat
import pytest

from fiqa_helpers import base
from fiqa_helpers.base import WorkshopError, Workspace, is_interactive, project_root
from fiqa_helpers.machinery import machine
from fiqa_helpers.profiles import load_profile
from fiqa_helpers.run import Run, check_parameters, quiet, start

PARAMETERS = """profile: str = "laptop"  # the profile
overrides: str = ""  # YAML
workdir: str = ""  # folder
fast: bool = False  # a switch
rows: int = 3  # a count
rate: float = 0.5  # a number
"""


def namespace(injected: str = "") -> dict:
    """What a notebook's globals are after its parameters cell and the cell that papermill injects."""
    scope = {"In": ["", PARAMETERS]}
    exec(PARAMETERS, scope)
    if injected:
        scope["In"].append(f"# Parameters\n{injected}\n")
        exec(injected, scope)
    return scope


# --- parameters


def test_parameters_are_returned_by_name():
    """A parameter left out of the run card, or one that is none of the notebook's."""
    expected = {"profile": "laptop", "overrides": "", "workdir": "", "fast": False, "rows": 3, "rate": 0.5}
    assert check_parameters(namespace()) == expected
    assert check_parameters(namespace("rows = 5\nrate = 1\nfast = True")) == expected | {
        "rows": 5,
        "rate": 1,
        "fast": True,
    }
    assert check_parameters(namespace('overrides = "{seed: 1}\\nmax_steps = 3"'))["rows"] == 3


@pytest.mark.parametrize(
    ("injected", "sentence"),
    [
        ('fast = "false"', r"Parameter fast is 'false': it must be bool \(papermill: pass it with -y or -f"),
        ("fast = 0", r"Parameter fast is 0: it must be bool\."),
        ("fast = None", r"Parameter fast is None: it must be bool"),
        ('rows = "3"', r"Parameter rows is '3': it must be int \(papermill"),
        ("rows = 3.0", r"Parameter rows is 3.0: it must be int\."),
        ("rows = True", r"Parameter rows is True: it must be int\."),
        ("rows = -1", r"Parameter rows is -1: it must be 0 or more\."),
        ("rate = 'x'", r"Parameter rate is 'x': it must be float"),
        ("rate = True", r"Parameter rate is True: it must be float"),
        ("profile = {'a': 1}", r"Parameter profile is {'a': 1}: it must be str\."),
        ("fast = 'x' * 10_000_000", r"Parameter fast is 'xxx.*\.\.\.: it"),
        ("profle = 'laptop'", r"no parameter profle: did you mean profile"),
        ("Rows = 3", r"no parameter Rows: did you mean rows"),
        ("zzz = 3", r"no parameter zzz: this notebook has profile, overrides, workdir, fast, rows, rate\."),
    ],
)
def test_a_wrong_parameter_is_named(injected, sentence):
    """papermill's `-p fast false` is the text "false", which is true; a misspelt name only warns."""
    with pytest.raises(WorkshopError, match=sentence) as caught:
        check_parameters(namespace(injected))
    assert len(str(caught.value)) < 250


def write_notebook(path, *cells: str) -> None:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    book.cells[0].metadata.tags = ["parameters"]
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, path)


START = 'from fiqa_helpers.run import start\nrun = start(globals(), "01")'


def papermill(folder, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb", "--no-progress-bar", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture
def book(tmp_path):
    """A folder with a notebook that starts as ours do."""
    write_notebook(tmp_path / "in.ipynb", PARAMETERS, START, 'print("after", run.profile.name)')
    return tmp_path


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("fast", "yes", "Parameter fast is 'yes': it must be bool"),
        ("profle", "laptop", "There is no parameter profle: did you mean profile?"),
    ],
)
def test_papermill_fails_with_the_sentence_alone(book, name, value, sentence):
    """An error that only prints: papermill exits 0, or stores forty frames of traceback, or nothing."""
    ran = papermill(book, "-p", name, value)
    assert ran.returncode == 1 and sentence in ran.stderr
    cells = [c for c in nbformat.read(book / "out.ipynb", 4).cells if c.cell_type == "code"]
    (error,) = [out for cell in cells for out in cell.outputs if out.output_type == "error"]
    assert error.ename == "WorkshopError" and error.evalue.startswith(sentence)
    assert error.traceback == [f"WorkshopError: {error.evalue}"]
    assert not cells[-1].outputs and cells[-1].execution_count is None  # Run All stopped


def test_papermill_runs_with_right_parameters(book):
    """A check that refuses what is right: -y for a number, a boolean and an empty text."""
    ran = papermill(book, "-y", f"{{fast: true, rows: 5, rate: 1, workdir: {book}/w, profile: tiny}}")
    assert ran.returncode == 0, ran.stderr
    outputs = [out for cell in nbformat.read(book / "out.ipynb", 4).cells for out in cell.get("outputs", [])]
    text = "".join(out.text for out in outputs)
    assert "Profile tiny" in text and "after tiny" in text
    assert all(out.output_type == "stream" and out.name == "stdout" for out in outputs)


def test_nbmake_fails_with_the_sentence(book):
    """A WorkshopError that nbmake takes for a pass: the notebook tests would prove nothing."""
    write_notebook(book / "bad.ipynb", PARAMETERS.replace('"laptop"', '"gpu40"'), START)
    command = [sys.executable, "-m", "pytest", "--nbmake", "bad.ipynb", "-p", "no:cacheprovider"]
    ran = subprocess.run(command, cwd=book, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 1 and "profile is 'gpu40': choose one of auto" in ran.stdout


@pytest.fixture
def shell():
    """IPython in this process, with the handler installed."""
    from IPython.core.interactiveshell import InteractiveShell

    from fiqa_helpers.base import install_notebook_handler

    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    install_notebook_handler()
    yield shell
    InteractiveShell.clear_instance()


def test_only_a_workshop_error_is_short(shell, capsys):
    """A handler that hides the traceback of a real bug, in which the frames are what helps."""
    shell.run_cell("from fiqa_helpers.base import WorkshopError")
    result = shell.run_cell("def f():\n    raise WorkshopError('x is 1: set it to 2.')\nf()")
    out = capsys.readouterr().out
    assert out.strip() == "WorkshopError: x is 1: set it to 2." and not result.success
    shell.run_cell("def g():\n    raise ValueError('a bug')\ng()")
    out = capsys.readouterr().out
    assert "Traceback" in out and "raise" in out and "g" in out and "ValueError" in out
    shell.run_cell("raise WorkshopError('again.')")
    assert capsys.readouterr().out.strip() == "WorkshopError: again."  # still installed


def test_the_handler_does_nothing_outside_ipython():
    """The command line, which has no IPython: an AttributeError on None."""
    code = "from fiqa_helpers.base import *; install_notebook_handler()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- folders


def test_a_workspace_makes_its_folders_on_demand(tmp_path):
    """Folders beside the notebooks, or empty ones that nobody asked for."""
    workspace = Workspace(str(tmp_path / "new" / "run"))
    assert not (tmp_path / "new").exists()
    made = [getattr(workspace, n) for n in ("data", "checkpoints", "outputs", "run_cards", "plots", "logs")]
    assert all(folder.is_dir() and folder.is_relative_to(tmp_path / "new" / "run") for folder in made)
    assert workspace.final_model == workspace.checkpoints / "final_model"
    assert workspace.shown(workspace.plots / "a.png") == "outputs/plots/a.png"
    assert workspace.shown(tmp_path / "b.png") == str(tmp_path / "b.png")


def test_the_project_is_found_from_wherever_a_runner_starts(project, monkeypatch, tmp_path):
    """papermill starts a kernel in the caller's folder, nbmake in the notebook's."""
    for folder in (project, project / "notebooks", project / "fiqa_helpers", tmp_path):
        monkeypatch.chdir(folder)
        assert project_root() == project and Workspace().root == project


def test_a_relative_workdir_and_a_home_folder(monkeypatch, tmp_path):
    """A workdir that moves with the working directory during the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    workspace = Workspace("here")
    assert workspace.root == tmp_path / "here" and Workspace("~/x").root == tmp_path / "home" / "x"
    monkeypatch.chdir("/")
    assert workspace.root == tmp_path / "here"


@pytest.mark.parametrize("workdir", ["/proc/nowhere", "/dev/null", "file/x"])
def test_a_folder_that_cannot_be_is_named(workdir, monkeypatch, tmp_path):
    """NotADirectoryError, four modules away from the parameter that holds it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WorkshopError, match=r"Cannot write to .*set the parameter workdir"):
        _ = Workspace(workdir).data


def test_a_read_only_folder_is_refused_at_once(small_disk):
    """`mkdir(exist_ok=True)` is content with a folder that is there and can't be written to."""
    place = small_disk("size=64k")
    (place / "outputs" / "run_cards").mkdir(parents=True)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    for name in ("run_cards", "data"):
        with pytest.raises(WorkshopError, match=r"Cannot write to .*set the parameter workdir to a folder"):
            getattr(Workspace(str(place)), name)


# --- run cards


@pytest.fixture
def run(tmp_path) -> Run:
    return Run("03", {"profile": "laptop"}, load_profile("laptop"), Workspace(str(tmp_path)))


def test_a_finished_notebook_leaves_its_card(run, capsys, tmp_path):
    """A result that nobody can trace to its parameters, versions, machine and files."""
    plot = run.workspace.plots / "loss.png"
    run.finish("validation loss 3.37 -> 3.19", files=[plot, "/elsewhere/x"], loss=3.19)
    card = json.loads((tmp_path / "outputs/run_cards/03.json").read_text(encoding="utf-8"))
    assert card["notebook"] == "03_set_up_lora" and card["parameters"] == {"profile": "laptop"}
    assert card["profile"]["model"] == "packaged" and card["profile"]["lora_targets"][0] == "q_proj"
    assert card["files"] == ["outputs/plots/loss.png", "/elsewhere/x"] and card["facts"] == {"loss": 3.19}
    assert card["versions"]["torch"].startswith("2.") and set(card["versions"]) == set(base.PACKAGES)
    assert card["device"]["cores"] >= 1 and card["seconds"] >= 0 and card["peak_memory_gib"] > 0
    assert card["git_revision"] and card["written"] and card["started"]
    printed = capsys.readouterr().out
    assert "validation loss 3.37 -> 3.19" in printed and "outputs/run_cards/03.json" in printed
    assert "Profile laptop" in printed  # nobody takes a laptop figure for an 8B one


def test_needs_hands_out_the_card_of_an_earlier_notebook(run):
    """A card that its own reader does not accept."""
    run.finish("done", answer=42)
    assert run.needs("03")["facts"] == {"answer": 42}


def test_needs_names_the_notebook_to_run(run):
    """FileNotFoundError: 01.json."""
    with pytest.raises(WorkshopError, match=r"01_explore_fiqa has not been run in .*: run it first\."):
        run.needs("01")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"profile": null}', "\x00\x00", '{"profile": 3}']
)
def test_a_damaged_card_counts_as_none(run, content):
    """AttributeError on a card that a full disk or another program has left."""
    (run.workspace.run_cards / "01.json").write_text(content)
    with pytest.raises(WorkshopError, match="01_explore_fiqa"):
        run.needs("01")


@pytest.mark.parametrize(
    "setting", ["model: /other", "model_revision: v2", "data: hub", "prompt: chat", "training: reference"]
)
def test_needs_names_what_does_not_fit(run, setting, tmp_path):
    """An adapter of one model loaded into another, an answer judged under another prompt."""
    key, value = setting.split(": ")
    other = Run("04", {}, load_profile("laptop", f"{{{setting}}}"), Workspace(str(tmp_path)))
    run.finish("done")
    with pytest.raises(WorkshopError, match=rf"was run with {key} = .* this one has '{value}'"):
        other.needs("03")


def test_a_card_is_whole_or_old_at_any_moment(tmp_path):
    """A reader that finds half a file while another notebook writes it."""
    path = tmp_path / "card.json"
    base.write_json(path, {"n": -1})
    done = threading.Event()

    def write() -> None:
        for n in range(200):
            base.write_json(path, {"n": n, "padding": "x" * 50_000})
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while not done.is_set():
        card = base.read_card(path)
        assert card is not None and "n" in card
        seen += 1
    writer.join()
    assert seen > 10 and base.read_card(path)["n"] == 199
    assert [p.name for p in tmp_path.iterdir()] == ["card.json"]


def test_a_full_disk_leaves_the_old_card(small_disk):
    """The card of a good run destroyed by the next one's failure, and forty frames to say so."""
    place = small_disk("size=64k")
    run = Run("03", {}, load_profile("laptop"), Workspace(str(place)))
    run.finish("done")
    with pytest.raises(WorkshopError, match=r"The disk of .* is full: free some space or set the parameter"):
        run.finish("done again", text="x" * 200_000)
    assert run.needs("03")["figure"] == "done"
    assert [path.name for path in run.workspace.run_cards.iterdir()] == ["03.json"]


def test_the_environment_itself_is_not_in_a_card(run, monkeypatch, tmp_path):
    """os.environ dumped for debugging, with somebody's token in it."""
    monkeypatch.setenv("HF_TOKEN", "canary-7f3a9")
    run.finish("done")
    assert "canary-7f3a9" not in (tmp_path / "outputs/run_cards/03.json").read_text()


# --- quiet


def test_quiet_hides_chatter_and_shows_errors(monkeypatch):
    """Silence that also swallows the one message that explains a failure."""
    monkeypatch.setattr(warnings, "filters", list(warnings.filters))
    levels = {name: logging.getLogger(name).level for name in ("nemo_automodel", "transformers", "torchao")}
    for variable in ("TQDM_DISABLE", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(variable, raising=False)
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    library = logging.getLogger("nemo_automodel.somewhere")
    library.addHandler(handler)
    try:
        quiet()
        library.warning("chatter")
        library.error("a reason")
        logging.getLogger().addHandler(handler)
        logging.getLogger("my_own_code").warning("mine")
        assert seen == ["a reason", "mine"]
        with warnings.catch_warnings(record=True) as caught:
            warnings.warn("deprecated", FutureWarning, stacklevel=1)
            warnings.warn("about your data", UserWarning, stacklevel=1)
        assert [str(w.message) for w in caught] == ["about your data"]
    finally:
        library.removeHandler(handler)
        logging.getLogger().removeHandler(handler)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for variable in ("TQDM_DISABLE", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.pop(variable, None)


def test_quiet_leaves_what_the_person_has_set(monkeypatch):
    """TRANSFORMERS_VERBOSITY=debug set for a reason, and overruled."""
    monkeypatch.setattr(warnings, "filters", list(warnings.filters))
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    monkeypatch.setenv("TQDM_DISABLE", "0")
    quiet()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug" and os.environ["TQDM_DISABLE"] == "0"


def asked_in_a_kernel(live: bool, **environment: str) -> str:
    """What `is_interactive` says in a real kernel whose frontend is `live` or is a program."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", env=os.environ | environment)
    try:
        code = "from fiqa_helpers.base import is_interactive\nprint(is_interactive())"
        seen = []
        client.execute_interactive(code, allow_stdin=live, output_hook=seen.append, timeout=120)
        return "".join(message["content"].get("text", "") for message in seen).strip()
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("live", [True, False])
def test_interactive_is_a_person_at_a_live_frontend(live):
    """VS Code sets no JPY_SESSION_NAME and showed nothing; a program that inherits it wrote widget state."""
    name = {} if live else {"JPY_SESSION_NAME": "/x.ipynb"}
    assert asked_in_a_kernel(live, **name) == str(live)


def test_nobody_is_there_in_a_script():
    """An AttributeError on the kernel that a script does not have."""
    is_interactive.cache_clear()
    assert not is_interactive()


# --- settings that travel


def started(number: str, workdir, **more: str) -> Run:
    """A notebook's first cell on profile tiny, with no overrides."""
    values = {"profile": "tiny", "overrides": "", "workdir": str(workdir)} | more
    return start({"__annotations__": dict.fromkeys(values, str), **values}, number)


def test_overrides_travel_to_the_next_notebook(tmp_path, capsys):
    """Trained with 3 steps in 04, and evaluated in 06 as if with the profile's own settings."""
    started("03", tmp_path, overrides="{max_steps: 3}").finish("done")
    assert "as in notebook" not in capsys.readouterr().out
    run = started("04", tmp_path)
    said = capsys.readouterr().out
    assert run.profile.max_steps == 3 and 'overrides = "{max_steps: 3}", as in notebook 03_set_up' in said
    run.finish("done")
    assert started("06", tmp_path).profile.max_steps == 3  # 05 was not run: 04 is the one before
    assert started("03", tmp_path).profile.max_steps == 4  # never backwards, nor from itself


def test_overrides_travel_no_further_than_meant(tmp_path):
    """A laptop's settings in an 8B run, or settings that nobody can get rid of."""
    started("01", tmp_path, overrides="{max_steps: 3}").finish("done")
    assert started("02", tmp_path, overrides="{seed: 7}").profile.max_steps == 4  # one's own go first
    assert started("02", tmp_path, profile="laptop").profile.max_steps == 24
    started("02", tmp_path, overrides="{}").finish("done")
    assert started("03", tmp_path).profile.max_steps == 4
    for broken in ("", "[]", '{"profile": null}', '{"profile": {"name": "tiny"}, "parameters": {}}'):
        (tmp_path / "outputs/run_cards/02.json").write_text(broken)
        assert started("03", tmp_path).profile.max_steps in (3, 4)


def test_a_python_that_skips_asserts_is_refused():
    """With PYTHONOPTIMIZE each checkpoint of a notebook passes and every exercise is right."""
    code = "from fiqa_helpers.run import start\nstart(globals(), '01')"
    ran = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1 and "PYTHONOPTIMIZE (or -O) skips every check" in ran.stderr


# --- one lock


def test_a_second_process_waits_or_is_refused(tmp_path):
    """Two downloads into one folder, two trainings of one run."""
    code = "import sys, time\nfrom pathlib import Path\nfrom fiqa_helpers.base import locked\n"
    code += "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    lock = tmp_path / "a.lock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(WorkshopError, match="it is in use"), base.locked(lock, busy="it is in use"):
            pass
    finally:
        holder.kill()
        holder.wait()
    with base.locked(lock):  # the lock died with its process
        assert lock.stat().st_mode & 0o777 == 0o666  # a second user of a shared folder may take it, too


def test_peak_memory_is_that_of_this_process():
    """GiB taken for bytes or KiB in the run card."""
    assert 0.01 < machine.peak_memory_gib() < machine.ram_gib()
