"""What the trainer does otherwise on a GPU: bf16 copies of fp32 weights, and nobody waits for a number."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from fiqa_helpers.base import WorkshopError
from fiqa_helpers.machinery import fast
from fiqa_helpers.machinery.fast import ForwardCopies
from fiqa_helpers.rows import StepCollator
from fiqa_helpers.trainer import AnswerTrainer


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
    """Weights left as bf16 forget small steps; ones left as fp32 are cast in every layer."""
    copies, before, ids = ForwardCopies(tuned), dict(tuned.named_parameters()), torch.arange(12)[None]
    with copies():
        inside = {name: copy for name, copy in tuned.named_parameters() if copy.requires_grad}
        assert len(inside) == 8 and {copy.dtype for copy in inside.values()} == {torch.bfloat16}
        assert all(torch.equal(copy, before[name].bfloat16()) for name, copy in inside.items())
        tuned(input_ids=ids, labels=ids, use_cache=False).loss.backward()
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


def test_weights_come_back_after_an_error(tuned):
    """Out of memory in the middle of a step: what is saved then must be the fp32 weights."""
    copies = ForwardCopies(tuned)
    with pytest.raises(RuntimeError, match="memory"), copies():
        raise RuntimeError("out of memory")
    assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {torch.float32}


def test_one_dtype_needs_no_copies(tiny_model):
    """The laptop profile is fp32 throughout: bitwise the same run as without, and no GPU's options."""
    model = get_peft_model(tiny_model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    copies = ForwardCopies(model)
    with copies():
        assert copies.copies == [] and {p.dtype for p in model.parameters()} == {torch.float32}
    assert fast.loss_options({"input_ids": torch.zeros(1, 4), "cu_seq_lens_q": None}) == {}


def test_a_machine_with_several_gpus(tiny_model, tmp_path):
    """Where torch sees two GPUs, the Trainer spread the model over both, and the first step failed."""
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    assert args.n_gpu == 0
    args._n_gpu = 2  # what it finds on such a machine
    trainer = AnswerTrainer(model=tiny_model, args=args, data_collator=StepCollator(0, 64, "padded"))
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == args.per_device_train_batch_size


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
    """One `.item()` in a step empties the queue: a fifth of the speed of the 8B model.

    torch says so itself: in its sync debug mode every call that waits is an error.
    """

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
