"""What the workshop says about a machine: GPUs that cannot be used, memory, requirements with remedies."""

import json
import subprocess
import sys

import pytest

from fiqa_helpers import profiles
from fiqa_helpers.machinery import machine

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
