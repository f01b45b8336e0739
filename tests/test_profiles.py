"""Profiles and overrides: what is impossible is refused in one sentence that names it and the remedy."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

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


def card(**changes) -> machine.Gpu:
    values = {"name": "NVIDIA Test", "total_gib": 79.0, "free_gib": 78.0}
    return machine.Gpu(**values | changes)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(machine, "gpu", lambda: None)


# --- profiles


def test_the_reference_run_is_the_recipe_in_numbers():
    """A constant of the reference recipe changed by accident: nothing could be compared with it any more."""
    assert (REFERENCE.lora_rank, REFERENCE.lora_alpha, REFERENCE.lora_dropout) == (8, 32, 0.05)
    assert REFERENCE.lora_targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (REFERENCE.learning_rate, REFERENCE.warmup_ratio, REFERENCE.epochs) == (2e-4, 0.1, 3)
    assert (REFERENCE.batch_size, REFERENCE.max_length, REFERENCE.prompt) == (16, 2048, "plain")
    assert (REFERENCE.model, REFERENCE.dtype) == ("nvidia/Llama-3.1-Nemotron-Nano-8B-v1", "bfloat16")


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_passes_its_own_checks(name):
    """A profile whose values its own overrides would refuse, or that a run card loses."""
    profile = PROFILES[name]
    assert profile.name == name and profile.tokens_per_batch >= profile.max_length
    assert (profile.training == "topical") == (profile.topical_words > 0)
    kept = json.loads(json.dumps(asdict(profile)))
    assert from_card(kept) == profile == Profile(**kept) and hash(profile)


def test_cards_of_older_versions_are_still_read():
    """Settings that are gone since, or came later: a good run that nobody can evaluate any more."""
    old = {"name": "laptop", "model": "packaged", "training": "topical", "longest_answer": 0}
    read = from_card(old | {"topical_share": 0.5, "lora_targets": ["q_proj"], "learning_rate": 1})
    assert (read.model, read.training, read.lora_targets) == ("packaged", "topical", ("q_proj",))
    assert read.batch_size == REFERENCE.batch_size and read.topical_words == 0
    assert type(read.learning_rate) is float


def test_an_impossible_profile_cannot_be_made():
    """A rank of 0 put together in code, and found by a library in the middle of a run."""
    with pytest.raises(ValidationError, match="lora_rank"):
        replace(REFERENCE, lora_rank=0)
    with pytest.raises(AttributeError):
        REFERENCE.lora_rank = 4


@pytest.mark.parametrize("name", ["gpu24", "gpu80"])
def test_gpu_profiles_keep_the_reference_recipe(name):
    """A GPU run of another recipe, called the reference run."""
    allowed = {"layout", "gradient_checkpointing"}
    assert {row["setting"] for row in differences(PROFILES[name])} <= allowed
    assert PROFILES[name].layout == "packed"


@pytest.mark.parametrize("name", ["laptop", "tiny"])
def test_profiles_for_a_cpu_run_on_this_machine(name, capsys):
    """The profile that everybody starts with refused on the machine that it is made for."""
    assert load_profile(name) == PROFILES[name]
    assert capsys.readouterr().out == ""  # only auto has something to explain


def test_differences_name_each_setting_and_no_other():
    """A table beside the reference run that leaves a difference out, or shows what is no setting."""
    rows = differences(replace(REFERENCE, name="mine", title="x", seed=7, max_steps=3))
    assert rows == [
        {"setting": "max_steps", "reference": -1, "here": 3},
        {"setting": "seed", "reference": 42, "here": 7},
    ]
    assert differences(REFERENCE) == []
    laptop = {row["setting"]: (row["reference"], row["here"]) for row in differences(PROFILES["laptop"])}
    assert laptop["model"] == (NEMOTRON, "packaged") and laptop["learning_rate"] == (2e-4, 4e-3)
    for setting in set(SETTINGS) - set(laptop) - {"model_revision"}:
        assert getattr(REFERENCE, setting) == getattr(PROFILES["laptop"], setting)


@pytest.mark.parametrize("name", PROFILES)
def test_the_banner_names_profile_model_precision_device_and_data(name):
    """A laptop's figure taken for one of the 8B model."""
    banner = PROFILES[name].banner()
    model = {"packaged": "SmolLM2-135M", "random": "random weights"}.get(PROFILES[name].model, NEMOTRON)
    for part in (name, model, PROFILES[name].dtype, PROFILES[name].device, "FiQA"):
        assert part in banner
    assert "\n" not in banner


# --- the machine


def test_auto_on_this_machine_is_possible_and_explained(capsys):
    """auto choosing what load_profile then refuses, or choosing without a word."""
    profile = load_profile("auto")
    printed = capsys.readouterr().out
    assert profile.name in PROFILES and printed.startswith(f"Profile auto chose {profile.name}: ")
    assert load_profile(profile.name) == profile
    if machine.gpu() is None:
        assert profile.name == "laptop" and "no NVIDIA GPU was found" in printed


