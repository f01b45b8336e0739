"""Profiles and overrides: what is impossible is refused in one sentence that names it and the remedy."""

import json
from dataclasses import asdict, replace

import pytest

from fiqa_helpers.base import WorkshopError
from fiqa_helpers.machinery import machine
from fiqa_helpers.machinery.machine import NEMOTRON
from fiqa_helpers.profiles import (
    PROFILES,
    REFERENCE,
    SETTINGS,
    Profile,
    choose_profile,
    differences,
    from_card,
    load_profile,
)

LAPTOP = PROFILES["laptop"]


def card(**changes) -> machine.Gpu:
    values = {"name": "NVIDIA Test", "total_gib": 79.0, "free_gib": 78.0}
    return machine.Gpu(**values | changes)


def test_the_reference_run_is_the_recipe_in_numbers():
    """A constant of the reference recipe changed by accident: nothing could be compared with it any more."""
    assert (REFERENCE.lora_rank, REFERENCE.lora_alpha, REFERENCE.lora_dropout) == (8, 32, 0.05)
    assert REFERENCE.lora_targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (REFERENCE.learning_rate, REFERENCE.warmup_ratio, REFERENCE.epochs) == (2e-4, 0.1, 3)
    assert (REFERENCE.batch_size, REFERENCE.max_length, REFERENCE.prompt) == (16, 2048, "plain")
    assert (REFERENCE.model, REFERENCE.dtype) == (NEMOTRON, "bfloat16")
    for name in ("gpu24", "gpu80"):
        assert {row["setting"] for row in differences(PROFILES[name])} <= {"layout", "gradient_checkpointing"}
    mine = Profile(name="mine", title="x", seed=7, max_steps=3)
    assert [tuple(row.values()) for row in differences(mine)] == [("max_steps", -1, 3), ("seed", 42, 7)]


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_passes_its_own_checks(name, monkeypatch):
    """A profile whose own values overrides refuse or a run card loses, or a banner that hides what ran."""
    profile = PROFILES[name]
    monkeypatch.setattr(machine, "gpu", lambda: card())
    assert load_profile(name, json.dumps({key: asdict(profile)[key] for key in SETTINGS})) == profile
    assert from_card(json.loads(json.dumps(asdict(profile)))) == profile
    for part in (name, profile.dtype, profile.device, "FiQA"):
        assert part in profile.banner()


def test_cards_of_older_versions_are_still_read():
    """Settings that are gone since, or came later: a good run that nobody can evaluate any more."""
    old = {"name": "laptop", "model": "packaged", "training": "topical", "longest_answer": 0}
    read = from_card(old | {"topical_share": 0.5, "lora_targets": ["q_proj"], "learning_rate": 1})
    assert (read.model, read.training, read.lora_targets) == ("packaged", "topical", ("q_proj",))
    assert read.batch_size == REFERENCE.batch_size and read.topical_words == 0


@pytest.mark.parametrize(
    ("gpu", "name", "reason"),
    [
        (None, "laptop", "no NVIDIA GPU was found"),
        (card(), "gpu80", "78 GiB free"),
        (card(free_gib=23.2), "gpu24", "23 GiB free"),
        (card(free_gib=20.9), "laptop", "21 GiB free, 21 are needed for gpu24"),
        (card(problem="it does not compute in bf16"), "laptop", "does not compute in bf16"),
    ],
)
def test_auto_takes_the_largest_that_fits_and_says_why(monkeypatch, capsys, gpu, name, reason):
    """A GPU silently passed over, or a profile that is then refused: a dead end."""
    monkeypatch.setattr(machine, "gpu", lambda: gpu)
    assert choose_profile()[0] == load_profile("auto").name == name
    said = capsys.readouterr().out
    assert said.startswith(f"Profile auto chose {name}: ") and reason in said


@pytest.mark.parametrize(
    ("name", "overrides", "gpu", "sentence"),
    [
        ("laptop", "{device: cuda}", None, "run here: no NVIDIA GPU was found. Profile laptop can"),
        ("gpu80", "", card(problem="its driver 470 is too old"), "driver 470 is too old"),
        ("gpu80", "", card(free_gib=18.0), "needs about 41 GiB and 18 are free: set .*tokens_per_batch"),
        ("gpu24", "", card(free_gib=12.0), "12 are free, less than any setting needs"),
    ],
)
def test_a_profile_that_cannot_run_is_refused(monkeypatch, name, overrides, gpu, sentence):
    """A silent fall-back to the CPU: an 8B model on two cores, and hours until someone notices."""
    monkeypatch.setattr(machine, "gpu", lambda: gpu)
    with pytest.raises(WorkshopError, match=sentence):
        load_profile(name, overrides)
    if gpu and not gpu.problem:  # a model of one's own needs less: its memory is not our guess to make
        assert load_profile(name, "{model: packaged}").model == "packaged"


def test_overrides_replace_values_in_their_types():
    """1e-4 is text in YAML 1.1, and an integer where a float belongs breaks a comparison later."""
    text = "{max_steps: 20, learning_rate: 1e-4, lora_targets: [q_proj, v_proj], epochs: 2, warmup_ratio: 0}"
    profile = load_profile("laptop", text)
    changes = {"max_steps": 20, "learning_rate": 1e-4, "lora_targets": ("q_proj", "v_proj"), "epochs": 2}
    assert profile == replace(LAPTOP, **changes, warmup_ratio=0.0)
    assert type(profile.warmup_ratio) is float
    for nothing in ("", "   ", "{}", "# a comment", "~"):
        assert load_profile("laptop", nothing) == LAPTOP


def test_training_and_topical_words_cannot_disagree():
    """A card that says reference beside answers that were cut, or the other way round."""
    whole = load_profile("laptop", "{training: reference}")
    assert whole == replace(LAPTOP, training="reference", topical_words=0)
    assert load_profile("laptop", "{topical_words: 0}") == whole
    assert load_profile("tiny", "{topical_words: 60}").training == "topical"
    with pytest.raises(WorkshopError, match="training is reference and topical_words 60: set one of the two"):
        load_profile("laptop", "{training: reference, topical_words: 60}")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{max_step: 20}", "'max_step', which no profile has: did you mean max_steps"),
        ("{name: mine}", "'name', which no profile has: known are model"),
        ("{max_steps: 0}", "max_steps is 0: Input should be -1 or .* greater than or equal to 1"),
        ("{learning_rate: .nan}", "learning_rate is nan"),
        ("{max_steps: 20.0}", "max_steps is 20.0: .* valid integer"),
        ("{gradient_checkpointing: 1}", "gradient_checkpointing is 1: .* valid boolean"),
        ("{lora_targets: [qproj]}", "lora_targets is 'qproj': Input should be 'q_proj', 'k_proj'"),
        ("{max_length: 2048}", "raise tokens_per_batch or lower max_length"),
        ("max_steps=20", "write a YAML mapping like {max_steps: 20}"),
        ("{seed: 2020-99-99}", "write a YAML mapping"),
        ("{seed: !!python/object/apply:os.system ['true']}", "write a YAML mapping"),
    ],
)
def test_what_cannot_be_an_override(text, sentence):
    """A traceback of YAML, a value taken for another, code that is run."""
    with pytest.raises(WorkshopError, match=sentence) as caught:
        load_profile("laptop", text)
    assert "\n" not in str(caught.value)
