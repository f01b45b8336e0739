"""What the workshop says about a machine: GPUs that cannot be used, memory, requirements with remedies."""

import json
import subprocess
import sys

import pytest

from fiqa_helpers import profiles
from fiqa_helpers.machinery import machine

PROBE = """
import dataclasses, json, sys
from fiqa_helpers.machinery import machine
card = machine.gpu()
print(json.dumps([card and dataclasses.asdict(card), "torch" in sys.modules]))
"""


def no_nvidia_device() -> bool:
    import torch

    return not torch.cuda.is_available()


@pytest.fixture
def fake_driver(tmp_path, monkeypatch):
    """An nvidia-smi that lists a card, as on a machine whose driver torch cannot work with."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "NVIDIA A10G, 470.57.02, 22731, 22000"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def probe(**environment: str) -> tuple[dict | None, bool]:
    """machine.gpu() in a fresh interpreter: (the card or None, whether torch was imported)."""
    import os

    run = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, env=os.environ | environment
    )
    assert run.returncode == 0, run.stderr
    return tuple(json.loads(run.stdout))


def test_no_gpu_is_found_without_importing_torch():
    """Asking for the profile on a laptop must not cost the seconds of a torch import."""
    if machine._from_nvidia_smi() or machine._from_proc() or not no_nvidia_device():
        pytest.skip("this machine has an NVIDIA GPU")
    card, imported = probe()
    assert card is None
    assert not imported


def test_a_gpu_that_torch_cannot_use_is_named(fake_driver):
    """A card with an old driver was passed over in silence, and the laptop run taken for all there is."""
    if not no_nvidia_device():
        pytest.skip("torch can use this machine's GPU")
    card, _ = probe()
    assert card["name"] == "NVIDIA A10G"
    assert card["driver"] == "470.57.02"
    assert card["total_gib"] == pytest.approx(22731 / 1024)
    assert "470.57.02" in card["problem"]


def test_a_gpu_hidden_by_the_environment_is_named(fake_driver):
    """CUDA_VISIBLE_DEVICES="" left over in a shell looked like a broken driver."""
    card, _ = probe(CUDA_VISIBLE_DEVICES="")
    assert "CUDA_VISIBLE_DEVICES" in card["problem"]


def test_old_driver_gets_its_own_sentence(fake_driver, monkeypatch):
    """torch's own message for an old driver must end in the remedy; torch raises it in cuda.init()."""
    import torch

    def init():
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040). Please update your driver."
        )

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    problem = machine.gpu().problem
    assert "driver 470.57.02 is too old for torch" in problem
    assert "update the NVIDIA driver" in problem


def test_auto_profile_names_the_unusable_gpu(fake_driver, monkeypatch):
    """Profile auto falls back to laptop only with the card and the reason printed."""
    if not no_nvidia_device():
        pytest.skip("torch can use this machine's GPU")
    name, reason = profiles.choose_profile()
    assert name == "laptop"
    assert "NVIDIA A10G cannot be used" in reason


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 6), True),  # same generation, newer
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),  # machine code does not cross generations
        ("sm_90a", (9, 0), True),
        ("compute_90", (10, 0), True),  # PTX does
        ("compute_120", (9, 0), False),
        ("sm_100", (10, 0), True),
        ("sm_75", (7, 0), False),  # a V100 with a torch built from sm_75 on
    ],
)
def test_which_cards_a_torch_build_covers(arch, capability, runs):
    """A card that torch has no code for fails at the first kernel, minutes into a run."""
    assert machine._covers(arch, *capability) is runs


@pytest.mark.cuda
def test_real_gpu_is_described():
    """Free memory, capability and bf16 decide the profile."""
    if no_nvidia_device():
        pytest.skip("no NVIDIA GPU here")
    card = machine.gpu()
    assert not card.problem
    assert 0 < card.free_gib <= card.total_gib
    assert card.bf16 == (float(card.capability) >= 8)


def test_peak_memory_grows_with_what_is_allocated():
    """The peak of a child process must be its own, not what its parent held before starting it."""
    code = "from fiqa_helpers.machinery.machine import peak_memory_gib as p\n"
    code += "a = p(); x = b'1' * 2**29; print(a, p())"
    before, after = map(float, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert before < 0.3
    assert 0.45 < after - before < 0.6


def test_describe_is_json_and_complete():
    """A run card with a value that JSON cannot hold would be lost at the end of a training."""
    described = json.loads(json.dumps(machine.describe()))
    assert {"system", "python", "cpu", "cores", "ram_gib", "disk_free_gib", "gpu"} == set(described)
    assert described["cores"] >= 1
    assert described["ram_gib"] > 0.5
