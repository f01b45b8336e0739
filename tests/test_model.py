"""Base models through NeMo AutoModel on a CPU, what is not loaded, whole adapters, the run that is kept."""

import dataclasses
import json
import re
import runpy
import shutil
import warnings
from unittest import mock

import peft
import psutil
import pytest
import torch
from llama3_like import llama3_like
from safetensors.torch import load_file, save_file

from fiqa_helpers import model
from fiqa_helpers.base import WorkshopError, Workspace, read_card
from fiqa_helpers.machinery import checkpoints
from fiqa_helpers.model import WEIGHTS, check_adapter
from fiqa_helpers.profiles import PROFILES, REFERENCE

TINY, LAPTOP = PROFILES["tiny"], PROFILES["laptop"]
pytestmark = pytest.mark.usefixtures("one_thread")


def profile_of(folder) -> object:
    return dataclasses.replace(LAPTOP, model=str(folder))


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
    return model.load_base(LAPTOP)


@pytest.fixture(scope="module")
def plain(smollm2):
    """The same model by transformers alone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


def logits(net) -> torch.Tensor:
    with torch.no_grad():
        return net(input_ids=torch.tensor([[1, 2683, 359, 253, 5356, 3216, 11173, 30]])).logits


# --- NeMo AutoModel on a CPU


def test_nemo_loads_the_real_model_as_transformers_does(base, plain):
    """NeMo's own Llama in place of the Hugging Face class, another dtype, weights that were not loaded."""
    assert torch.equal(logits(base), logits(plain))
    assert hasattr(base, "generate") and not base.training
    assert base.num_parameters() == plain.num_parameters() == 134_515_008
    assert {p.dtype for p in base.parameters()} == {torch.float32}


def test_a_saved_adapter_gives_equal_logits_on_a_plain_model(base, plain, tmp_path):
    """An adapter that only works where it was made: keys, scale or base other than PEFT's own loading has."""
    untuned = logits(base)
    tuned = peft.get_peft_model(base, model.lora_config(LAPTOP)).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(3))
    expected = logits(tuned)
    tuned.save_pretrained(tmp_path)
    tuned.unload()
    again = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    assert torch.equal(logits(again), expected) and not torch.allclose(expected, untuned, atol=0.1)
    with again.disable_adapter():
        assert torch.equal(logits(again), untuned)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for machines without CUDA")
def test_nemo_still_needs_the_shim_and_asks_as_it_assumes(tiny_folder):
    """Two questions: an index for a device object, then the device for the weights; no more, no others."""
    from nemo_automodel import NeMoAutoModelForCausalLM

    arguments = {"dtype": torch.float32, "force_hf": True, "use_liger_kernel": False}
    with pytest.raises((AssertionError, RuntimeError)):
        NeMoAutoModelForCausalLM.from_pretrained(str(tiny_folder), **arguments)
    answers = []
    with model.nemo_on_cpu("cpu"):
        answer = torch.cuda.current_device
        torch.cuda.current_device = lambda: answers.append(answer()) or answers[-1]
        NeMoAutoModelForCausalLM.from_pretrained(str(tiny_folder), **arguments)
    assert answers == [0, torch.device("cpu")]


def test_the_shim_restores_what_it_replaced():
    """torch.cuda answers wrongly for good, after an error; a GPU's model goes to the CPU."""
    before = torch.cuda.current_device
    with pytest.raises(KeyError), model.nemo_on_cpu("cpu"):
        raise KeyError
    assert torch.cuda.current_device is before
    with model.nemo_on_cpu("cuda"):
        assert torch.cuda.current_device is before


def test_beside_a_gpu_the_cpu_has_a_model_of_its_own(tiny_folder, monkeypatch):
    """Liger's kernels need a GPU: profile laptop on a machine with one ended in a raw error of Triton."""
    from nemo_automodel import NeMoAutoModelForCausalLM

    asked = mock.Mock(wraps=NeMoAutoModelForCausalLM.from_pretrained)
    monkeypatch.setattr(NeMoAutoModelForCausalLM, "from_pretrained", asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loaded = model.load_base(profile_of(tiny_folder))
    assert loaded.device.type == "cpu" and asked.call_args.kwargs["use_liger_kernel"] is False


def test_the_profile_decides_the_dtype(tiny_folder):
    """NeMo AutoModel leaves an fp32 checkpoint in fp32 when bf16 is asked for: twice the memory."""
    loaded = model.load_base(dataclasses.replace(profile_of(tiny_folder), dtype="bfloat16"))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in loaded.buffers()} == {torch.float32}  # RoPE in bf16 would blur positions
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight  # still tied


