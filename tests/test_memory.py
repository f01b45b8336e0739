"""The memory ledger: counted as the model is counted, and advice that a person can follow."""

import re
from dataclasses import replace

import pytest

from fiqa_helpers.machinery import machine
from fiqa_helpers.profiles import PROFILES

CONFIG = machine.nemotron_config()
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("targets", [PROFILES["gpu80"].lora_targets, ALL_LINEAR, ("o_proj",)])
def test_parameters_agree_with_the_meta_device(targets):
    """Arithmetic that drifts from the architecture predicts another model's memory."""
    from fiqa_helpers import model

    profile = replace(PROFILES["gpu80"], lora_targets=targets)
    trainable, base = model.count_parameters(model.reference_config(), model.lora_config(profile))
    assert machine.base_parameters(CONFIG) == base == 8_030_261_248
    assert machine.lora_parameters(CONFIG, profile.lora_rank, targets) == trainable


def test_tied_embeddings_count_once(smollm2):
    """SmolLM2's output layer is its embedding."""
    assert (
        machine.base_parameters(machine.config_of(replace(PROFILES["gpu80"], model=str(smollm2))))
        == 134_515_008
    )


def test_what_memory_grows_with():
    """More tokens and no checkpointing cost activations only; the sum is the sum."""
    whole = machine.predict_memory(PROFILES["gpu80"], CONFIG)
    half = machine.predict_memory(PROFILES["gpu80"], CONFIG, 4096)
    checkpointed = machine.predict_memory(PROFILES["gpu24"], CONFIG)
    assert whole.activations == pytest.approx(2 * half.activations)
    assert whole.weights == half.weights == checkpointed.weights == 2 * 8_030_261_248
    assert checkpointed.activations < whole.activations / 8
    lines = whole.gib()
    assert lines.pop("total") == pytest.approx(sum(lines.values()))


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (79, None),
        (30, "set gradient_checkpointing: true in overrides"),
        (18, r"set gradient_checkpointing: true and tokens_per_batch: \d+ in overrides"),
        (8, "use a larger card, a smaller model or profile laptop"),
    ],
)
def test_advice_names_what_to_change(free, said):
    """'Out of memory' alone sends people to a forum."""
    advice = machine.memory_advice(PROFILES["gpu80"], CONFIG, free * machine.GIB)
    assert (advice == "") if said is None else re.search(said, advice), advice


@pytest.mark.parametrize("free", range(16, 42))
def test_advice_that_is_followed_fits(free):
    """Advice that does not fit either."""
    advice = machine.memory_advice(PROFILES["gpu80"], CONFIG, free * machine.GIB)
    changes = {}
    if "gradient_checkpointing: true" in advice:
        changes["gradient_checkpointing"] = True
    if budget := re.search(r"tokens_per_batch: (\d+)", advice):
        changes["tokens_per_batch"] = int(budget[1])
    if changes:
        followed = replace(PROFILES["gpu80"], **changes)
        assert machine.predict_memory(followed, CONFIG).total <= free * machine.GIB
        assert followed.tokens_per_batch >= followed.max_length
    else:
        assert free < 18 or advice == ""
