"""A folder that is not a whole adapter for this base model is refused, before anything large is loaded."""

import dataclasses
import json
import shutil
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from fiqa_helpers import model
from fiqa_helpers.base import WorkshopError
from fiqa_helpers.machinery import checkpoints
from fiqa_helpers.model import check_adapter, model_files
from fiqa_helpers.profiles import load_profile

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def profile():
    return load_profile("tiny")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_tokenizer, profile):
    """A real adapter on the tiny model, saved the way notebook 04 saves it."""
    tuned = peft.get_peft_model(model.tiny_model(tiny_tokenizer), model.lora_config(profile))
    folder = tmp_path_factory.mktemp("adapter") / "final_model"
    checkpoints.save_final(tuned, tiny_tokenizer, folder, profile=dataclasses.asdict(profile), finished=True)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "final_model")


def refused(folder, profile, *words):
    with pytest.raises(WorkshopError) as caught:
        check_adapter(folder, profile)
    for word in (str(folder), *words):
        assert word in str(caught.value)


def test_whole_adapter_passes(folder, profile):
    """A check that refuses everything would pass all the tests below; a warning would be one for nothing."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        card = check_adapter(folder, profile)
    assert card["profile"]["model"] == "random"


def test_no_adapter(folder, tmp_path, profile):
    """Notebook 05 started first; PEFT would fall back to adapter_model.bin, which can run code when read."""
    refused(tmp_path / "elsewhere", profile, "There is no adapter", "run notebook 04_train")
    (folder / WEIGHTS).unlink()
    torch.save({"x": torch.zeros(1)}, folder / "adapter_model.bin")
    refused(folder, profile, "pickled weights are not loaded")


@pytest.mark.parametrize("name", ["adapter_config.json", "run_card.json", WEIGHTS])
def test_damaged_files(folder, profile, name):
    """A full disk or a killed copy cuts a file anywhere: one sentence, no traceback of a parser."""
    whole = (folder / name).read_bytes()
    for content in (b"", b"{", b"[]", whole[:7], whole[: len(whole) // 2]):
        (folder / name).write_bytes(content)
        refused(folder, profile, "04_train")


@pytest.mark.parametrize("change", ["half", "nothing", "more", "other rank"])
def test_half_an_adapter(folder, profile, change):
    """PEFT only warns (or says nothing): the tuned model is the base in half its layers, or in all."""
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights)
    if change == "more":
        weights["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(8, 64)
    elif change == "other rank":
        weights[names[0]] = weights[names[0]][:4].contiguous()
    else:
        for name in names if change == "nothing" else names[::2]:
            del weights[name]
    save_file(weights, folder / WEIGHTS)
    refused(folder, profile, "is half or was made for another model", "04_train")


def test_other_weights_of_the_same_model(tmp_path, tiny_model, tiny_tokenizer, profile):
    """The hub's main branch, or a folder of the same name, holds other weights than those trained on."""
    base = tmp_path / "base"
    tiny_model.save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    profile = dataclasses.replace(profile, model=str(base))
    tuned = peft.get_peft_model(tiny_model, model.lora_config(profile))
    card = {"profile": dataclasses.asdict(profile), "definition": {"model_files": model_files(profile)}}
    checkpoints.save_final(tuned, tiny_tokenizer, tmp_path / "final_model", **card)
    check_adapter(tmp_path / "final_model", profile)
    model.tiny_model(tiny_tokenizer, seed=1).save_pretrained(base)
    refused(tmp_path / "final_model", profile, "was trained on other weights of", "model_revision")


def test_adapter_of_another_architecture(folder, profile):
    """Its card says that it fits; PEFT loads what fits without a word."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 99, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    lora = peft.LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    for other in ({"hidden_size": 128, "num_hidden_layers": 2}, {"hidden_size": 64, "num_hidden_layers": 3}):
        peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, **other)), lora).save_pretrained(folder)
        refused(folder, profile, "made for another model")


@pytest.mark.parametrize(
    ("key", "value"),
    [("model", "packaged"), ("model_revision", "v2"), ("data", "hub"), ("prompt", "chat")],
)
def test_trained_on_something_else(folder, profile, key, value):
    """Shapes may fit by chance: what it was trained on is read from the card and named."""
    refused(folder, dataclasses.replace(profile, **{key: value}), key, repr(value), "notebook 04")
