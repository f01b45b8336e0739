"""Faults injected for real into whole runs: many kills, full or read-only disks, SIGTERM, dead kernels."""

import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from training_child import Trainings, result

from fiqa_helpers.machinery import checkpoints

pytestmark = pytest.mark.slow

CHAIN = (
    "{max_steps: 40, epochs: 20, train_rows: 13, batch_size: 2, tokens_per_batch: 256, lora_dropout: 0.05}"
)
SHORT = "{max_steps: 8, epochs: 2, train_rows: 9, batch_size: 2, tokens_per_batch: 256, lora_dropout: 0.05}"
KILLS = 20


@pytest.fixture(scope="module")
def trainings():
    with Trainings() as server:
        yield server


def damaged(run: Path) -> dict[int, str]:
    """Step -> what is wrong, for each checkpoint of the run that is not complete."""
    found = {
        step: checkpoints.fault(checkpoints.checkpoint_folder(run, step))
        for step in checkpoints.steps_of(run)
    }
    return {step: problem for step, problem in found.items() if problem}


def test_chain_of_kills_ends_bitwise_like_an_unkilled_run(trainings, tmp_path):
    """Killed 20 times at random moments, resumed each time: one lost random number would change the adapter.

    A third of the kills come at any time; the others are aimed at a phase one to three steps after the last
    checkpoint, and come a random moment after it began. A kill counts as inside a checkpoint write when it
    left an incomplete checkpoint behind.
    """
    started = time.monotonic()
    trainings.run(tmp_path / "unkilled", overrides=CHAIN)
    life = (time.monotonic() - started) / 6
    moments, hits, torn = random.Random(2026), Counter(), []
    aims = [(None, life), ("saving", 0.02), ("evaluating", 0.2)]
    aims += [(None, life), ("sampling", 0.1), ("training", 0.3)]
    workdir, run = tmp_path / "killed", tmp_path / "killed" / "checkpoints" / "run"
    for number in range(KILLS):
        phase, longest = aims[number % len(aims)]
        before, newest = damaged(run), max([0, *set(checkpoints.steps_of(run)) - set(damaged(run))])
        step = newest + moments.randint(1, 3)
        hit = trainings.kill_in(workdir, phase, moments.uniform(0, longest), step, overrides=CHAIN)
        assert hit, f"the run ended before kill {number + 1}: it needs more steps"
        hits[hit] += 1
        torn += [step for step in damaged(run) if step not in before and hit == "saving"]
        print(number + 1, phase, hit, checkpoints.steps_of(run), damaged(run))
    said = trainings.run(workdir, overrides=CHAIN)
    assert result(workdir) == result(tmp_path / "unkilled")
    assert len(torn) >= 3, torn
    assert min(hits[phase] for phase in ("training", "evaluating", "sampling", "saving")) >= 2, hits
    assert "resuming from checkpoint-" in said and max(checkpoints.steps_of(run)) == 40


@pytest.mark.parametrize("size", ["200k", "340k", "380k", "420k", "500k"])
def test_full_disk_at_any_file_of_a_checkpoint(trainings, tmp_path, small_disk, size):
    """safetensors, torch, json and tokenizers fail in words of their own: a sentence, and a resume."""
    small = small_disk(f"size={size}")
    trainings.start(small, overrides=SHORT)
    assert trainings.wait() == 1
    said, run = trainings.log.read_text().splitlines(), small / "checkpoints" / "run"
    assert said[-1].startswith(f"WorkshopError: The disk of {run.parent}"), said[-1]
    assert "is full: free some space" in said[-1] and not any("Traceback" in line for line in said)
    assert damaged(run) or (run.parent / ".final_model.partial").is_dir()
    last = checkpoints.newest_complete(run)
    subprocess.run(["mount", "-o", "remount,size=50m", str(small)], check=True)
    assert f"resuming from {last and last.name}" in trainings.run(small, overrides=SHORT)
    trainings.run(tmp_path / "unkilled", overrides=SHORT)
    assert result(small) == result(tmp_path / "unkilled")