@pytest.mark.parametrize(
    ("gpu", "name", "reason"),
    [
        (None, "laptop", "no NVIDIA GPU was found"),
        (card(), "gpu80", "78 GiB free"),
        (card(free_gib=23.2), "gpu24", "23 GiB free"),
        (card(free_gib=20.9), "laptop", "21 GiB free, 21 are needed for gpu24"),
        (card(free_gib=7.0), "laptop", "7 GiB free, 21 are needed"),
        (card(problem="its driver 470 is too old for torch: update it."), "laptop", "driver 470 is too old"),
    ],
)
def test_auto_takes_the_largest_that_fits_and_says_why(monkeypatch, gpu, name, reason):
    """A GPU silently passed over, or a profile that runs out of memory in its first step."""
    monkeypatch.setattr(machine, "gpu", lambda: gpu)
    chosen, why = choose_profile()
    assert chosen == name and reason in why


def test_auto_on_a_card_without_bf16_is_not_refused_afterwards(monkeypatch):
    """auto choosing a bf16 profile on an old card, which load_profile then refuses: a dead end."""
    monkeypatch.setattr(
        machine, "gpu", lambda: card(name="Tesla V100", problem="it does not compute in bf16")
    )
    assert choose_profile()[0] == "laptop" and "bf16" in choose_profile()[1]
    assert load_profile("auto").name == "laptop"


@pytest.mark.parametrize("name", ["gpu24", "gpu80"])
@pytest.mark.parametrize(
    ("gpu", "sentence"),
    [
        (None, "cannot run here: no NVIDIA GPU was found. Profile laptop can"),
        (
            card(problem="its driver 470 is too old: update the NVIDIA driver."),
            "driver 470 is too old: update",
        ),
        (card(free_gib=12.0), "needs about .* GiB and 12 are free: set tokens_per_batch|12 are free, less"),
    ],
)
def test_a_gpu_profile_that_cannot_run_is_refused(monkeypatch, name, gpu, sentence):
    """A silent fall-back to the CPU: an 8B model on two cores, and hours until someone notices."""
    monkeypatch.setattr(machine, "gpu", lambda: gpu)
    with pytest.raises(WorkshopError, match=sentence):
        load_profile(name)


def test_a_gpu_profile_runs_where_it_fits(monkeypatch):
    """A smaller model of one's own needs less than the 8B one: its memory is not our guess to make."""
    monkeypatch.setattr(machine, "gpu", lambda: card(free_gib=12.0))
    assert load_profile("gpu24", "{model: packaged}").model == "packaged"
    monkeypatch.setattr(machine, "gpu", lambda: card())
    assert load_profile("gpu80") == PROFILES["gpu80"]
    assert load_profile("laptop", "{device: cuda, dtype: bfloat16}").device == "cuda"


@pytest.mark.parametrize("overrides", ["{device: cuda}", "{device: cuda, layout: packed}"])
def test_a_device_that_is_not_there_is_refused_in_any_profile(no_gpu, overrides):
    """The check of the profile passed by an override."""
    with pytest.raises(WorkshopError, match="cannot run here: no NVIDIA GPU was found"):
        load_profile("laptop", overrides)


@pytest.mark.parametrize("name", ["", "Laptop", "gpu40", "reference", "gpu80 "])
def test_an_unknown_profile_is_named_with_the_known_ones(name):
    """KeyError: 'gpu40'."""
    with pytest.raises(WorkshopError, match="choose one of auto, laptop, gpu24, gpu80, tiny") as caught:
        load_profile(name)
    assert repr(name) in str(caught.value)


# --- overrides


def test_overrides_replace_values_in_their_types():
    """1e-4 is text in YAML 1.1, and an integer where a float belongs breaks a comparison later."""
    text = "{max_steps: 20, learning_rate: 1e-4, lora_targets: [q_proj, v_proj], epochs: 2, warmup_ratio: 0}"
    profile = load_profile("laptop", text)
    assert profile == replace(
        PROFILES["laptop"],
        max_steps=20, learning_rate=1e-4, lora_targets=("q_proj", "v_proj"), epochs=2, warmup_ratio=0.0,
    )  # fmt: skip
    assert type(profile.warmup_ratio) is float and type(profile.learning_rate) is float
    assert load_profile("laptop", "max_steps: 20\nseed: 3\n").seed == 3  # block style too


def test_training_and_topical_words_cannot_disagree():
    """A card that says reference beside answers that were cut, or the other way round."""
    assert load_profile("laptop", "{training: topical}") == PROFILES["laptop"]
    whole = load_profile("laptop", "{training: reference}")
    assert whole == replace(PROFILES["laptop"], training="reference", topical_words=0)
    assert load_profile("laptop", "{topical_words: 0}") == whole
    assert load_profile("tiny", "{topical_words: 60}").training == "topical"
    assert load_profile("laptop", "{training: topical, topical_words: 60}").topical_words == 60
    with pytest.raises(WorkshopError, match="training is reference and topical_words 60: set one of the two"):
        load_profile("laptop", "{training: reference, topical_words: 60}")


