"""The GPU's path: packed attention, each row for itself; bf16 copies; nobody waits for a number."""

import copy
import inspect

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import TrainingArguments

from fiqa_helpers import model
from fiqa_helpers.base import WorkshopError
from fiqa_helpers.machinery import fast
from fiqa_helpers.machinery.fast import ForwardCopies
from fiqa_helpers.rows import IGNORE_INDEX, StepCollator, encode, pack_rows, pad_rows
from fiqa_helpers.trainer import AnswerTrainer

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


def on(device, batch: dict) -> dict:
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}


def logits(model, batch: dict, use_cache: bool = False) -> torch.Tensor:
    inputs = {key: value for key, value in on(model.device, batch).items() if key not in LOSS_ONLY}
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


def nobody_sees_another_row(net, rows: list[dict]) -> None:
    """Changing a row changes that row's logits, and no bit of the others'."""
    before = split(logits(net, pack_rows(rows)), rows)
    for changed in range(4):
        after = split(logits(net, pack_rows(with_one_row_changed(rows, changed))), rows)
        same = [torch.equal(*pair) for pair in zip(before, after, strict=True)]
        assert same == [i != changed for i in range(4)]


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


@pytest.mark.parametrize("implementation", [fast.NAME, "sdpa"])
def test_changing_one_row_leaves_the_others_bitwise_unchanged(packed_model, rows, implementation):
    """Rows that see one another: the loss moves by 1.5e-4, which no test of losses notices."""
    packed_model.set_attn_implementation(implementation)
    nobody_sees_another_row(packed_model, rows)


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
    batch = {key: pad_rows(rows, 0)[key].flip(1) for key in ("input_ids", "attention_mask")}
    real = batch["attention_mask"] == 1
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(0)
    expected = logits(packed_model, batch)
    batch["input_ids"] = batch["input_ids"].where(real, torch.tensor(77))  # other padding
    assert torch.equal(logits(packed_model, batch)[real], expected[real])


@pytest.mark.cuda
def test_on_a_gpu_the_kernel_agrees_with_sdpa(tiny_model, rows):
    """A kernel that is not causal, mixes rows, or lacks a backward pass: far off bf16's rounding."""
    rounded, kernel = (copy.deepcopy(tiny_model).to("cuda", torch.bfloat16).eval() for _ in range(2))
    kernel.set_attn_implementation(fast.register_packed_attention())
    nobody_sees_another_row(kernel, rows)
    exact = tiny_model.cuda().eval()
    padded, near = (logits(net, pad_rows(rows, 0)).float() for net in (exact, rounded))
    packed = split(logits(kernel, pack_rows(rows)).float(), rows)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        allowed = 2 * (near[i, :n] - padded[i, :n]).abs().max()
        assert (packed[i] - padded[i, :n]).abs().max() <= allowed
    for net, batch in ((exact, pad_rows(rows, 0)), (kernel, pack_rows(rows))):
        net(**on("cuda", batch), use_cache=False, num_items_in_batch=1).loss.backward()
    for one, two in zip(exact.parameters(), kernel.parameters(), strict=True):
        cosine = functional.cosine_similarity(one.grad.flatten(), two.grad.float().flatten(), dim=0)
        assert cosine > 0.999


# --- what the trainer does otherwise on a GPU


