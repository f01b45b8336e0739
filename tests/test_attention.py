"""Packed attention: each row for itself, causal, whatever stands beside it."""

import copy
import inspect

import pytest
import torch
from torch.nn import functional

from fiqa_helpers import model
from fiqa_helpers.machinery import fast
from fiqa_helpers.rows import IGNORE_INDEX, encode, pack_rows, pad_rows

LOSS_ONLY = ("labels", "shift_labels", "logits_to_keep")
pytestmark = pytest.mark.usefixtures("one_thread")


def per_row_sdpa(query, key, value, limits, longest, scaling):
    """What the CUDA kernel computes, row by row: (tokens, heads, size) in and out."""
    assert limits.dtype == torch.int32 and longest == int(limits.diff().max())
    rows = []
    for start, end in zip(limits[:-1].tolist(), limits[1:].tolist(), strict=True):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        rows.append(out[0].transpose(0, 1))
    return torch.cat(rows)


@pytest.fixture
def rows(llama3_tokenizer, fiqa_rows):
    """Four rows: two cut at their limit, one with a single trained token."""
    made = [
        encode(row["question"], row["ground_truths"][0], llama3_tokenizer, "plain", max_length=n)
        for row, n in zip(fiqa_rows, (400, 390, 301, 400), strict=False)
    ]
    prompt = made[1]["labels"].count(IGNORE_INDEX)
    made[1] = {key: values[: prompt + 1] for key, values in made[1].items()}
    return made


@pytest.fixture
def tiny_model(llama3_tokenizer):
    """Over a vocabulary of bytes, which makes the tests fast."""
    return model.tiny_model(llama3_tokenizer)


@pytest.fixture
def packed_model(tiny_model, monkeypatch):
    """The tiny model (4 query, 2 key heads) on the registered function; only its kernel is replaced."""
    monkeypatch.setattr(fast, "_kernel", per_row_sdpa)
    tiny_model.set_attn_implementation(fast.register_packed_attention())
    return tiny_model.eval()


def logits(model, batch: dict, use_cache: bool = False) -> torch.Tensor:
    inputs = {key: value for key, value in batch.items() if key not in LOSS_ONLY}
    with torch.no_grad():
        return model(**inputs, use_cache=use_cache).logits


def split(packed: torch.Tensor, rows: list[dict]) -> list[torch.Tensor]:
    """Logits of packed rows, one tensor for each row."""
    return list(packed[0].split([len(row["input_ids"]) for row in rows]))


def with_one_row_changed(rows: list[dict], changed: int) -> list[dict]:
    """The same lengths, other ids in row `changed`."""
    other = [{**row} for row in rows]
    other[changed]["input_ids"] = [token + 1 for token in rows[changed]["input_ids"]]
    return other


