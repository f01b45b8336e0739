"""What leaves the workshop: merged it is base and adapter, served it answers as here, its card is true."""

import shutil
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from fiqa_helpers import model
from fiqa_helpers.base import WorkshopError
from fiqa_helpers.generate import generate_answers
from fiqa_helpers.machinery import ship
from fiqa_helpers.metrics import compare
from fiqa_helpers.profiles import PROFILES, load_profile
from fiqa_helpers.rows import build_prompt, encode_prompt

QUESTIONS = ["What is a bond?", 'Is "5 % a month" <b>safe</b>? Größe: 5 €']


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_tokenizer):
    """(profile, base, adapter): a random base model in a folder, an adapter that changes its answers."""
    folder = tmp_path_factory.mktemp("serving")
    base = model.tiny_model(tiny_tokenizer)
    base.save_pretrained(folder / "base")
    # a temperature and no do_sample: transformers reads that and refuses to write it
    ends = '{"temperature": 0.6, "top_p": 0.9, "eos_token_id": [7, 8]}'
    (folder / "base" / "generation_config.json").write_text(ends)
    tiny_tokenizer.save_pretrained(folder / "base")
    profile = load_profile("tiny")
    tuned = get_peft_model(base, model.lora_config(profile))
    random = torch.Generator().manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=random) / 4)
    tuned.save_pretrained(folder / "adapter")
    return profile, str(folder / "base"), folder / "adapter"


@pytest.fixture(scope="module")
def merged(tiny, tmp_path_factory):
    """The report of the merged folder."""
    return ship.merge_adapter(*tiny, tmp_path_factory.mktemp("merged") / "model")


def test_merged_is_base_and_adapter(tiny, merged, tiny_tokenizer):
    """A scale forgotten or applied twice gives a model that still writes, only worse; it ends as trained."""
    _, folder, adapter = tiny
    assert merged.largest_change < 1e-4 * max(1, merged.logit_spread)
    assert merged.same_top_token == 1.0
    tokenizer = AutoTokenizer.from_pretrained(merged.folder)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    whole = AutoModelForCausalLM.from_pretrained(merged.folder)
    settings = whole.generation_config
    assert settings.eos_token_id == sorted({7, 8, tokenizer.eos_token_id})
    assert settings.pad_token_id == tokenizer.pad_token_id == tiny_tokenizer.pad_token_id
    assert not settings.do_sample
    assert not any("lora" in name for name, _ in whole.named_parameters())
    base = AutoModelForCausalLM.from_pretrained(folder)
    untuned = ship.probe_logits(base, tokenizer, "plain")
    tuned = ship.probe_logits(PeftModel.from_pretrained(base, adapter), tokenizer, "plain")
    found = ship.probe_logits(whole, tokenizer, "plain")
    assert (found - tuned).abs().max() < 1e-4
    assert (found - untuned).abs().max() > 0.05, "an adapter that changes nothing would show nothing"


def test_a_wrong_merge_is_not_kept(tiny, tmp_path, monkeypatch):
    """The comparison must be able to fail: here the merge itself forgets the adapter."""
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(WorkshopError, match="not base and adapter.*not kept"):
        ship.merge_adapter(*tiny, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["half", "another base"])
