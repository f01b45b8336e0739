"""Every notebook, executed on the laptop profile: real model, real rows; then what it left is examined.

Once shortened (`make test`), once whole (the slow tier). papermill injects the parameters and nbmake
executes: both tools see each notebook, at the cost of one run.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from fiqa_helpers.profiles import PROFILES

pytestmark = [pytest.mark.notebooks, pytest.mark.timeout(3000)]

PROJECT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("0?_*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


def read(executed: Path, name: str) -> nbformat.NotebookNode:
    return nbformat.read(executed / f"{name}.ipynb", as_version=4)


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def card(executed: Path, number: str) -> dict:
    return json.loads((executed / "outputs" / "run_cards" / f"{number}.json").read_text())


def is_short(executed: Path) -> bool:
    """Whether this is the shortened run (see `executed` in conftest.py)."""
    return card(executed, "04")["profile"]["max_steps"] < PROFILES["laptop"].max_steps


@pytest.mark.parametrize("name", NAMES)
def test_runs_to_its_end(executed, name):
    """A cell that fails, or is never reached because an earlier one hung, is an error a reader would meet."""
    notebook = read(executed, name)
    errors = [output.evalue for output in outputs(notebook) if output.output_type == "error"]
    assert not errors, errors
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    not_run = [cell.source for cell in code if cell.execution_count is None]
    assert not not_run, f"{(executed / 'nbmake.log').read_text()[-3000:]}\nnot run: {not_run[:1]}"


@pytest.mark.parametrize("name", NAMES)
def test_leaves_a_clean_file_and_its_run_card(executed, name):
    """Widget state, library warnings or megabytes in the file; a card that the next notebook can't check."""
    notebook = read(executed, name)
    assert "widgets" not in notebook.metadata
    assert not [o for o in outputs(notebook) if any("widget" in mime for mime in o.get("data", {}))]
    noise = [o.text for o in outputs(notebook) if o.output_type == "stream" and o.name == "stderr"]
    assert not noise, f"a reader can do nothing about: {noise}"
    assert (executed / f"{name}.ipynb").stat().st_size < 1_000_000
    written = card(executed, name[:2])
    assert written["notebook"] == name
    assert written["profile"]["name"] == "laptop"
    assert written["seconds"] > 0 and written["peak_memory_gib"] > 0 and written["figure"]
    assert written["versions"]["transformers"] == "5.18.0"
    assert not [file for file in written["files"] if not (executed / file).exists()]


@pytest.mark.parametrize("name", NAMES)
def test_exercises_open_and_solved(executed, name):
    """An open exercise must not stop a run, and its solution must be right on what the notebook left."""
    said = [
        # one print may arrive in two outputs
        (cell["id"].endswith("-solved"), " ".join("".join(output.text for output in cell.outputs).split()))
        for cell in read(executed, name).cells
        if cell.cell_type == "code" and "check" in cell.metadata.get("tags", [])
    ]
    print(*[text for _, text in said], sep="\n")
    assert len(said) >= 4
    for solved, text in said:
        assert ("✓ right" if solved else "not solved yet") in text, text


def test_the_laptop_run_fits_its_time_and_memory(executed):
    """A laptop of two cores and 8 GB must do 00 to 06 in a coffee break; a slow cell is found here."""
    if is_short(executed):
        pytest.skip("a figure of the whole run")
    cards = {name[:2]: card(executed, name[:2]) for name in NAMES if name < "07"}
    minutes = sum(written["seconds"] for written in cards.values()) / 60
    print({number: round(written["seconds"]) for number, written in cards.items()}, f"{minutes:.1f} min")
    assert minutes <= 12
    assert max(written["peak_memory_gib"] for written in cards.values()) < 6


def test_training_lowers_the_validation_loss(executed):
    """A wrong mask, a frozen adapter or a schedule of zeros all show as a loss that stays where it was."""
    facts = card(executed, "04")["facts"]
    least = 0.02 if is_short(executed) else 0.10
    assert facts["validation_loss_before"] - facts["validation_loss_best"] >= least
    assert facts["samples"] >= 3  # the untuned model's and at least two on the way


def test_training_shows_one_picture_and_one_text(executed):
    """The live cell must not leave a growing log or twenty pictures in a saved notebook."""
    cells = read(executed, "04_train").cells
    (cell,) = [cell for cell in cells if cell.cell_type == "code" and "panel.recall(" in cell.source]
    pictures = [o for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 1 and len(cell.outputs) == 2
    assert len(json.dumps(cell.outputs)) <= 100_000


def test_the_saved_adapter_loads_on_plain_transformers(executed, smollm2):
    """What is shared must work without this project: PEFT on a plain transformers model, equal logits."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fiqa_helpers import model, profiles

    folder = executed / "checkpoints" / "final_model"
    ids = AutoTokenizer.from_pretrained(folder)("Question: Are bonds safe?\n\nAnswer:", return_tensors="pt")
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.no_grad():
        base = plain(**ids).logits
        there = PeftModel.from_pretrained(plain, folder).eval()(**ids).logits
        ours = PeftModel.from_pretrained(model.load_base(profiles.load_profile("laptop")), folder).eval()
        here = ours(**ids).logits
    assert torch.equal(there, here)
    assert (there - base).abs().max() > 0.01  # and the adapter does something


def test_a_finished_run_is_not_trained_again(executed, tmp_path):
    """Run All a second time must say that the run is finished, and leave the good adapter as it is."""
    adapter = executed / "checkpoints" / "final_model" / "adapter_model.safetensors"
    before = (adapter.read_bytes(), adapter.stat().st_mtime_ns)
    again, own = tmp_path / "04_again.ipynb", executed / "outputs" / "run_cards" / "04.json"
    kept = shutil.copy(own, tmp_path / "04.json")
    source = PROJECT / "notebooks" / "04_train.ipynb"
    command = [sys.executable, "-m", "papermill", str(source), str(again), "--no-progress-bar"]
    for name, value in card(executed, "04")["parameters"].items():
        command += ["-p", name, value] if name in ("profile", "workdir", "overrides") else []
    run = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert (adapter.read_bytes(), adapter.stat().st_mtime_ns) == before
    texts = [output.get("data", {}).get("text/plain", "") for output in outputs(nbformat.read(again, 4))]
    assert any("nothing was trained again" in text for text in texts)
    shutil.copy(kept, own)
