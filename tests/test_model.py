"""Base models through NeMo AutoModel on a CPU, tokenizers, LoRA, counts, and what a broken folder says."""

import json
import shutil

import pytest
import torch
from llama3_like import llama3_like

from fiqa_helpers import model
from fiqa_helpers.base import WorkshopError
from fiqa_helpers.profiles import PROFILES, REFERENCE, load_profile

pytestmark = pytest.mark.usefixtures("one_thread")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for machines without CUDA")


def profile_of(folder) -> object:
    return load_profile("laptop", json.dumps({"model": str(folder)}))


@pytest.fixture(scope="session")
def tiny_folder(llama3_tokenizer, tmp_path_factory):
    """A whole model folder of half a megabyte: random weights, tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("tiny_folder")
    model.tiny_model(llama3_tokenizer).save_pretrained(folder)
    llama3_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base():
    """SmolLM2 with real weights, as the notebooks load it."""
    return model.load_base(load_profile("laptop"))


def logits(net) -> torch.Tensor:
    with torch.no_grad():
        return net(input_ids=torch.tensor([[1, 2683, 359, 253, 5356, 3216, 11173, 30]])).logits


# --- NeMo AutoModel on a CPU


def test_nemo_loads_the_real_model_as_transformers_does(base, smollm2):
    """NeMo's own Llama in place of the Hugging Face class, another dtype, weights that were not loaded."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert torch.equal(logits(base), logits(plain))
    assert hasattr(base, "generate") and not base.training
    assert base.num_parameters() == plain.num_parameters() == 134_515_008
    assert {p.dtype for p in base.parameters()} == {torch.float32}
    assert {str(p.device) for p in base.parameters()} == {"cpu"}


def test_smollm2_has_921600_trainable_parameters(base):
    """LoRA on other layers, or of another rank, than the table in notebook 03 says."""
    from peft import get_peft_model

    tuned = get_peft_model(base, model.lora_config(load_profile("laptop")))
    assert tuned.get_nb_trainable_parameters() == (921_600, 134_515_008 + 921_600)
    config = tuned.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 32, 0.05)
    assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {torch.float32}
    tuned.unload()


def test_a_saved_adapter_gives_equal_logits_on_a_plain_model(base, smollm2, tmp_path):
    """An adapter that only works where it was made: keys, scale or base other than PEFT's own loading has."""
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    untuned = logits(base)
    tuned = get_peft_model(base, model.lora_config(load_profile("laptop"))).eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    expected = logits(tuned)
    tuned.save_pretrained(tmp_path)
    tuned.unload()
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    again = PeftModel.from_pretrained(plain, tmp_path).eval()
    assert torch.equal(logits(again), expected) and not torch.allclose(expected, untuned, atol=0.1)
    with again.disable_adapter():
        assert torch.equal(logits(again), untuned)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4e6


@on_cpu
def test_nemo_still_needs_the_shim_and_asks_as_it_assumes(tiny_folder):
    """Two questions: an index for a device object, then the device for the weights; no more, no others."""
    from nemo_automodel import NeMoAutoModelForCausalLM

    arguments = {"dtype": torch.float32, "force_hf": True, "use_liger_kernel": False}
    with pytest.raises((AssertionError, RuntimeError)):
        NeMoAutoModelForCausalLM.from_pretrained(str(tiny_folder), **arguments)
    answers = []
    with model.nemo_on_cpu():
        answer = torch.cuda.current_device
        torch.cuda.current_device = lambda: answers.append(answer()) or answers[-1]
        NeMoAutoModelForCausalLM.from_pretrained(str(tiny_folder), **arguments)
    assert answers == [0, torch.device("cpu")]


def test_the_shim_restores_what_it_replaced(monkeypatch):
    """torch.cuda answers wrongly for good, after an error; a GPU machine's model goes to the CPU."""
    before = torch.cuda.current_device
    with pytest.raises(KeyError), model.nemo_on_cpu():
        assert torch.cuda.is_available() or torch.cuda.current_device is not before
        raise KeyError
    assert torch.cuda.current_device is before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with model.nemo_on_cpu():
        assert torch.cuda.current_device is before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_profile_decides_the_dtype(tiny_folder, dtype):
    """NeMo AutoModel leaves an fp32 checkpoint in fp32 when bf16 is asked for: twice the memory."""
    for name, values in (("laptop", {"model": str(tiny_folder)}), ("tiny", {})):
        loaded = model.load_base(load_profile(name, json.dumps(values | {"dtype": dtype})))
        assert {p.dtype for p in loaded.parameters()} == {getattr(torch, dtype)}
        assert {b.dtype for b in loaded.buffers()} == {torch.float32}  # RoPE in bf16 would blur positions
        assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight  # still tied


# --- counts


def test_the_8b_model_is_counted_exactly():
    """The reference run's own figures, on any machine, without its weights."""
    config, lora = model.reference_config(), model.lora_config(REFERENCE)
    assert model.count_parameters(config, lora) == (6_815_744, 8_030_261_248)
    for name in ("gpu24", "gpu80"):
        assert model.lora_config(PROFILES[name]).to_dict() == lora.to_dict()


def test_freed_memory_is_given_back():
    """Five notebooks with a model each: kernels that pile up hold more than a laptop has."""
    import psutil

    nothing = psutil.Process().memory_info().rss
    web = [torch.zeros(2_000) for _ in range(40_000)]  # many small blocks, as of a model's objects
    web.append(web)
    held = psutil.Process().memory_info().rss
    del web
    assert "GiB" in model.free_memory()
    assert psutil.Process().memory_info().rss - nothing < 0.3 * (held - nothing)


