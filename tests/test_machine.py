"""What the workshop says about a machine: unusable GPUs, memory; and the memory ledger of a run."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fiqa_helpers import model, profiles
from fiqa_helpers.machinery import machine
from fiqa_helpers.profiles import PROFILES

CONFIG = machine.nemotron_config()
GPU80 = PROFILES["gpu80"]
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has an NVIDIA GPU")
def test_no_gpu_is_found_without_importing_torch():
    """Asking for the profile on a laptop must not cost the seconds of a torch import."""
    code = "import sys; from fiqa_helpers.machinery.machine import gpu; print(gpu(), 'torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "None False"
    assert machine.gpu() is None  # and the same with torch


def test_a_gpu_that_torch_cannot_use_is_named(monkeypatch):
    """Passed over in silence, and the laptop run taken for all there is."""

    def fail(*_):
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(machine.os.path, "exists", lambda path: path == "/dev/nvidiactl")
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    name, reason = profiles.choose_profile()
    assert name == "laptop" and "cannot be used: The NVIDIA driver on your system is too old" in reason
    assert "CUDA_VISIBLE_DEVICES ''" in reason


@pytest.mark.cuda
def test_real_gpu_is_described():
    """Free memory, capability and bf16 decide the profile."""
    card = machine.gpu()
    assert not card.problem and 0 < card.free_gib <= card.total_gib


def test_memory_of_a_container_counts(monkeypatch):
    """A hosted room of 4 GB on a server of 500: the kernel dies where the check said OK."""
    monkeypatch.setattr(machine, "_read", lambda path: "2147483648\n" if path.endswith("memory.max") else "")
    assert machine.ram_gib() == 2.0
    monkeypatch.setattr(machine, "_read", lambda path: "max\n")
    assert machine.ram_gib() > 2.0


def test_peak_memory_grows_with_what_is_allocated():
    """The peak of a child process must be its own, not what its parent held before starting it."""
    code = "from fiqa_helpers.machinery.machine import peak_memory_gib as p\n"
    code += "a = p(); x = b'1' * 2**29; print(a, p())"
    before, after = map(float, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert before < 0.3 and 0.45 < after - before < 0.6


@pytest.mark.parametrize("targets", [GPU80.lora_targets, ALL_LINEAR])
def test_parameters_agree_with_the_meta_device(smollm2, targets):
    """Arithmetic that drifts from the architecture predicts another model's memory."""
    profile = replace(GPU80, lora_targets=targets)
    trainable, base = model.count_parameters(model.reference_config(), model.lora_config(profile))
    assert machine.base_parameters(CONFIG) == base == 8_030_261_248
    assert machine.lora_parameters(CONFIG, profile.lora_rank, targets) == trainable
    tied = machine.config_of(replace(GPU80, model=str(smollm2)))  # its output layer is its embedding
    assert machine.base_parameters(tied) == 134_515_008


@pytest.mark.parametrize("free", [79, 40, 19, 17, 8])
def test_advice_names_what_to_change_and_then_fits(free):
    """'Out of memory' alone sends people to a forum; advice that does not fit either does so twice."""
    advice = machine.memory_advice(GPU80, CONFIG, free)
    settings = re.search(r"^the run needs about \d+ GiB .* set (.+) in overrides$", advice)
    if free == 79:
        assert advice == ""
    elif free == 8:
        assert "use a larger card, a smaller model or profile laptop" in advice
    else:
        changes = settings[1].replace(" and ", ", ")
        assert changes.startswith("gradient_checkpointing: true")
        assert ("tokens_per_batch" in changes) == (free < 20)
        followed = profiles.planned_profile("gpu80", f"{{{changes}}}")
        assert machine.predict_memory(followed, CONFIG)["total"] <= free