OPEN = """
import sys
from fiqa_helpers.machinery import checkpoints
from fiqa_helpers.base import Workspace
from fiqa_helpers.profiles import load_profile
checkpoints.open_run(Workspace(sys.argv[1]), load_profile("tiny"), {"train": "a", "validation": "b"})
"""


@pytest.mark.parametrize("before", [True, False])
def test_read_only_folder(small_disk, before):
    """A read-only mount (chmod protects nothing from root): one sentence before anything is computed."""
    folder, command = small_disk("size=1m"), [sys.executable, "-c", OPEN]
    if before:  # a run is there already
        subprocess.run([*command, str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "WorkshopError: Cannot write to" in last, done.stderr
    assert "set the parameter workdir to" in last


# -- the notebooks, executed by papermill


def run(workdir: Path, only: str) -> subprocess.Popen:
    """`python -m fiqa_helpers run`, begun."""
    slow = ["--profile", "tiny", "--overrides", "{max_steps: 40, epochs: 20, eval_steps: 2}"]
    command = ["-m", "fiqa_helpers", "run", *slow, "--workdir", str(workdir), "--only", only]
    return subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and what it said; what it printed went where this test prints."""
    said = process.communicate(timeout=600)[1]
    return process.returncode, said


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A workdir in which the notebooks before 04 have been executed."""
    workdir = tmp_path_factory.mktemp("prepared")
    code, said = ended(run(workdir, "00-03"))
    assert code == 0, said
    return workdir


@pytest.mark.notebooks
def test_full_disk_under_papermill(prepared, small_disk):
    """papermill saves the notebook after each cell: on a full disk it ends in a traceback of its own."""
    small = small_disk("size=60m")
    for folder in ("data", "outputs/run_cards"):
        shutil.copytree(prepared / folder, small / folder)
    used = shutil.disk_usage(small).used // 1024
    subprocess.run(["mount", "-o", f"remount,size={used + 20}k", str(small)], check=True)
    code, said = ended(run(small, "04"))
    assert code == 1 and "Traceback" not in said, said
    assert "is full: free some space" in said and "run the same command again" in said
    subprocess.run(["mount", "-o", "remount,size=60m", str(small)], check=True)
    code, said = ended(run(small, "04"))
    assert code == 0 and checkpoints.fault(small / "checkpoints" / "final_model") is None, said


@pytest.mark.notebooks
@pytest.mark.parametrize("fault", ["kernel killed", "SIGTERM to papermill", "SIGTERM to all"])
def test_notebook_04_goes_on_after(prepared, tmp_path, fault):
    """Under papermill: the failure is not silent, and the same command again resumes and finishes."""
    workdir = tmp_path / "work"
    shutil.copytree(prepared, workdir)
    checkpoint = workdir / "checkpoints" / "run" / "checkpoint-4"
    first = run(workdir, "04")
    while not (checkpoint / checkpoints.MANIFEST).is_file():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    (kernel,) = psutil.Process(first.pid).children()
    if fault == "kernel killed":
        kernel.kill()
    else:
        first.terminate()
        if fault == "SIGTERM to all":
            kernel.terminate()
    code, said = ended(first)
    assert code == 1
    if fault == "kernel killed":
        assert "its kernel died" in said
    else:
        assert "04_train stopped: Training was told to stop (SIGTERM) after step" in said
        assert "run this again with the same parameters; the next run goes on from checkpoint-" in said
        assert "Traceback" not in said
    before = max(checkpoints.steps_of(checkpoint.parent))
    code, said = ended(run(workdir, "04"))
    assert code == 0, said
    executed = (workdir / "outputs" / "executed" / "04_train.ipynb").read_text()
    assert before >= 4 and checkpoints.fault(workdir / "checkpoints" / "final_model") is None
    assert f"resumed at step {before}" in executed and "finished 40 steps" in executed
