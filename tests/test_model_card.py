"""The model card: everything from the run card, no metric without floor and interval, nothing invented."""

from dataclasses import asdict, replace

import pytest
import yaml

from fiqa_helpers.evaluate import Decoding
from fiqa_helpers.machinery import ship
from fiqa_helpers.metrics import compare
from fiqa_helpers.profiles import PROFILES, load_profile


def run_card(**changes) -> dict:
    """What notebook 04 writes beside an adapter."""
    card = {
        "profile": asdict(PROFILES["laptop"]),
        "outcome": "finished 24 steps",
        "finished": True,
        "validation_loss": {"before": 3.372, "best": 3.188},
        "versions": {"torch": "2.14.1", "triton": "not installed"},
        "git_revision": "abc123",
    }
    return card | changes


@pytest.fixture
def evaluation():
    """Notebook 06's summary, from the code that makes it."""
    base, tuned = [0.4, 0.5, 0.3, 0.45, 0.2], [0.5, 0.5, 0.35, 0.4, 0.3]
    return {
        "rows": 5,
        "test_rows": 100,
        "comparisons": {"similarity": asdict(compare("similarity", base, tuned))},
        "floors": {"echo the question": {"similarity": 0.527}, "another answer": {"similarity": 0.111}},
    }


def written(tmp_path, *arguments, **keywords) -> tuple[dict, str]:
    """Front matter and text of a card."""
    text = ship.write_model_card(tmp_path, *arguments, **keywords).read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_what_the_hub_reads(tmp_path):
    """A wrong licence or base model in the front matter is a false statement about somebody's work."""
    front, body = written(tmp_path, run_card())
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert front["base_model_relation"] == "adapter"
    assert front["library_name"] == "peft"
    assert front["datasets"] == ["explodinggradients/fiqa"]
    assert "test split" in body, "trained on the packaged rows, which are the hub's test split"
    assert "CC-BY-SA-4.0" in body
    front, body = written(tmp_path, run_card(profile=asdict(PROFILES["gpu80"])), merged=True)
    assert front["license"] == "other"
    assert front["base_model_relation"] == "merge"
    assert "NVIDIA Open Model License" in body
    assert "Llama 3.1 Community License" in body
    assert "Built with Llama" in body


def test_hub_library_takes_it(tmp_path):
    """huggingface_hub parses the card as the hub does."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(ship.write_model_card(tmp_path, run_card()))
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "text-generation"


def test_settings_and_prompt(tmp_path):
    """Whoever loads the adapter needs the exact prompt; whoever repeats the run needs the settings."""
    from fiqa_helpers.rows import SYSTEM_TEXT

    _, body = written(tmp_path, run_card())
    for fact in (
        "rank 8",
        "alpha 32",
        "0.004",
        "8 rows a step",
        "320 tokens",
        "3.372 -> 3.188",
        "torch 2.14.1",
    ):
        assert fact in body, fact
    assert f"{SYSTEM_TEXT}\n\nQuestion: {{question}}\n\nAnswer:\n```" in body
    assert "not installed" not in body


def test_no_metric_without_floor_and_interval(tmp_path, evaluation):
    """A bare 0.40 would be read as 40 %."""
    _, body = written(tmp_path, run_card(), evaluation)
    line = next(line for line in body.splitlines() if line.startswith("| semantic similarity"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    found = evaluation["comparisons"]["similarity"]
    assert cells[2:4] == [f"{found['base']:.3f}", f"{found['tuned']:.3f}"]
    assert cells[5] == f"{found['low']:+.3f} to {found['high']:+.3f}"
    assert cells[6:] == ["0.527", "0.111"]
    assert "5 of 100 test rows" in body
    assert "few rows" in body


def test_what_the_figures_depend_on_is_said(tmp_path, evaluation):
    """Chosen training answers and a decoding of its own: without them nobody gets these figures again."""
    profile = load_profile("laptop", "{training: topical}")
    evaluation["decoding"] = asdict(Decoding(256))
    _, body = written(tmp_path, run_card(profile=asdict(profile)), evaluation)
    assert "| training answers | cut to 100 words on the question |" in body
    assert "no 4 tokens occur twice" in body
    old = {name: value for name, value in asdict(profile).items() if not name.startswith("topical")}
    _, body = written(tmp_path, run_card(profile=old))
    assert "| training answers | whole |" in body


def test_without_an_evaluation(tmp_path):
    """Then the card must say so."""
    _, body = written(tmp_path, run_card(), None)
    assert "has not been evaluated" in body


def test_a_stopped_run_is_no_finished_one(tmp_path):
    """An adapter from step 3 of 10 says so."""
    _, body = written(tmp_path, run_card(finished=False, outcome="stopped at step 3 of 10 (Stop button)"))
    assert "The training did not finish: stopped at step 3 of 10" in body


def test_a_folder_as_base_model(tmp_path):
    """A path of somebody's machine is no base model on the hub."""
    profile = replace(PROFILES["laptop"], model="/models/mine")
    front, _ = written(tmp_path, run_card(profile=asdict(profile)))
    assert "base_model" not in front


def test_a_card_with_holes_is_not_written(tmp_path, evaluation):
    """Silently filled, it would state things that nobody did; without floors it would leave metrics bare."""
    card = run_card()
    del card["versions"], evaluation["floors"]
    for arguments in ((card,), (run_card(), evaluation)):
        with pytest.raises(KeyError):
            ship.write_model_card(tmp_path, *arguments)
    assert not (tmp_path / "README.md").exists()