def test_the_8b_model_is_counted_exactly():
    """The reference run's own figures, on any machine, without its weights."""
    counts = model.count_parameters(model.reference_config(), model.lora_config(REFERENCE))
    assert counts == (6_815_744, 8_030_261_248)


def test_freed_memory_is_given_back():
    """Five notebooks with a model each: kernels that pile up hold more than a laptop has."""
    nothing = psutil.Process().memory_info().rss
    web = [torch.zeros(2_000) for _ in range(40_000)]  # many small blocks, as of a model's objects
    web.append(web)
    held = psutil.Process().memory_info().rss
    del web
    model.free_memory()
    assert psutil.Process().memory_info().rss - nothing < 0.3 * (held - nothing)


# --- tokenizers


def test_padding_is_never_the_end_token(tiny_tokenizer):
    """With pad = eos the end token is masked like padding, and the model never learns to stop."""
    laptop = model.load_tokenizer(LAPTOP)
    assert laptop.pad_token_id not in (None, laptop.eos_token_id, laptop.bos_token_id)
    assert laptop.pad_token in laptop.all_special_tokens and laptop.get_vocab() == tiny_tokenizer.get_vocab()


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
    assert "\n" not in str(caught.value)


def test_a_damaged_folder_or_none(mine):
    """Sixty frames of a hub client, a SafetensorError, a TypeError: none of them names the folder."""
    refused("no-such/model", "no-such/model", model.load_tokenizer)
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps(config | {"rope_parameters": "another version's"}))
    refused(mine, "rope_parameters")
    (mine / "config.json").write_text(json.dumps(config | {"a_new_field": {"x": 1}}))
    model.load_base(profile_of(mine))  # a field more does no harm
    (mine / "model.safetensors").write_bytes((mine / "model.safetensors").read_bytes()[:20_000])
    refused(mine, "mine")


def test_a_base_that_lacks_weights(mine):
    """transformers only warns, and what trains is random: a lost shard, or one of another model."""
    weights = load_file(mine / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, mine / "model.safetensors", {"format": "pt"})
    refused(mine, "weights are missing, such as model.layers.1.mlp.up_proj.weight")


def test_pickled_weights_are_not_loaded(mine):
    """A pickle can run code when it is read, and NeMo AutoModel falls back to it."""
    torch.save(load_file(mine / "model.safetensors"), mine / "pytorch_model.bin")
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

    def stop(path, **arguments):
        raise OSError(f"trust_remote_code={arguments['trust_remote_code']}")

    monkeypatch.setattr(NeMoAutoModelForCausalLM, "from_pretrained", stop)
    monkeypatch.setattr(model, "_require_safetensors", lambda _: None)
    refused("nvidia/anything", "trust_remote_code=False")


# --- adapters


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_tokenizer):
    """A real adapter on the tiny model, saved the way notebook 04 saves it."""
    tuned = peft.get_peft_model(model.tiny_model(tiny_tokenizer), model.lora_config(TINY))
    folder = tmp_path_factory.mktemp("adapter") / "final_model"
    checkpoints.save_final(tuned, tiny_tokenizer, folder, profile=dataclasses.asdict(TINY), finished=True)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "final_model")


def no_adapter(folder, *words, profile=TINY):
    with pytest.raises(WorkshopError) as caught:
        check_adapter(folder, profile)
    for word in (str(folder), *words):
        assert word in str(caught.value)


