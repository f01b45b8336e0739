"""Every folder that is not a whole adapter for this base model is refused with one sentence and a remedy."""

import dataclasses
import json
import shutil
import warnings

import peft
import pytest
import torch

from fiqa_helpers import model
from fiqa_helpers.base import WorkshopError
from fiqa_helpers.machinery import checkpoints
from fiqa_helpers.machinery.checkpoints import model_files
from fiqa_helpers.model import check_adapter, files_of
from fiqa_helpers.profiles import load_profile


@pytest.fixture(scope="module")
def profile():
    return load_profile("tiny")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_tokenizer, profile):
    """A real adapter on the tiny model, saved the way notebook 04 saves it."""
    tuned = peft.get_peft_model(model.tiny_model(tiny_tokenizer), model.lora_config(profile))
    folder = tmp_path_factory.mktemp("adapter") / "final_model"
    card = {"profile": dataclasses.asdict(profile), "finished": True}
    checkpoints.save_final(tuned, tiny_tokenizer, folder, **card)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "final_model")


def refused(folder, profile, *words):
    with pytest.raises(WorkshopError) as caught:
        check_adapter(folder, profile)
    message = str(caught.value)
    assert message.count("\n") == 0
    assert str(folder) in message
    for word in words:
        assert word in message, message


def test_whole_adapter_passes(folder, profile):
    """A check that refuses everything would pass all the tests below; a warning would be one for nothing."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    checkpoints.write_manifest(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        card = check_adapter(folder, profile)
    assert card["profile"]["model"] == "random"
    assert files_of(folder)[0]["MB"] >= files_of(folder)[-1]["MB"]


def test_no_folder(tmp_path, profile):
    """Notebook 05 started first: say which notebook to run."""
    refused(tmp_path / "final_model", profile, "no adapter", "04_train")


def test_empty_folder(tmp_path, profile):
    """An interrupted copy leaves an empty folder."""
    refused(tmp_path, profile, "empty", "04_train")


def test_pickled_weights(folder, profile):
    """torch.load of a foreign file can run code: PEFT would fall back to adapter_model.bin."""
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, folder / "adapter_model.bin")
    refused(folder, profile, "adapter_model.bin", "safetensors")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "run_card.json"])
def test_missing_file(folder, profile, name):
    """Half a folder: name what is not there."""
    (folder / name).unlink()
    refused(folder, profile, name, "04_train")


@pytest.mark.parametrize("kept", [0, 7, 1000, -1])
def test_cut_weights(folder, profile, kept):
    """A full disk or a killed copy cuts the file anywhere, header included."""
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    refused(folder, profile, "adapter_model.safetensors", "04_train")


def test_weights_of_something_else(folder, profile):
    """PEFT loads a file without LoRA weights with a warning, and the "tuned" model is the base."""
    from safetensors.torch import save_file

    save_file({"lm_head.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    refused(folder, profile, "no LoRA weights")


@pytest.mark.parametrize("name", ["adapter_config.json", "run_card.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\x01"])
def test_damaged_json(folder, profile, name, content):
    """Anything may be in the file: one sentence, never a traceback of the JSON parser."""
    (folder / name).write_text(content)
    refused(folder, profile, name, "damaged")


def test_other_kind_of_adapter(folder, profile):
    """A prompt-tuning adapter has no LoRA layers to switch off."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "PROMPT_TUNING"}))
    refused(folder, profile, "PROMPT_TUNING")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json", "adapter_config.json"])
def test_one_bit_flipped(folder, profile, name):
    """A copy over a bad cable: the file has its length and its header, and one weight is another."""
    content = bytearray((folder / name).read_bytes())
    place = len(content) * 9 // 10 if name != "adapter_config.json" else content.index(b"32")
    content[place] ^= 1
    (folder / name).write_bytes(content)
    refused(folder, profile, name, "04_train")


def test_missing_tokenizer(folder, profile):
    """Without its tokenizer transformers ends in a traceback of forty frames."""
    (folder / "tokenizer.json").unlink()
    refused(folder, profile, "tokenizer.json is missing", "04_train")


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


def other_model(kind: str):
    """Models of another width, depth and kind."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 99, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    if kind == "another kind":
        return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=2)), ["c_attn"]
    wide, deep = (128, 2) if kind == "wider" else (64, 3)
    config = LlamaConfig(hidden_size=wide, num_hidden_layers=deep, **sizes)
    return LlamaForCausalLM(config), ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("kind", ["wider", "deeper", "another kind"])
def test_adapter_of_another_architecture(folder, profile, kind):
    """Its card says that it fits; PEFT loads what fits with a warning, or gives up in a traceback."""
    (folder / "manifest.json").unlink()
    base, targets = other_model(kind)
    lora = peft.LoraConfig(r=8, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    peft.get_peft_model(base, lora).save_pretrained(folder)
    words = ("made for another model than random",) if kind != "another kind" else ("does not fit random",)
    refused(folder, profile, *words, "04_train")


@pytest.mark.parametrize(
    ("key", "value"),
    [("model", "packaged"), ("model_revision", "v2"), ("data", "hub"), ("prompt", "chat")],
)
def test_trained_on_something_else(folder, profile, key, value):
    """Shapes may fit by chance: what it was trained on is read from the card and named."""
    refused(folder, dataclasses.replace(profile, **{key: value}), key, repr(value), "notebook 04")
