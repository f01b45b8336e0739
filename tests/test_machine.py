"""What the workshop says about a machine: GPUs that cannot be used, memory, requirements with remedies."""

import dataclasses
import json
import subprocess
import sys

import pytest

from fiqa_helpers import profiles
from fiqa_helpers.base import Workspace
from fiqa_helpers.machinery import checks, machine

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


def by_name(results: list[checks.Check]) -> dict[str, checks.Check]:
    return {check.name: check for check in results}


def test_this_environment_passes_for_the_laptop(tmp_path, smollm2, fiqa_rows):
    """What `make test` runs in is what the README promises: every requirement met."""
    results = checks.checks(Workspace(str(tmp_path)), profiles.load_profile("laptop"))
    assert [check for check in results if not check.ok] == []
    assert checks.report(results).endswith("Ready.")


def test_a_profile_out_of_reach_fails_with_remedies(tmp_path):
    """Each FAIL names what to do; `profile gpu80 needs more` alone helps nobody."""
    if not no_nvidia_device():
        pytest.skip("this machine has a GPU")
    model = tmp_path / "nowhere"
    model.mkdir()
    profile = dataclasses.replace(profiles.PROFILES["gpu80"], model=str(model), data=str(tmp_path))
    results = by_name(checks.checks(Workspace(str(tmp_path)), profile))
    assert not results["GPU"].ok
    assert not results["Model"].ok
    assert "config.json" in results["Model"].remedy
    assert all(check.remedy for check in results.values() if not check.ok)
    text = checks.report(list(results.values()))
    assert "FAIL  GPU" in text
    assert "requirements are not met" in text


def test_a_wrong_package_version_is_named(monkeypatch):
    """A library upgraded by hand explains most strange results."""
    real = checks.metadata.version
    monkeypatch.setattr(checks.metadata, "version", lambda name: "0.0.1" if name == "peft" else real(name))
    check = checks._packages()
    assert not check.ok
    assert "peft is 0.0.1, pinned 0." in check.detail


def test_a_local_build_of_torch_counts_as_the_pinned_version(monkeypatch):
    """torch 2.14.1+cu128 is what people install for another CUDA: not a failure."""
    real = checks.metadata.version
    pinned = dict(checks._pins(checks.project_root() / "constraints.txt"))["torch"]
    versions = {"torch": f"{pinned}+cu128"}
    monkeypatch.setattr(checks.metadata, "version", lambda name: versions.get(name) or real(name))
    assert "torch is" not in checks._packages().detail


def test_folder_that_does_not_exist_yet_is_checked_on_its_disk(tmp_path):
    """workdir and cache are made later; their disk is known now."""
    assert checks._disk("Disk", tmp_path / "a" / "b", 0, "").ok
    full = checks._disk("Disk", tmp_path, 10**9, "use another")
    assert not full.ok
    assert "10" in full.remedy