def test_whole_adapter_passes(folder):
    """A check that refuses everything would pass all the tests below; a warning would be one for nothing."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_adapter(folder, TINY)["profile"]["model"] == "random"


def test_no_adapter(folder):
    """Notebook 05 started first; PEFT would fall back to adapter_model.bin, which can run code when read."""
    torch.save({"x": torch.zeros(1)}, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    no_adapter(folder, "There is no adapter", "pickled weights are not loaded", "run notebook 04_train")


@pytest.mark.parametrize("name", ["adapter_config.json", "run_card.json", WEIGHTS])
def test_damaged_files(folder, name):
    """A full disk or a killed copy cuts a file anywhere: one sentence, no traceback of a parser."""
    whole = (folder / name).read_bytes()
    for content in (b"", b"[]", whole[: len(whole) // 2]):
        (folder / name).write_bytes(content)
        no_adapter(folder, "04_train")


@pytest.mark.parametrize("change", ["half", "more", "other rank"])
def test_half_an_adapter(folder, change):
    """PEFT only warns (or says nothing): the tuned model is the base in half its layers, or in all."""
    weights = load_file(folder / WEIGHTS)
    first, *_ = names = sorted(weights)
    if change == "half":
        weights = {name: weights[name] for name in names[::2]}
    elif change == "more":
        weights[first.replace("layers.0", "layers.9")] = torch.zeros(8, 64)
    else:
        weights[first] = weights[first][:4].contiguous()
    save_file(weights, folder / WEIGHTS)
    no_adapter(folder, "is half or was made for another model", "04_train")


def test_trained_on_something_else(folder):
    """Shapes may fit by chance: what it was trained on is read from the card and named."""
    for key, value in (("model", "packaged"), ("prompt", "chat"), ("training", "topical")):
        no_adapter(folder, key, repr(value), profile=dataclasses.replace(TINY, **{key: value}))


# --- the run that is kept in the repository

KEPT = model.kept_run()
SCRIPT = runpy.run_path(str(KEPT.parent.parent / "scripts" / "make_precomputed.py"))


def test_the_kept_run_is_small_and_its_page_and_labels_are_of_its_files():
    """A page edited by hand tells another story, a label another machine; a clone stays cheap."""
    assert sum(path.stat().st_size for path in KEPT.rglob("*") if path.is_file()) <= 2_600_000
    assert SCRIPT["page"](KEPT) == (KEPT / "README.md").read_text("utf-8")
    for folder in (KEPT, KEPT / "case_study"):
        assert (folder / "label.txt").read_text() == f"{SCRIPT['label'](folder)}.\n"
    card = check_adapter(KEPT / "adapter", LAPTOP)
    assert card["finished"] and card["validation_loss"]["best"] < card["validation_loss"]["before"]


def test_no_data_set_in_disguise_and_no_machine(fiqa_rows):
    """A few quoted questions may be here, FiQA's answers may not, nor a path of somebody's machine."""
    text = "\n".join(path.read_text("utf-8") for path in KEPT.rglob("*") if path.suffix in (".json", ".md"))
    assert not re.search(r"/(root|home|tmp|work|Users)/", text)
    questions = [row["question"] for row in fiqa_rows if row["question"] in text]
    assert 0 < len(questions) <= 12 and "CC-BY-SA-4.0" in text
    assert not [row for row in fiqa_rows if row["ground_truths"][0][:80] in text]


def test_it_never_stands_in_for_another_model_data_or_prompt_nor_where_04_was_run(tmp_path, capsys):
    """Somebody's own adapter must never be passed over, not even a broken one."""
    workspace = Workspace(str(tmp_path))
    assert model.adapter_folder(workspace, LAPTOP) == KEPT / "adapter"
    said = capsys.readouterr().out
    assert "Notebook 04 was not run" in said and (KEPT / "label.txt").read_text() in said
    for change in ({"model": "random"}, {"data": "hub"}, {"prompt": "chat"}):
        profile = dataclasses.replace(LAPTOP, **change)
        assert model.adapter_folder(workspace, profile) == workspace.final_model
    workspace.final_model.mkdir()
    assert model.adapter_folder(workspace, LAPTOP) == workspace.final_model
    assert capsys.readouterr().out == ""


def test_the_kept_evaluations_show_what_is_claimed():
    """Voice moves, answers end, each floor loses on one number; the case study's loss fell, and it loops."""
    kept = read_card(KEPT / "kept_evaluation.json")
    tuned, floors = kept["means"]["laptop"], kept["floors"]
    assert kept["means"]["untuned plain"]["voice"] <= 0.2 < 0.5 <= tuned["voice"] and tuned["stopped"] >= 0.95
    for name in floors.keys() - {"people"}:
        assert any(floors[name][metric] < tuned[metric] for metric in ("similarity", "token_f1_60", "voice"))
    case, good = (read_card(f / "evaluation.json")["comparisons"] for f in (KEPT / "case_study", KEPT))
    assert case["nll"]["difference"] < good["nll"]["difference"] < 0
    assert case["repeated"]["tuned"] > 0.5 > 0.05 > good["repeated"]["tuned"]
