"""fp32 weights for the optimizer, bf16 copies for the forward pass: nothing is lost on the way."""

import pytest
import torch

from fiqa_helpers.machinery.fast import ForwardCopies


@pytest.fixture
def tuned(tiny_model):
    """The tiny model in bf16 with fp32 adapters, as on a GPU."""
    from peft import LoraConfig, get_peft_model

    for parameter in tiny_model.parameters():
        parameter.data = parameter.data.bfloat16()
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def backward(model) -> None:
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def test_forward_sees_copies_and_the_optimizer_fp32(tuned):
    """Weights left as bf16 forget small steps; ones left as fp32 are cast in every layer."""
    copies = ForwardCopies(tuned)
    before = dict(tuned.named_parameters())
    with copies():
        inside = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
        assert {p.dtype for p in inside.values()} == {torch.bfloat16}
        for name, copy in inside.items():
            assert torch.equal(copy, before[name].bfloat16())
        backward(tuned)
    after = dict(tuned.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert len(inside) == 8
    for name in inside:
        assert after[name].dtype == after[name].grad.dtype == torch.float32


def test_gradients_add_up_in_fp32(tuned):
    """Micro-batches of a step added in bf16 lose the small ones: 1 + 1/512 is 1 there."""
    copies = ForwardCopies(tuned)
    for part in (1.0, 1 / 512):
        with copies():
            for copy in copies.copies:
                copy.grad = torch.full_like(copy, part)
    assert all(torch.all(weight.grad == 1 + 1 / 512) for weight in copies.weights)


def test_copies_follow_the_optimizer(tuned):
    """Copies made once would train the weights of step 0 for ever."""
    copies = ForwardCopies(tuned)
    with torch.no_grad():
        copies.weights[0].add_(1.0)
    with copies():
        assert torch.equal(copies.copies[0], copies.weights[0].bfloat16())


def test_weights_come_back_after_an_error(tuned):
    """Out of memory in the middle of a step: what is saved then must be the fp32 weights."""
    copies = ForwardCopies(tuned)
    with pytest.raises(RuntimeError, match="memory"), copies():
        raise RuntimeError("out of memory")
    assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {torch.float32}


def test_one_dtype_needs_no_copies(tiny_model):
    """The laptop profile is fp32 throughout: no copies, no cost, bitwise the same run as without."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    copies = ForwardCopies(model)
    assert copies.copies == []
    with copies():
        assert {p.dtype for p in model.parameters()} == {torch.float32}
