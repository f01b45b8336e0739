"""The fused LoRA layer computes what PEFT's does, and hands everything else back to PEFT."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parent.parent

# Triton chooses its interpreter when it is imported, so the kernels run on the CPU in a process of their own.
INTERPRETED = """
import torch
from fiqa_helpers.machinery import fused_lora

def apply(x, weight, a, b, probability):
    torch.manual_seed(5)
    return fused_lora._LoraLinear.apply(x, weight, None, a, b, 2.0, probability)

torch.manual_seed(0)
CASES = [(37, 64, 48, 8, 0.0), (70, 144, 32, 5, 0.3), (20, 512, 64, 16, 0.5)]
for tokens, width, out, rank, probability in CASES:
    sizes = (tokens, width), (rank, width), (out, rank)
    x, a, b = (torch.randn(*size, requires_grad=True) for size in sizes)
    weight, g = torch.randn(out, width), torch.randn(tokens, out)
    # The mask, read off through adapters that let one part of ones through at a time.
    mask = torch.zeros(tokens, width)
    for start in range(0, width, 16):
        few, ones = torch.eye(width)[start : start + 16], torch.ones(tokens, width)
        read = apply(ones, torch.zeros(16, width), few, torch.eye(16), probability)
        mask[:, start : start + 16] = read / 2
    kept = (mask > 0).float()
    assert abs(kept.mean().item() - (1 - probability)) < 0.03, kept.mean()
    torch.testing.assert_close(mask, kept / (1 - probability))
    assert probability == 0 or (kept[:, 0] != kept[:, width // 4]).any()  # quarters draw for themselves
    found = apply(x, weight, a, b, probability)
    expected = x @ weight.T + 2.0 * ((x * mask) @ a.T) @ b.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(y, (x, a, b), g) for y in (found, expected)]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)
print("agreed")
"""


def test_kernels_agree_with_the_formula():
    """A mask that differs between forward and backward, a tile's edge computed twice, a lost scale."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    import os

    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "agreed", result.stderr[-2000:]


@pytest.fixture
def tuned(tiny_model):
    """The tiny model with an adapter that does something."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("state", ["eval", "disabled", "merged", "other dtype"])
def test_the_rest_is_left_to_peft(tuned, state, monkeypatch):
    """Evaluation, the base's answers, a merged adapter, fp32 adapters in a bf16 model: PEFT's own way."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    from fiqa_helpers.machinery import fused_lora

    def fail(*args):
        raise AssertionError("the fused layer ran")

    monkeypatch.setattr(fused_lora._LoraLinear, "apply", fail)
    ids = torch.arange(6)[None]
    tuned.train(state != "eval")
    if state == "other dtype":
        tuned.get_base_model().lm_head.weight.data = tuned.get_base_model().lm_head.weight.data.bfloat16()
        for name, parameter in tuned.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
    if state == "merged":
        tuned.merge_adapter()
    off = tuned.disable_adapter() if state == "disabled" else torch.no_grad()
    with off, torch.no_grad():
        expected = tuned(ids).logits
        with fused_lora.fuse_lora(tuned):
            torch.testing.assert_close(tuned(ids).logits, expected)


def test_it_is_the_fused_layer_that_runs_in_training(tuned, monkeypatch):
    """All of the above would also hold if the fused layer never ran."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    from fiqa_helpers.machinery import fused_lora

    calls = []
    apply = lambda x, weight, *rest: calls.append(1) or torch.nn.functional.linear(x, weight)  # noqa: E731
    monkeypatch.setattr(fused_lora._LoraLinear, "apply", apply)
    with fused_lora.fuse_lora(tuned.train()):
        tuned(torch.arange(6)[None])
        assert len(calls) == 4 * tuned.config.num_hidden_layers
    tuned(torch.arange(6)[None])
    assert len(calls) == 4 * tuned.config.num_hidden_layers, "PEFT's layers were not put back"


@pytest.mark.cuda
@pytest.mark.parametrize("probability", [0.0, 0.05])
@pytest.mark.parametrize("tokens", [5, 1000, 8192])
def test_on_the_gpu_it_agrees_with_fp64(probability, tokens):
    """The compiled kernels, in bf16, at the 8B model's sizes: within rounding of the formula in fp64."""
    from fiqa_helpers.machinery import fused_lora

    torch.manual_seed(0)
    for width, out in ((4096, 4096), (4096, 1024)):
        x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        a = (torch.randn(8, width, device="cuda") / 64).bfloat16().requires_grad_()
        b = (torch.randn(out, 8, device="cuda") / 3).bfloat16().requires_grad_()
        weight = (torch.randn(out, width, device="cuda") / 64).bfloat16()
        g = torch.randn(tokens, out, device="cuda", dtype=torch.bfloat16)

        def mask_of(width=width):
            kept = []
            for start in range(0, width, 64):
                rows = torch.eye(width, device="cuda", dtype=torch.bfloat16)[start : start + 64]
                ones = torch.ones(tokens, width, device="cuda", dtype=torch.bfloat16)
                eye = torch.eye(64, device="cuda", dtype=torch.bfloat16)
                torch.manual_seed(5)
                zero = torch.zeros(64, width, device="cuda", dtype=torch.bfloat16)
                kept.append(fused_lora._LoraLinear.apply(ones, zero, None, rows, eye, 1.0, probability) > 0)
            return torch.cat(kept, 1) / (1 - probability)

        torch.manual_seed(5)
        found = fused_lora._LoraLinear.apply(x, weight, None, a, b, 4.0, probability)
        grads = torch.autograd.grad(found, (x, a, b), g)
        exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
        dropped = exact[0] * mask_of().double()
        expected = exact[0] @ weight.double().T + 4.0 * (dropped @ exact[1].T) @ exact[2].T
        expected_grads = torch.autograd.grad(expected, exact, g.double())
        for one, two in zip((found, *grads), (expected, *expected_grads), strict=True):
            assert (one.double() - two).norm() <= 0.01 * two.norm()