@pytest.mark.parametrize("text", ["", "   ", "\n", "{}", "# a comment", "~", "null"])
def test_nothing_to_override(text):
    """An empty parameter that is an error, or a profile that is not itself."""
    assert load_profile("laptop", text) == PROFILES["laptop"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_can_be_overridden_with_its_own_value(setting, monkeypatch):
    """A setting that overrides can't name, or whose value does not survive YAML."""
    monkeypatch.setattr(machine, "gpu", lambda: card())
    for name in ("laptop", "gpu24"):
        value = asdict(PROFILES[name])[setting]
        assert load_profile(name, json.dumps({setting: value})) == PROFILES[name]


@pytest.mark.parametrize("wrong", ["twenty", [1], {"a": 1}, None, True, -7])
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_refuses_every_wrong_type(setting, wrong):
    """A string in place of a number, or -7 rows, are found by torch in the middle of a run, if at all."""
    if setting in ("model", "model_revision", "data") and isinstance(wrong, str):
        pytest.skip("any text is a name")
    if setting == "gradient_checkpointing" and wrong is True:
        pytest.skip("right")
    with pytest.raises(WorkshopError, match=rf"^({setting}|topical_words|training) is ") as caught:
        load_profile("laptop", json.dumps({setting: wrong}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{max_step: 20}", "'max_step', which no profile has: did you mean max_steps"),
        ("{MAX_STEPS: 20}", "did you mean max_steps"),
        ("{zzz: 1}", "'zzz', which no profile has: known are model"),
        ("{name: mine}", "'name', which no profile has"),
        ("{1: 2}", "names 1, which no profile has"),
        ("{max_steps: 0}", "max_steps is 0: Input should be -1 or .* greater than or equal to 1"),
        ("{train_rows: 0}", "train_rows is 0"),
        ("{learning_rate: 0}", "learning_rate is 0: Input should be greater than 0"),
        ("{learning_rate: -1e-4}", "learning_rate is "),
        ("{learning_rate: .nan}", "learning_rate is nan"),
        ("{learning_rate: 1e-4e}", "learning_rate is '1e-4e'"),
        ("{max_steps: 1e3}", "max_steps is '1e3'"),
        ("{max_steps: 20.0}", "max_steps is 20.0: .* valid integer"),
        ("{gradient_checkpointing: 'yes'}", "gradient_checkpointing is 'yes': .* valid boolean"),
        ("{gradient_checkpointing: 1}", "gradient_checkpointing is 1"),
        ("{prompt: Chat}", "prompt is 'Chat': Input should be 'plain' or 'chat'"),
        ("{dtype: float16}", "dtype is 'float16': Input should be 'float32' or 'bfloat16'"),
        ("{model: ''}", "model is ''"),
        ("{lora_targets: []}", "lora_targets is \\[\\]"),
        ("{lora_targets: q_proj}", "lora_targets is 'q_proj'"),
        ("{lora_targets: [qproj]}", "lora_targets is 'qproj': Input should be 'q_proj', 'k_proj'"),
        ("{lora_dropout: 1.0}", "lora_dropout is 1.0: .* less than or equal to 0.9"),
        ("{max_length: 2048}", "raise tokens_per_batch or lower max_length"),
        ("max_steps=20", "write a YAML mapping like {max_steps: 20}"),
        ("[max_steps, 20]", "write a YAML mapping"),
        ("{max_steps: 20", "write a YAML mapping"),
        ("{seed: 2020-99-99}", "write a YAML mapping"),
        ("{seed: !!python/object/apply:os.system ['true']}", "write a YAML mapping"),
        ("{seed: " + "9" * 400 + "}", "seed is 9999.*: Input should be less than 4294967296"),
        ("x" * 10_000, "write a YAML mapping"),
    ],
)
def test_what_cannot_be_an_override(text, sentence):
    """A traceback of YAML, a value taken for another, code that is run."""
    with pytest.raises(WorkshopError, match=sentence) as caught:
        load_profile("laptop", text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


yaml_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
yaml_values = st.recursive(
    yaml_scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v)
)


@given(values=st.dictionaries(st.sampled_from(SETTINGS), yaml_values, min_size=1, max_size=3))
def test_any_value_is_checked(values):
    """A value that passes the checks and is not of the setting's type."""
    import yaml

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(machine, "gpu", lambda: None)
            profile = load_profile("laptop", yaml.safe_dump(values))
    except WorkshopError as error:
        assert len(str(error)) < 900 and "\n" not in str(error)
        return
    for setting in values:
        assert type(getattr(profile, setting)) is type(getattr(REFERENCE, setting))
