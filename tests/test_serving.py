"""Merging and serving: the merged folder is base and adapter, and a server gives its answers."""

import json
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace

import pytest

from fiqa_helpers import model
from fiqa_helpers.base import WorkshopError
from fiqa_helpers.generate import generate_answers
from fiqa_helpers.machinery import ship
from fiqa_helpers.profiles import load_profile

QUESTIONS = ["What is a bond?", 'Is "5 % a month" <b>safe</b>? Größe: 5 €']


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_tokenizer):
    """(profile, adapter): a random base model in a folder, and an adapter that changes its answers."""
    import torch
    from peft import get_peft_model

    folder = tmp_path_factory.mktemp("serving")
    base = model.tiny_model(tiny_tokenizer)
    base.save_pretrained(folder / "base")
    tiny_tokenizer.save_pretrained(folder / "base")
    profile = replace(load_profile("tiny"), model=str(folder / "base"))
    tuned = get_peft_model(base, model.lora_config(profile))
    random = torch.Generator().manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=random) / 4)
    tuned.save_pretrained(folder / "adapter")
    return profile, folder / "adapter"


@pytest.fixture(scope="module")
def merged(tiny, tmp_path_factory):
    """The report of the merged folder."""
    profile, adapter = tiny
    return ship.merge_adapter(profile, adapter, tmp_path_factory.mktemp("merged") / "model")


