"""Rubbish in: each wrong parameter, data file or adapter ends in one sentence with culprit and remedy."""

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest


class Case(NamedTuple):
    """What is wrong, for which notebook, its parameters, words of the sentence, what to prepare."""

    wrong: str
    notebook: str
    parameters: dict
    words: tuple[str, ...]
    prepare: Callable[[Path], None] | None = None


def overrides(text: object, *words: str) -> Case:
    return Case(f"overrides {text}"[:60], "01", {"profile": "tiny", "overrides": text}, words)


def parameter(notebook: str, name: str, value: object, *words: str) -> Case:
    return Case(f"{name} {value!r}", notebook, {"profile": "tiny", name: value}, words)


def data_file(name: str, content: str | bytes, *words: str) -> Case:
    def write(workdir: Path) -> None:
        (workdir / "mine").mkdir()
        raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        (workdir / "mine" / name).write_bytes(raw)

    parameters = {"profile": "tiny", "overrides": "{data: mine}"}
    return Case(f"data {words[0]}"[:60], "01", parameters, (name, *words), write)


def rows(**row: object) -> str:
    return "".join(json.dumps(row | {"n": n}) + "\n" for n in range(20))


def adapter(wrong: str, files: dict[str, bytes], *words: str) -> Case:
    def write(workdir: Path) -> None:
        folder = workdir / "checkpoints" / "final_model"
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)

    return Case(f"adapter {wrong}", "05", {"profile": "tiny"}, ("final_model", *words), write)


LORA = json.dumps({"peft_type": "LORA"}).encode()
PICKLE = b"cos\nsystem\n(S'touch /tmp/run-by-a-pickle'\ntR."
CASES = [
    # parameters of every notebook: values, types, names
    parameter("00", "profile", "GPU80", "profile is 'GPU80'", "choose one of auto, laptop"),
    parameter("01", "profile", 80, "Parameter profile is 80", "must be str"),
    parameter("01", "overrides", 20, "Parameter overrides is 20"),
    parameter("01", "workdir", "/proc/nowhere", "/proc/nowhere", "set the parameter workdir"),
    parameter("01", "profil", "laptop", "profil", "profile"),
    parameter("04", "max_steps", 20, "no parameter", "max_steps", "on_existing"),
    parameter("02", "example", "3", "example is '3'", "-y or -f"),
    parameter("02", "rows_per_batch", 0, "rows_per_batch is 0"),
    parameter("05", "n_questions", "false", "n_questions is 'false'"),
    parameter("05", "first_row", -1, "first_row is -1"),
    parameter("06", "rows", -1, "rows is -1"),
    parameter("07", "processes", 0, "processes is 0"),
    # profiles and overrides (more of them in test_profiles.py)
    Case("gpu80 without a GPU", "03", {"profile": "gpu80"}, ("gpu80", "GPU")),
    overrides("max_steps", "overrides is 'max_steps'", "YAML mapping"),
    overrides("{max_step: 3}", "'max_step'", "did you mean max_steps?"),
    overrides("{batch_size: 0}", "batch_size is 0"),
    overrides("{max_length: 600}", "tokens_per_batch is 512, less than one row", "raise tokens_per_batch"),
    # data files (more of them in test_data.py)
    overrides("{data: nowhere}", "data is 'nowhere'", "a folder or file that exists"),
    data_file("train.jsonl", "", "a single file 10"),
    data_file("train.jsonl", rows(query="q", text="a"), "row 1, needs the columns", "['query', 'text'"),
    data_file("train.csv", "question,answer\nq,a,b\n", "row that begins at line 2", "put quotation marks"),
    data_file("train.jsonl", "\u0633\u0624\u0627\u0644".encode("utf-16"), "in UTF-8"),
    # adapters (more of them in test_model.py)
    adapter("missing", {}, "There is no adapter", "run notebook 04_train first"),
    adapter("pickle", {"adapter_config.json": LORA, "adapter_model.bin": PICKLE}, "pickled weights", "04"),
    # notebooks out of order
    Case("02 before 01", "02", {"profile": "tiny"}, ("Notebook 01_explore_fiqa has not been run",)),
    Case("04 before 03", "04", {"profile": "tiny"}, ("Notebook 03_set_up_lora has not been run",)),
]


def parametrized(project: Path, case: Case, workdir: Path):
    """The notebook of `case` with its parameters injected, as papermill does it."""
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    if case.prepare:
        case.prepare(workdir)
    values = {"workdir": str(workdir)} | case.parameters
    if isinstance(values["workdir"], str) and not values["workdir"].startswith("/"):
        values["workdir"] = str(workdir / values["workdir"])
    (path,) = (project / "notebooks").glob(f"{case.notebook}_*.ipynb")
    with contextlib.redirect_stderr(io.StringIO()):  # papermill's own warning about unknown names
        return parameterize_notebook(load_notebook_node(str(path)), values)


@pytest.fixture
def shell(monkeypatch):
    """An IPython shell, which is what executes the cells in a kernel too."""
    from IPython.core.interactiveshell import InteractiveShell

    InteractiveShell.clear_instance()
    yield InteractiveShell.instance(colors="nocolor")
    InteractiveShell.clear_instance()


@pytest.mark.parametrize("case", CASES, ids=[f"{case.notebook}: {case.wrong}" for case in CASES])
def test_bad_input_ends_in_one_sentence(project, tmp_path, monkeypatch, shell, capsys, case):
    """The real notebook is executed until it stops: at a WorkshopError, shown as its sentence alone."""
    monkeypatch.chdir(tmp_path)
    for cell in parametrized(project, case, tmp_path).cells:
        if cell.cell_type == "code":
            capsys.readouterr()
            outcome = shell.run_cell(cell.source, store_history=True)
            if not outcome.success:
                break
    shown, error = "".join(capsys.readouterr()), outcome.error_in_exec
    assert type(error).__name__ == "WorkshopError", f"{error!r}\n{shown}"
    sentence = str(error)
    assert "\n" not in sentence and len(sentence) < 600
    for words in case.words:
        assert words in sentence
    assert f"WorkshopError: {sentence}" in shown
    assert "Traceback" not in shown and 'File "' not in shown and ".py" not in shown.replace(sentence, "")
    assert not Path("/tmp/run-by-a-pickle").exists()


@pytest.mark.notebooks
@pytest.mark.parametrize("wrong", ["profil 'laptop'", "adapter pickle"])
def test_papermill_exits_with_an_error_and_shows_the_sentence(project, tmp_path, wrong):
    """Headless, only the exit status keeps the next notebook from running."""
    (case,) = (case for case in CASES if case.wrong == wrong)
    nbformat.write(parametrized(project, case, tmp_path), tmp_path / "in.ipynb")
    command = [sys.executable, "-m", "papermill", str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb")]
    done = subprocess.run(
        [*command, "-k", "python3", "--no-progress-bar"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    errors = [o for cell in executed.cells for o in cell.get("outputs", []) if o.output_type == "error"]
    assert [error.ename for error in errors] == ["WorkshopError"]
    assert len(errors[0].traceback) == 1 and "\n" not in errors[0].evalue
    for words in case.words:
        assert words in errors[0].evalue and words in done.stderr
