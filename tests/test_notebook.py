"""What every notebook begins and ends with: parameters, errors in one sentence, folders, run cards."""

import json
import os
import subprocess
import sys

import pytest

from fiqa_helpers import base
from fiqa_helpers.base import WorkshopError, Workspace, project_root
from fiqa_helpers.profiles import load_profile
from fiqa_helpers.run import Run, check_parameters, start

PARAMETERS = """profile: str = "laptop"  # the profile
overrides: str = ""  # YAML
workdir: str = ""  # folder
fast: bool = False  # a switch
rows: int = 3  # a count
rate: float = 0.5  # a number
"""


def namespace(injected: str = "") -> dict:
    """What a notebook's globals are after its parameters cell and the cell that papermill injects."""
    scope = {"In": ["", PARAMETERS, f"# Parameters\n{injected}\n"]}
    exec(f"{PARAMETERS}\n{injected}", scope)
    return scope


def test_parameters_are_returned_by_name():
    """A parameter left out of the run card, or one that is none of the notebook's."""
    expected = {"profile": "laptop", "overrides": "", "workdir": "", "fast": True, "rows": 5, "rate": 1}
    assert check_parameters(namespace("rows = 5\nrate = 1\nfast = True")) == expected
    assert check_parameters(namespace('overrides = "{seed: 1}\\nmax_steps = 3"'))["rows"] == 3


@pytest.mark.parametrize(
    ("injected", "sentence"),
    [
        ('fast = "false"', r"Parameter fast is 'false': it must be bool \(papermill: pass it with -y or -f"),
        ("rows = True", r"Parameter rows is True: it must be int\."),
        ("rows = -1", r"Parameter rows is -1: it must be 0 or more\."),
        ("profle = 'laptop'", r"no parameter profle: this notebook has profile, overrides, workdir, fast"),
    ],
)
def test_a_wrong_parameter_is_named(injected, sentence):
    """papermill's `-p fast false` is the text "false", which is true; a misspelt name only warns."""
    with pytest.raises(WorkshopError, match=sentence):
        check_parameters(namespace(injected))


def test_a_python_that_skips_asserts_is_refused():
    """With PYTHONOPTIMIZE each checkpoint of a notebook passes and every exercise is right."""
    code = "from fiqa_helpers.run import start\nstart(globals(), '01')"
    ran = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1 and "PYTHONOPTIMIZE (or -O) skips every check" in ran.stderr


def test_a_workspace_makes_its_folders_on_demand(tmp_path, monkeypatch):
    """Folders beside the notebooks or that nobody asked for, or a workdir that moves with a chdir."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    workspace = Workspace("new/run")
    assert Workspace("~/x").root == tmp_path / "home" / "x" and not (tmp_path / "new").exists()
    monkeypatch.chdir("/")
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


@pytest.fixture
def run(tmp_path) -> Run:
    return Run("03", {"profile": "laptop"}, load_profile("laptop"), Workspace(str(tmp_path)))


def test_a_finished_notebook_leaves_its_card(run, capsys, monkeypatch):
    """A result that nobody can trace to its parameters, versions and files; or a token written down."""
    monkeypatch.setenv("HF_TOKEN", "canary-7f3a9")
    plot = run.workspace.plots / "loss.png"
    run.finish("validation loss 3.37 -> 3.19", files=[plot, "/elsewhere/x"], loss=3.19)
    written = (run.workspace.run_cards / "03.json").read_text(encoding="utf-8")
    card = json.loads(written)
    assert run.needs("03") == card and "canary-7f3a9" not in written
    assert card["notebook"] == "03_set_up_lora" and card["parameters"] == {"profile": "laptop"}
    assert card["profile"]["model"] == "packaged" and card["profile"]["lora_targets"][0] == "q_proj"
    assert card["files"] == ["outputs/plots/loss.png", "/elsewhere/x"] and card["facts"] == {"loss": 3.19}
    assert card["versions"]["torch"].startswith("2.") and set(card["versions"]) == set(base.PACKAGES)
    assert card["device"]["cores"] >= 1 and card["seconds"] >= 0 and card["peak_memory_gib"] > 0
    assert card["git_revision"] and card["written"]
    printed = capsys.readouterr().out
    assert "validation loss 3.37 -> 3.19" in printed and "outputs/run_cards/03.json" in printed
    assert "Profile laptop" in printed  # nobody takes a laptop figure for an 8B one


def test_a_damaged_card_names_the_notebook_to_run(run):
    """An AttributeError on what a full disk or another program has left."""
    for content in ("\x00", '{"profile": null}'):
        (run.workspace.run_cards / "01.json").write_text(content)
        with pytest.raises(WorkshopError, match=r"01_explore_fiqa has not been run in .*: run it first\."):
            run.needs("01")


def test_needs_names_what_does_not_fit(run, tmp_path):
    """An adapter of one model loaded into another, an answer judged under another prompt."""
    run.finish("done")
    for key, value in (("model", "/other"), ("prompt", "chat"), ("training", "reference")):
        other = Run("04", {}, load_profile("laptop", f"{{{key}: {value}}}"), Workspace(str(tmp_path)))
        with pytest.raises(WorkshopError, match=rf"was run with {key} = .* this one has '{value}'"):
            other.needs("03")


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
    (tmp_path / "outputs/run_cards/02.json").write_text('{"profile": null}')
    assert started("03", tmp_path).profile.max_steps == 4


@pytest.mark.parametrize("live", [True, False])
def test_interactive_is_a_person_at_a_live_frontend(live):
    """VS Code sets no JPY_SESSION_NAME and showed nothing; a program that inherits it wrote widget state."""
    from jupyter_client.manager import start_new_kernel

    environment = os.environ | ({} if live else {"JPY_SESSION_NAME": "/x.ipynb"})
    manager, client = start_new_kernel(kernel_name="python3", env=environment)
    try:
        code = "from fiqa_helpers.base import is_interactive\nprint(is_interactive())"
        seen = []
        client.execute_interactive(code, allow_stdin=live, output_hook=seen.append, timeout=120)
        said = "".join(message["content"].get("text", "") for message in seen)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert said.strip() == str(live)


def test_a_lock_may_be_taken_by_a_second_user(tmp_path):
    """Permission denied on the lock of a shared folder. (Two processes: tests/test_training.py.)"""
    with base.locked(tmp_path / "a.lock"):
        assert (tmp_path / "a.lock").stat().st_mode & 0o777 == 0o666
