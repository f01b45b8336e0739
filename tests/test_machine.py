"""What the workshop says about a machine: GPUs that cannot be used, memory, requirements with remedies."""

import dataclasses
import json
import subprocess
import sys

import pytest

from fiqa_helpers import profiles
from fiqa_helpers.base import Workspace
from fiqa_helpers.machinery import checks, machine

NO_DRIVER = RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update.")


def no_nvidia_device() -> bool:
    import torch

    return not torch.cuda.is_available()


@pytest.fixture
def unusable_gpu(monkeypatch):
    """A device file is there, and torch cannot work with its driver."""
    import torch

    def fail(*_):
        raise NO_DRIVER

    monkeypatch.setattr(machine.os.path, "exists", lambda path: path == "/dev/nvidiactl")
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_no_gpu_is_found_without_importing_torch():
    """Asking for the profile on a laptop must not cost the seconds of a torch import."""
    if not no_nvidia_device():
        pytest.skip("this machine has an NVIDIA GPU")
    code = (
        "import sys; from fiqa_helpers.machinery import machine; print(machine.gpu(), 'torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "None False"
    assert machine.gpu() is None  # and the same with torch


def test_a_gpu_that_torch_cannot_use_is_named(unusable_gpu):
    """Passed over in silence, and the laptop run taken for all there is."""
    problem = machine.gpu().problem
    assert "driver on your system is too old" in problem and "CUDA_VISIBLE_DEVICES ''" in problem
    name, reason = profiles.choose_profile()
    assert name == "laptop" and "cannot be used: The NVIDIA driver" in reason


def test_memory_of_a_container_counts(monkeypatch):
    """A hosted room of 4 GB on a server of 500: the kernel dies where the check said OK."""
    whole = machine.ram_gib()
    monkeypatch.setattr(machine, "_read", lambda path: "2147483648\n" if path.endswith("memory.max") else "")
    assert machine.ram_gib() == 2.0
    monkeypatch.setattr(machine, "_read", lambda path: "max\n")
    assert machine.ram_gib() >= whole


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