def test_registered_function_gives_the_padded_models_logits(packed_model, rows, monkeypatch):
    """Heads repeated in the wrong order, limits off by one, a wrong scale; or it is never called at all."""
    calls = []
    monkeypatch.setattr(fast, "_kernel", lambda *args: calls.append(args) or per_row_sdpa(*args))
    packed = split(logits(packed_model, pack_rows(rows)), rows)
    assert len(calls) == packed_model.config.num_hidden_layers
    assert calls[0][0].shape[1:] == (4, 16) and calls[0][1].shape[1:] == (2, 16)
    packed_model.set_attn_implementation("sdpa")
    padded = logits(packed_model, pad_rows(rows, 0))
    for row, one, many in zip(rows, packed, padded, strict=True):
        torch.testing.assert_close(one, many[: len(row["input_ids"])], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changed", range(4))
@pytest.mark.parametrize("implementation", ["registered", "sdpa"])
def test_changing_one_row_leaves_the_others_bitwise_unchanged(packed_model, rows, implementation, changed):
    """Rows that see one another: the loss moves by 1.5e-4, which no test of losses notices."""
    if implementation == "sdpa":
        packed_model.set_attn_implementation("sdpa")
    other = with_one_row_changed(rows, changed)
    before, after = (split(logits(packed_model, pack_rows(r)), rows) for r in (rows, other))
    for i in range(4):
        assert torch.equal(before[i], after[i]) == (i != changed)


def test_a_cache_makes_rows_see_one_another(packed_model, rows):
    """The reason for `use_cache=False` in the trainer, and a proof that the test above can fail."""
    packed_model.set_attn_implementation("sdpa")
    batches = [pack_rows(rows), pack_rows(with_one_row_changed(rows, 0))]
    before, after = (split(logits(packed_model, batch, use_cache=True), rows) for batch in batches)
    assert not torch.equal(before[3], after[3])


def test_later_tokens_change_nothing_before_them(packed_model, rows):
    """A kernel that is not causal: it would be trained with the answer in sight."""
    whole = split(logits(packed_model, pack_rows(rows)), rows)
    other = [{**row, "input_ids": [*row["input_ids"][:-1], 7]} for row in rows]
    changed = split(logits(packed_model, pack_rows(other)), rows)
    for one, two in zip(whole, changed, strict=True):
        assert torch.equal(one[:-1], two[:-1]) and not torch.equal(one[-1], two[-1])


def test_the_kernel_is_called_as_this_torch_declares_it(packed_model, rows, monkeypatch):
    """An argument renamed in torch, or its default window, which lets a token see those after it."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    signature, seen = inspect.signature(varlen.varlen_attn), []

    def stand_in(*args, **kwargs):
        call = signature.bind(*args, **kwargs).arguments
        seen.append(call)
        assert torch.equal(call["cu_seq_q"], call["cu_seq_k"]) and call["max_q"] == call["max_k"]
        return per_row_sdpa(*(call[name] for name in ("query", "key", "value", "cu_seq_q", "max_q", "scale")))

    expected = logits(packed_model, pack_rows(rows))
    monkeypatch.undo()  # the module's own kernel call again
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    assert torch.equal(logits(packed_model, pack_rows(rows)), expected)
    assert len(seen) == 2 and all(call["window_size"] == (-1, 0) for call in seen)


def test_padded_rows_under_the_registered_name(packed_model, rows):
    """Sample answers during a packed run are generated from padded rows: their padding must not be seen."""
    batch = pad_rows(rows, 0)
    for side in (batch, {k: batch[k].flip(1) for k in ("input_ids", "attention_mask")}):
        real = side["attention_mask"] == 1
        positions = {"position_ids": (side["attention_mask"].cumsum(1) - 1).clamp(0)}
        expected = logits(packed_model, side | positions)
        side["input_ids"] = side["input_ids"].where(real, torch.tensor(77))  # other padding
        assert torch.equal(logits(packed_model, side | positions)[real], expected[real])


def test_packed_rows_on_a_gpu_take_the_kernel():
    """The kernel has no CPU version."""
    elsewhere = [("padded", "cuda"), ("padded", "cpu"), ("packed", "cpu")]
    assert {fast.attention_implementation(*place) for place in elsewhere} == {"sdpa"}
    assert fast.attention_implementation("packed", "cuda") == fast.NAME


@pytest.mark.cuda
class TestOnCuda:
    """The real kernel, in bf16, on the same rows."""

    @pytest.fixture
    def models(self, tiny_model):
        """(fp32 model on sdpa, the same in bf16 on sdpa, the same in bf16 on the kernel)"""
        rounded, packed = (copy.deepcopy(tiny_model).to("cuda", torch.bfloat16).eval() for _ in range(2))
        packed.set_attn_implementation(fast.register_packed_attention())
        return tiny_model.cuda().eval(), rounded, packed

    @staticmethod
    def on_gpu(batch: dict) -> dict:
        return {k: v.cuda() if torch.is_tensor(v) else v for k, v in batch.items()}

    def test_kernel_agrees_with_sdpa(self, models, rows):
        """A kernel that is not causal, mixes rows, or lacks a backward pass: far off bf16's rounding."""
        exact, rounded, kernel = models
        padded, near = (logits(m, self.on_gpu(pad_rows(rows, 0))).float() for m in (exact, rounded))
        packed = split(logits(kernel, self.on_gpu(pack_rows(rows))).float(), rows)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            allowed = 2 * (near[i, :n] - padded[i, :n]).abs().max()
            assert (packed[i] - padded[i, :n]).abs().max() <= allowed
        for one, batch in ((exact, pad_rows(rows, 0)), (kernel, pack_rows(rows))):
            one(**self.on_gpu(batch), use_cache=False, num_items_in_batch=1).loss.backward()
        for one, two in zip(exact.parameters(), kernel.parameters(), strict=True):
            cosine = functional.cosine_similarity(one.grad.flatten(), two.grad.float().flatten(), dim=0)
            assert cosine > 0.999

    @pytest.mark.parametrize("changed", range(4))
    def test_changing_one_row_leaves_the_others_bitwise_unchanged(self, models, rows, changed):
        """Limits that the kernel reads otherwise than we do."""
        other = with_one_row_changed(rows, changed)
        before, after = (split(logits(models[2], self.on_gpu(pack_rows(r))), rows) for r in (rows, other))
        for i in range(4):
            assert torch.equal(before[i], after[i]) == (i != changed)