# --- tokenizers


def test_padding_is_never_the_end_token(tiny_tokenizer):
    """With pad = eos the end token is masked like padding, and the model never learns to stop."""
    laptop = model.load_tokenizer(load_profile("laptop"))
    for tokenizer in (tiny_tokenizer, laptop):
        assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id)
        assert tokenizer.pad_token in tokenizer.all_special_tokens
    assert laptop.get_vocab() == tiny_tokenizer.get_vocab()


@pytest.mark.parametrize("pad", ["<|eot_id|>", None])
def test_a_tokenizer_that_pads_with_its_end_gets_a_spare_token(llama3_tokenizer, tiny_folder, tmp_path, pad):
    """Llama 3's tokenizer comes without a padding token, and many copies of it pad with the end token."""
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    tokenizer = llama3_like(llama3_tokenizer.chat_template)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(tmp_path)
    loaded = model.load_tokenizer(profile_of(tmp_path))
    assert loaded.pad_token == "<|finetune_right_pad_id|>" and loaded.eos_token == "<|eot_id|>"
    assert len(loaded) == len(tokenizer)  # a new token would need a larger embedding
    for name in ("tokenizer.json", "tokenizer_config.json"):  # and where there is none to spare
        text = (tmp_path / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace("<|finetune_right_pad_id|>", "<|other|>"))
    with pytest.raises(WorkshopError, match="no token to pad with besides its end token"):
        model.load_tokenizer(profile_of(tmp_path))


# --- what cannot be loaded


@pytest.fixture
def mine(tiny_folder, tmp_path):
    """A copy of the folder to be damaged."""
    return shutil.copytree(tiny_folder, tmp_path / "mine")


def refused(folder, what: str, load=model.load_base) -> None:
    with pytest.raises(WorkshopError, match=f"Cannot load .*{what}.*: check the name and the conn") as caught:
        load(profile_of(folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_model_that_is_not_there():
    """Sixty frames of a hub client, with the one useful line in the middle."""
    for name in ("/nowhere/at/all", "no-such/model", "two words/and more/parts"):
        refused(name, name, model.load_tokenizer)
        refused(name, name)


BROKEN = {
    "config empty": ("config.json", b"{}"),
    "no weights": ("model.safetensors", None),
    "weights cut": ("model.safetensors", 20_000),
    "weights noise": ("model.safetensors", b"\xff" * 5_000),
    "tokenizer": ("tokenizer.json", b"{"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_damaged_folder(mine, broken):
    """SafetensorError, JSONDecodeError, RuntimeError: none of them names the folder."""
    file, content = BROKEN[broken]
    whole = (mine / file).read_bytes()
    (mine / file).unlink()
    if content is not None:
        (mine / file).write_bytes(whole[:content] if isinstance(content, int) else content)
    refused(mine, "mine", model.load_tokenizer if "tokenizer" in file else model.load_base)


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_base_that_lacks_weights(mine, lost):
    """transformers only warns, and what trains is random: a lost shard, or one of another model."""
    from safetensors.torch import load_file, save_file

    weights = load_file(mine / "model.safetensors")
    del weights[lost]
    save_file(weights, mine / "model.safetensors", {"format": "pt"})
    refused(mine, "of its weights are missing, such as")


GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2, "n_head": 4}


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"intermediate_size": 96}, ""),  # weights and configuration of two models in one folder
        (GPT2, "weights are missing, such as"),  # transformers only warns, and the model is random
        ({"rope_parameters": "yarn-9"}, "rope_parameters"),  # another version's: ends in a TypeError
    ],
)
def test_a_configuration_of_something_else(mine, other, what):
    """Files that do not belong together, or come from another version of transformers."""
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps(config | {"a_new_field": {"x": 1}}))
    model.load_base(profile_of(mine))  # a field more does no harm
    (mine / "config.json").write_text(json.dumps(config | other))
    refused(mine, what)


def test_pickled_weights_are_not_loaded(mine):
    """A pickle can run code when it is read, and NeMo AutoModel falls back to it."""
    torch.save(model.load_base(profile_of(mine)).state_dict(), mine / "pytorch_model.bin")
    (mine / "model.safetensors").unlink()
    refused(mine, "it has no safetensors file")


def test_code_in_a_model_folder_is_never_run(mine, monkeypatch):
    """A question on the terminal whether to run it, answered with yes by habit; or no question at all."""
    trace = mine / "it-ran"
    (mine / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    classes = {"AutoConfig": "Config", "AutoModelForCausalLM": "Model", "AutoTokenizer": "Model"}
    auto_map = {name: f"evil.{kind}" for name, kind in classes.items()}
    (mine / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    refused(mine, "custom code")
    assert not trace.exists()


def test_code_of_an_nvidia_repository_is_refused_too(monkeypatch):
    """NeMo AutoModel trusts every hub name that begins with nvidia/, unless it is told not to."""
    from nemo_automodel import NeMoAutoModelForCausalLM
    from nemo_automodel.components.utils.model_utils import resolve_trust_remote_code

    assert resolve_trust_remote_code("nvidia/anything")
    seen = {}

    def stop(path, **arguments):
        seen.update(arguments)
        raise OSError("stopped here")

    monkeypatch.setattr(NeMoAutoModelForCausalLM, "from_pretrained", stop)
    monkeypatch.setattr(model, "_require_safetensors", lambda _: None)
    with pytest.raises(WorkshopError, match="stopped here"):
        model.load_base(profile_of("nvidia/anything"))
    assert seen["trust_remote_code"] is False and seen["revision"] == "main" and seen["force_hf"] is True