def test_an_adapter_that_does_not_fit_is_refused(damage, tiny, smollm2, tmp_path):
    """PEFT leaves out what is missing or doesn't fit: base and "merged" model would be called 100 % equal."""
    profile, base, adapter = tiny
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    weights = copy / "adapter_model.safetensors"
    if damage == "half":
        kept = {name: value for name, value in load_file(weights).items() if "layers.0." in name}
        save_file(kept, weights)
    else:
        base = str(smollm2)
    with pytest.raises(WorkshopError, match="adapter|made for another model"):
        ship.merge_adapter(profile, base, copy, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_served_answers_are_the_models(tiny, merged, tiny_tokenizer, tmp_path, monkeypatch):
    """Base and tuned from one server: `generate`'s own text; and when the block ends nobody listens."""
    import openai

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # an office's proxy does not lead back here

    answers = {}
    with ship.serving(tmp_path / "serve.log") as url:
        client = openai.OpenAI(base_url=url, api_key="none", timeout=600, max_retries=0)
        for folder in (tiny[1], str(merged.folder)):
            here = AutoModelForCausalLM.from_pretrained(folder)
            for question in QUESTIONS:  # an endpoint has no guard
                plain = generate_answers(here, tiny_tokenizer, [question], "plain", 6, no_repeat_ngram_size=0)
                alone = plain[0]
                asked = dict(model=folder, prompt=build_prompt(question), max_tokens=6, temperature=0)
                found = client.completions.create(**asked).choices[0]
                assert (found.text.strip(), found.finish_reason == "stop") == (alone.text, alone.stopped)
                answers[folder, question] = found.text
    assert answers[tiny[1], QUESTIONS[0]] != answers[str(merged.folder), QUESTIONS[0]]
    with pytest.raises(OSError), socket.create_connection(url.split("/")[2].split(":"), timeout=2):
        pass


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_ollama_gives_the_training_prompt(style, tiny_tokenizer):
    """Under another template the adapter is out of its depth, and nobody sees why it answers badly."""
    text = ship.modelfile(Path("fiqa.gguf"), tiny_tokenizer, style)
    assert text.startswith("FROM fiqa.gguf\n")
    _, template, rest = text.split('"""')
    assert rest.startswith("\nPARAMETER ")
    assert template.count("{{") == 1  # one action, which Go's template language fills with the question
    for question in QUESTIONS:
        rendered = template.replace("{{ .Prompt }}", question)
        ids = tiny_tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert ids == encode_prompt(question, tiny_tokenizer, style)  # this tokenizer has no BOS to add


@pytest.mark.slow
def test_gguf_file_is_the_merged_model(smollm2, tmp_path):
    """The printed commands, run as they are: the file's weights and tokens must be the folder's."""
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
    words = AutoTokenizer.from_pretrained(target.parent, gguf_file=target.name)
    found = ship.probe_logits(packed, words, "plain")
    assert (found - expected).abs().max() < 0.05 * expected.std()


def card_of(folder: Path, profile=PROFILES["laptop"], evaluation=None, merged=False) -> ModelCard:
    """The card of a run, as huggingface_hub reads it."""
    run = {"profile": asdict(profile), "outcome": "finished 24 steps", "versions": {"torch": "2.14.1"}}
    return ModelCard.load(ship.write_model_card(folder, run, evaluation, merged))


def test_a_card_says_what_is_known(tmp_path):
    """A wrong licence is a false statement about somebody's work, and a path is nobody's model."""
    card = card_of(tmp_path)
    assert (card.data.license, card.data.base_model) == ("apache-2.0", ship.SMOLLM2)
    assert (card.data.base_model_relation, card.data.library_name) == ("adapter", "peft")
    for words in ("test split", "CC-BY-SA-4.0", build_prompt("{question}"), "has not been evaluated"):
        assert words in card.text, words
    card = card_of(tmp_path, PROFILES["gpu80"], merged=True)
    assert (card.data.license, card.data.base_model_relation) == ("other", "merge")
    for words in ("NVIDIA Open Model License", "Llama 3.1 Community License", "Built with Llama"):
        assert words in card.text
    mine = replace(PROFILES["laptop"], model="/models/mine", data="/mine/rows.json")
    card = card_of(tmp_path, mine)
    assert card.data.base_model is None and "/models" not in card.text and "/mine" not in card.text


def test_a_card_has_no_metric_without_floor_and_interval(tmp_path):
    """A bare 0.40 would be read as 40 %."""
    found = asdict(compare("similarity", [0.4, 0.5, 0.3, 0.45, 0.2], [0.5, 0.5, 0.35, 0.4, 0.3]))
    floors = {"echo the question": {"similarity": 0.527}}
    evaluation = {"rows": 5, "comparisons": {"similarity": found}, "floors": floors}
    text = card_of(tmp_path, evaluation=evaluation).text
    rows = [row for row in text.splitlines() if "| base |" in row or "| semantic similarity" in row]
    cells = dict(zip(*([cell.strip() for cell in row.split("|")] for row in rows), strict=True))
    assert [cells["base"], cells["tuned"]] == [f"{found['base']:.3f}", f"{found['tuned']:.3f}"]
    assert cells["95 % interval"] == f"{found['low']:+.3f} to {found['high']:+.3f}"
    assert cells["echo the question"] == "0.527"
    del evaluation["floors"]
    with pytest.raises(KeyError):
        card_of(tmp_path, evaluation=evaluation)
