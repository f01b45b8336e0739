"""The model card: everything from the run card, no metric without floor and interval, nothing invented."""

from dataclasses import asdict, replace

import pytest
from huggingface_hub import ModelCard

from fiqa_helpers.machinery import ship
from fiqa_helpers.metrics import compare
from fiqa_helpers.profiles import PROFILES
from fiqa_helpers.rows import SYSTEM_TEXT


@pytest.fixture
def written(tmp_path):
    """written(profile, evaluation, merged, **changes): the card of a run, as huggingface_hub reads it."""

    def write(profile=PROFILES["laptop"], evaluation=None, merged=False, **changes) -> ModelCard:
        card = {
            "profile": asdict(profile),
            "outcome": "finished 24 steps",
            "finished": True,
            "validation_loss": {"before": 3.372, "best": 3.188},
            "versions": {"torch": "2.14.1", "triton": "not installed"},
            "git_revision": "abc123",
        }
        return ModelCard.load(ship.write_model_card(tmp_path, card | changes, evaluation, merged))

    return write


@pytest.fixture
def evaluation():
    """Notebook 06's summary, from the code that makes it."""
    base, tuned = [0.4, 0.5, 0.3, 0.45, 0.2], [0.5, 0.5, 0.35, 0.4, 0.3]
    return {
        "rows": 5,
        "test_rows": 100,
        "decoding": {"no_repeat_ngram_size": 4},
        "comparisons": {"similarity": asdict(compare("similarity", base, tuned))},
        "floors": {"echo the question": {"similarity": 0.527}, "another answer": {"similarity": 0.111}},
    }


def test_base_model_licence_and_data(written):
    """A wrong licence or base model is a false statement about somebody's work; a path is nobody's model."""
    card = written()
    assert (card.data.license, card.data.base_model) == ("apache-2.0", ship.SMOLLM2)
    assert (card.data.base_model_relation, card.data.library_name) == ("adapter", "peft")
    assert "test split" in card.text and "CC-BY-SA-4.0" in card.text
    card = written(PROFILES["gpu80"], merged=True)
    assert (card.data.license, card.data.base_model_relation) == ("other", "merge")
    for words in ("NVIDIA Open Model License", "Llama 3.1 Community License", "Built with Llama"):
        assert words in card.text
    assert written(replace(PROFILES["laptop"], model="/models/mine")).data.base_model is None


def test_settings_and_prompt(written):
    """Whoever loads the adapter needs the exact prompt; whoever repeats the run needs the settings."""
    text = written().text
    facts = ("rank 8", "alpha 32", "0.004", "8 rows a step", "320 tokens", "3.372 -> 3.188", "torch 2.14.1")
    for fact in facts:
        assert fact in text, fact
    assert f"{SYSTEM_TEXT}\n\nQuestion: {{question}}\n\nAnswer:\n```" in text
    assert "cut to 100 words on the question" in text
    text = written(finished=False, outcome="stopped at step 3 of 10 (Stop button)").text
    assert "The training did not finish: stopped at step 3 of 10" in text


def test_no_metric_without_floor_and_interval(written, evaluation):
    """A bare 0.40 would be read as 40 %; without an evaluation or with holes nothing is made up."""
    text = written(evaluation=evaluation).text
    rows = [row for row in text.splitlines() if "| base |" in row or "| semantic similarity" in row]
    head, line = ([cell.strip() for cell in row.split("|")] for row in rows)
    cells, found = dict(zip(head, line, strict=True)), evaluation["comparisons"]["similarity"]
    assert [cells["base"], cells["tuned"]] == [f"{found['base']:.3f}", f"{found['tuned']:.3f}"]
    assert cells["95 % interval"] == f"{found['low']:+.3f} to {found['high']:+.3f}"
    assert [cells["echo the question"], cells["another answer"]] == ["0.527", "0.111"]
    for words in ("5 of 100 test rows", "few rows", "no 4 tokens occur twice"):
        assert words in text
    assert "has not been evaluated" in written().text
    del evaluation["floors"]
    with pytest.raises(KeyError):
        written(evaluation=evaluation)