def test_merged_is_base_and_adapter(tiny, merged):
    """A scale forgotten or applied twice gives a model that still writes, only worse."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    profile, adapter = tiny
    assert merged.largest_change < 1e-4 * max(1, merged.logit_spread)
    assert merged.same_top_token == 1.0
    tokenizer = AutoTokenizer.from_pretrained(merged.folder)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    whole = AutoModelForCausalLM.from_pretrained(merged.folder)
    assert not any("lora" in name for name, _ in whole.named_parameters())
    base = AutoModelForCausalLM.from_pretrained(profile.model)
    untuned = ship.probe_logits(base, tokenizer, "plain")
    tuned = ship.probe_logits(PeftModel.from_pretrained(base, adapter), tokenizer, "plain")
    found = ship.probe_logits(whole, tokenizer, "plain")
    assert (found - tuned).abs().max() < 1e-4
    assert (found - untuned).abs().max() > 0.05, "an adapter that changes nothing would show nothing"


def test_a_wrong_merge_is_not_kept(tiny, tmp_path, monkeypatch):
    """The comparison must be able to fail: here the merge itself forgets the adapter."""
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    profile, adapter = tiny
    with pytest.raises(WorkshopError, match="not base and adapter.*not kept"):
        ship.merge_adapter(profile, adapter, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_base_is_refused(tiny, smollm2, tmp_path):
    """Before any weights are loaded, naming the file and what it was trained on."""
    profile, adapter = tiny
    with pytest.raises(WorkshopError, match="adapter_model.safetensors does not fit .*it was trained on"):
        ship.merge_adapter(replace(profile, model=str(smollm2)), adapter, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_damaged_adapters_are_named(tiny, tmp_path):
    """A cut file, a missing file, no folder."""
    profile, adapter = tiny
    shutil.copytree(adapter, tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    shutil.copytree(adapter, tmp_path / "half")
    (tmp_path / "half" / "adapter_config.json").unlink()
    for name in ("cut", "half", "none"):
        with pytest.raises(WorkshopError, match=f"{name} is not a whole adapter"):
            ship.refuse_other_base(tmp_path / name, profile.model)


def test_a_folder_with_something_in_it_is_left_alone(tiny, tmp_path):
    """Somebody's other model."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WorkshopError, match="is not empty"):
        ship.merge_adapter(*tiny, tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_served_answers_are_the_models(tiny, merged, tiny_tokenizer, tmp_path):
    """Base and tuned from one server, through the official client: `generate`'s own text, then silence."""
    from transformers import AutoModelForCausalLM

    profile, _ = tiny
    with ship.serving(tmp_path / "serve.log") as server:
        port = int(server.url.rpartition(":")[2].partition("/")[0])
        with urllib.request.urlopen(server.url.replace("/v1", "/health")) as reply:
            assert json.load(reply)["status"] == "ok"
        answers = {}
        for folder in (profile.model, merged.folder):
            found = server.ask(folder, QUESTIONS, tiny_tokenizer, max_new_tokens=6)
            here = AutoModelForCausalLM.from_pretrained(folder)
            expected = [
                generate_answers(here, tiny_tokenizer, [question], "plain", 6, no_repeat_ngram_size=0)[0]
                for question in QUESTIONS
            ]
            assert [answer.text for answer in found] == [answer.text for answer in expected]
            assert [answer.stopped for answer in found] == [answer.stopped for answer in expected]
            answers[folder] = found
        assert answers[profile.model] != answers[merged.folder]
        with pytest.raises(WorkshopError, match="holds no model"):
            server.ask(tmp_path, QUESTIONS, tiny_tokenizer)
        with pytest.raises(WorkshopError, match=r"could not answer.*serve\.log"):
            server.ask("no-such/model", QUESTIONS[:1], tiny_tokenizer, max_new_tokens=2)
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
        pass


@pytest.mark.slow
def test_the_small_model_is_served(smollm2, tmp_path):
    """The real SmolLM2, its tokenizer and its generation settings: what notebook 07 serves on a laptop."""
    profile = replace(load_profile("laptop"), model=str(smollm2))
    tokenizer = model.load_tokenizer(profile)
    expected = generate_answers(
        model.load_base(profile), tokenizer, QUESTIONS[:1], "plain", 12, no_repeat_ngram_size=0
    )[0]
    with ship.serving(tmp_path / "serve.log") as server:
        found = server.ask(smollm2, QUESTIONS[:1], tokenizer, "plain", 12)[0]
    assert found.text == expected.text
    assert found.text


def test_a_server_that_ends_is_said(tmp_path, monkeypatch):
    """A port that is taken, or a package that is missing: the log has the reason."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(ship, "_free_port", lambda: taken.getsockname()[1])
        with (
            pytest.raises(WorkshopError, match=r"The server ended with code \d+: look at .*serve.log"),
            ship.serving(tmp_path / "serve.log"),
        ):
            pass
    assert "address already in use" in (tmp_path / "serve.log").read_text()


def test_vllm_line():
    """Quoting, and a rank that vLLM has no name for."""
    line = ship.vllm_line("nvidia/model", ship.Path("/a b/final"), rank=12)
    words = shlex.split(line)
    assert words[:3] == ["vllm", "serve", "nvidia/model"]
    assert "--enable-lora" in words
    assert words[words.index("--max-lora-rank") + 1] == "16"
    assert words[words.index("--lora-modules") + 1] == "fiqa=/a b/final"
    assert words[words.index("--host") + 1] == "127.0.0.1"
    with pytest.raises(WorkshopError, match="merge the adapter"):
        ship.vllm_line("m", ship.Path("a"), rank=1000)


@pytest.mark.slow
def test_the_gguf_file_is_the_merged_model(smollm2, tmp_path):
    """The printed commands, run as they are: the file's weights and tokens must be the folder's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target = tmp_path / "a b" / "model.gguf"
    target.parent.mkdir()
    for line in ship.gguf_lines(smollm2, target, tmp_path / "converter", sys.executable):
        subprocess.run(line, shell=True, check=True, capture_output=True, timeout=600)
    packed = AutoModelForCausalLM.from_pretrained(
        target.parent, gguf_file=target.name, quantization_config=GgufConfig(dequantize=True)
    )
    whole = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    expected = ship.probe_logits(whole, tokenizer, "plain")
    found = ship.probe_logits(
        packed, AutoTokenizer.from_pretrained(target.parent, gguf_file=target.name), "plain"
    )
    assert (found - expected).abs().max() < 0.05 * expected.std()
    assert "gguf" not in sys.modules or "converter" not in str(sys.modules["gguf"].__file__)


def test_an_at_sign_in_a_path(tmp_path):
    """The server splits a model's name at the @ and looks for a folder that is not there."""
    folder = tmp_path / "me@work"
    folder.mkdir()
    (folder / "config.json").touch()
    with pytest.raises(WorkshopError, match="has an @ in its path"):
        ship.refuse_name(folder)