@pytest.fixture
def tuned(tiny_model):
    """The tiny model in bf16 with fp32 adapters, as on a GPU."""
    for parameter in tiny_model.parameters():
        parameter.data = parameter.data.bfloat16()
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_forward_sees_copies_and_the_optimizer_fp32(tuned):
    """Weights left as bf16, also after an error, forget small steps; fp32 ones are cast in layers."""
    copies, before, ids = ForwardCopies(tuned), dict(tuned.named_parameters()), torch.arange(12)[None]
    with copies():
        inside = {name: copy for name, copy in tuned.named_parameters() if copy.requires_grad}
        assert len(inside) == 8 and {copy.dtype for copy in inside.values()} == {torch.bfloat16}
        assert all(torch.equal(copy, before[name].bfloat16()) for name, copy in inside.items())
        tuned(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with pytest.raises(RuntimeError, match="memory"), copies():
        raise RuntimeError("out of memory")
    after = dict(tuned.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert {after[name].grad.dtype for name in inside} == {torch.float32}


def test_gradients_add_up_in_fp32(tuned):
    """Micro-batches of a step added in bf16 lose the small ones: 1 + 1/512 is 1 there."""
    copies = ForwardCopies(tuned)
    for part in (1.0, 1 / 512):
        with copies():
            for copy in copies.copies:
                copy.grad = torch.full_like(copy, part)
    assert all(torch.all(weight.grad == 1 + 1 / 512) for weight in copies.weights)
    with torch.no_grad():
        copies.weights[0].add_(1.0)  # the optimizer's step: copies made once would train step 0 for ever
    with copies():
        assert torch.equal(copies.copies[0], copies.weights[0].bfloat16())


def test_a_machine_with_several_gpus(tiny_model, tmp_path):
    """Where torch sees two GPUs, the Trainer spread the model over both, and the first step failed."""
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    args._n_gpu = 2  # what it finds on such a machine
    trainer = AnswerTrainer(model=tiny_model, args=args, data_collator=StepCollator(0, 64, "padded"))
    assert (trainer.args.n_gpu, trainer.args.train_batch_size) == (1, args.per_device_train_batch_size)


def test_torchs_norm_is_the_models(tiny_model):
    """Another RMSNorm, with another epsilon or weight, would be another model."""
    ids = torch.arange(20)[None]
    expected = tiny_model(ids).logits
    fast.lighten_norms(tiny_model)
    assert tiny_model.model.norm.forward.__func__ is fast._rms_norm
    torch.testing.assert_close(tiny_model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def trainer_of(kind: type, model, folder, layout: str, **arguments) -> AnswerTrainer:
    """A trainer over 64 short rows that neither saves nor prints."""
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False}
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 64
    args = TrainingArguments(str(folder), **quiet, **arguments)
    collator = StepCollator(0, 64, layout)
    return kind(model=model, args=args, train_dataset=Dataset.from_list(rows), data_collator=collator)


@pytest.mark.cuda
@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_on_a_gpu_the_optimizer_skips_a_bad_step(tuned, tmp_path, poison):
    """The run stops at the next log or checkpoint: the adapter must not have taken the step until then."""
    seen: dict[int, torch.Tensor] = {}
    weight = next(p for n, p in tuned.named_parameters() if "lora_B" in n)

    class Poisoned(AnswerTrainer):
        def training_step(self, *args):
            step = self.state.global_step
            seen[step] = weight.detach().clone()
            loss = super().training_step(*args)
            if step == 3 and poison == "gradient":
                weight.grad[0] = float("inf")
            return loss

        def loss_sum(self, *args):
            bad = self.state.global_step == 3 and poison == "loss"
            return super().loss_sum(*args) * (float("nan") if bad else 1.0)

    options = {"per_device_train_batch_size": 4, "max_steps": 12, "learning_rate": 1e-2, "logging_steps": 10}
    trainer = trainer_of(Poisoned, tuned, tmp_path, "padded", **options)
    with pytest.raises(WorkshopError, match="at step 10: lower learning_rate"):
        trainer.train()
    assert torch.equal(seen[3], seen[4]) and not torch.equal(seen[2], seen[3])
    assert all(weights.isfinite().all() for weights in seen.values())


@pytest.mark.cuda
def test_nothing_in_a_step_waits_for_the_gpu(tuned, tmp_path):
    """One `.item()` in a step empties the queue: a fifth of the 8B model's speed. torch itself says so."""

    class Watched(AnswerTrainer):
        def training_step(self, *args):
            if self.state.global_step == 3:
                torch.cuda.set_sync_debug_mode("error")
            try:
                loss = super().training_step(*args)
                norm = self._clip_grad_norm(self.model)
                self._get_grad_norm(self.model, norm)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            return loss

    tuned.set_attn_implementation(fast.attention_implementation("packed", "cuda"))
    trainer = trainer_of(Watched, tuned, tmp_path, "packed", max_steps=5, logging_steps=5)
    trainer.train()
    assert trainer.state.global_step == 5
