"""Rubbish in: each wrong parameter, data file or adapter ends in one sentence with culprit and remedy."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

PICKLE = {"adapter_config.json": b'{"peft_type": "LORA"}'}
PICKLE["adapter_model.bin"] = b"cos\nsystem\n(S'touch /tmp/run-by-a-pickle'\ntR."
MINE = {"overrides": "{data: mine}"}
# notebook, its parameters, words of the sentence (more of them in test_profiles.py, test_data.py and others)
CASES = {
    "value": ("00", {"profile": "GPU80"}, ["profile is 'GPU80'", "choose one of auto, laptop"]),
    "type": ("01", {"profile": 80}, ["Parameter profile is 80", "must be str"]),
    "workdir": ("01", {"workdir": "/proc/nowhere"}, ["/proc/nowhere", "set the parameter workdir"]),
    "name": ("04", {"max_steps": 20}, ["no parameter", "max_steps", "on_existing"]),
    "number": ("02", {"example": "3"}, ["example is '3'", "-y or -f"]),
    "boolean": ("05", {"n_questions": "false"}, ["n_questions is 'false'"]),
    "range": ("06", {"rows": -1}, ["rows is -1"]),
    "no GPU": ("03", {"profile": "gpu80"}, ["gpu80", "GPU"]),
    "no mapping": ("01", {"overrides": "max_steps"}, ["overrides is 'max_steps'", "YAML mapping"]),
    "setting": ("01", {"overrides": "{max_step: 3}"}, ["'max_step'", "did you mean max_steps?"]),
    "together": ("01", {"overrides": "{max_length: 600}"}, ["less than one row", "raise tokens_per_batch"]),
    "no data": ("01", MINE, ["data is 'mine'", "a folder or file that exists"]),
    "no rows": ("01", MINE, ["train.jsonl", "a single file 10"], {"mine/train.jsonl": b""}),
    "columns": (
        "01",
        MINE,
        ["row 1, needs the columns", "'query'"],
        {"mine/train.csv": b"query,text\nq,a\n"},
    ),
    "no adapter": (
        "05",
        {},
        ["There is no adapter", "run notebook 04_train first"],
        {"checkpoints/final_model/x": b""},
    ),
    "pickle": (
        "05",
        {},
        ["pickled weights", "04"],
        {f"checkpoints/final_model/{name}": PICKLE[name] for name in PICKLE},
    ),
    "02 before 01": ("02", {}, ["Notebook 01_explore_fiqa has not been run"]),
    "04 before 03": ("04", {}, ["Notebook 03_set_up_lora has not been run"]),
}


def parametrized(project: Path, name: str, workdir: Path):
    """The notebook of a case, its parameters injected as papermill does it; and words of the sentence."""
    number, parameters, words, *files = CASES[name]
    for file, content in (files[0] if files else {}).items():
        (workdir / file).parent.mkdir(parents=True, exist_ok=True)
        (workdir / file).write_bytes(content)
    (path,) = (project / "notebooks").glob(f"{number}_*.ipynb")
    values = {"profile": "tiny", "workdir": str(workdir)} | parameters
    with contextlib.redirect_stderr(io.StringIO()):  # papermill's own warning about unknown names
        return parameterize_notebook(load_notebook_node(str(path)), values), words


@pytest.fixture
def shell():
    """An IPython shell, which is what executes the cells in a kernel too."""
    InteractiveShell.clear_instance()
    yield InteractiveShell.instance(colors="nocolor")
    InteractiveShell.clear_instance()


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_in_one_sentence(project, tmp_path, monkeypatch, shell, capsys, name):
    """The real notebook is executed until it stops: at a WorkshopError, shown as its sentence alone."""
    monkeypatch.chdir(tmp_path)
    notebook, words = parametrized(project, name, tmp_path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            capsys.readouterr()
            outcome = shell.run_cell(cell.source, store_history=True)
            if not outcome.success:
                break
    shown, error = "".join(capsys.readouterr()), outcome.error_in_exec
    assert type(error).__name__ == "WorkshopError", f"{error!r}\n{shown}"
    sentence = str(error)
    assert "\n" not in sentence and len(sentence) < 600
    assert not [part for part in words if part not in sentence], sentence
    assert f"WorkshopError: {sentence}" in shown
    assert "Traceback" not in shown and 'File "' not in shown and ".py" not in shown.replace(sentence, "")
    assert not Path("/tmp/run-by-a-pickle").exists()


@pytest.mark.notebooks
def test_papermill_exits_with_an_error_and_shows_the_sentence(project, tmp_path):
    """Headless, only the exit status keeps the next notebook from running."""
    notebook, words = parametrized(project, "pickle", tmp_path)
    nbformat.write(notebook, tmp_path / "in.ipynb")
    command = [
        sys.executable,
        "-m",
        "papermill",
        "in.ipynb",
        "out.ipynb",
        "-k",
        "python3",
        "--no-progress-bar",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    errors = [o for cell in executed.cells for o in cell.get("outputs", []) if o.output_type == "error"]
    assert [error.ename for error in errors] == ["WorkshopError"]
    assert len(errors[0].traceback) == 1 and "\n" not in errors[0].evalue
    assert all(part in errors[0].evalue and part in done.stderr for part in words)
