"""Every notebook, executed on the laptop profile (`executed` in conftest.py), and what it left behind."""

import json
import shutil
from pathlib import Path

import nbformat
import papermill
import pytest

from fiqa_helpers.profiles import PROFILES

pytestmark = [pytest.mark.notebooks, pytest.mark.timeout(3000)]

PROJECT = Path(__file__).resolve().parent.parent
NAMES = sorted(path.stem for path in (PROJECT / "notebooks").glob("0?_*.ipynb"))


def read(executed: Path, name: str) -> nbformat.NotebookNode:
    return nbformat.read(executed / f"{name}.ipynb", as_version=4)


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def card(executed: Path, number: str) -> dict:
    return json.loads((executed / "outputs" / "run_cards" / f"{number}.json").read_text())


def is_short(executed: Path) -> bool:
    return card(executed, "04")["profile"]["max_steps"] < PROFILES["laptop"].max_steps


@pytest.mark.parametrize("name", NAMES)
def test_runs_to_its_end(executed, name):
    """A cell that fails or is never reached; an open exercise that stops a run, or a wrong solution."""
    notebook = read(executed, name)
    errors = [output.evalue for output in outputs(notebook) if output.output_type == "error"]
    assert not errors, errors
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    not_run = [cell.source for cell in code if cell.execution_count is None]
    assert not not_run, f"{(executed / 'nbmake.log').read_text()[-3000:]}\nnot run: {not_run[:1]}"
    checks = [cell for cell in code if "check" in cell.metadata.get("tags", [])]
    assert len(checks) >= 4
    for cell in checks:  # one print may arrive in two outputs
        said = " ".join("".join(output.text for output in cell.outputs).split())
        assert ("✓ right" if cell["id"].endswith("-solved") else "not solved yet") in said, said


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
    assert (written["notebook"], written["profile"]["name"]) == (name, "laptop")
    assert written["seconds"] > 0 and written["peak_memory_gib"] > 0 and written["figure"]
    assert written["versions"]["transformers"] == "5.18.0"
    assert not [file for file in written["files"] if not (executed / file).exists()]


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


@pytest.mark.parametrize("executed", ["short"], indirect=True)  # after the whole run it would say the same
def test_a_finished_run_is_not_trained_again(executed, tmp_path):
    """Run All a second time must say that the run is finished, and leave the good adapter as it is."""
    adapter = executed / "checkpoints" / "final_model" / "adapter_model.safetensors"
    before = (adapter.read_bytes(), adapter.stat().st_mtime_ns)
    own = executed / "outputs" / "run_cards" / "04.json"
    kept = shutil.copy(own, tmp_path / "04.json")
    given = card(executed, "04")["parameters"]
    values = {name: given[name] for name in ("profile", "workdir", "overrides") if name in given}
    source, again = PROJECT / "notebooks" / "04_train.ipynb", tmp_path / "04_again.ipynb"
    notebook = papermill.execute_notebook(source, again, values, cwd=PROJECT, progress_bar=False)
    assert (adapter.read_bytes(), adapter.stat().st_mtime_ns) == before
    texts = [output.get("data", {}).get("text/plain", "") for output in outputs(notebook)]
    assert any("nothing was trained again" in text for text in texts)
    shutil.copy(kept, own)
