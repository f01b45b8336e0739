"""What the trainer does otherwise on a GPU: numbers that come later are neither lost nor out of order."""

import math

import pytest
import torch
from transformers import TrainingArguments

from fiqa_helpers.machinery import fast
from fiqa_helpers.rows import StepCollator
from fiqa_helpers.trainer import AnswerTrainer


class Event:
    """A CUDA event that is over when told so."""

    def __init__(self):
        self.over = False

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        self.over = True


def pending(watch: fast.Watch, steps: int) -> list[Event]:
    """Steps whose numbers the GPU has not computed yet: loss = step, norm = 10 x step."""
    events = [Event() for _ in range(steps)]
    for step, event in enumerate(events, start=1):
        watch._pending.append((event, step, torch.tensor([step / 2, step / 2, 10.0 * step]), [{}, {}]))
    return events


def test_on_a_cpu_a_step_is_known_at_once():
    """A loss that is no number must stop the run before the optimizer, as it always did there."""
    watch = fast.Watch()
    watch.add(7, [torch.tensor(1.0), torch.tensor(math.inf)], torch.tensor(2.0), ["a", "b"], optimizer=None)
    (numbers,) = watch.known()
    assert numbers == fast.Numbers(7, [1.0, math.inf], 2.0, ["a", "b"])
    assert list(watch.known(wait=True)) == []


def test_what_is_not_computed_yet_is_not_waited_for():
    """Asking too early empties the GPU's queue: a fifth of every step."""
    watch = fast.Watch()
    first, second, _ = pending(watch, 3)
    assert list(watch.known()) == []
    second.over = True  # of no use while the first is not
    assert list(watch.known()) == []
    first.over = True
    assert [numbers.step for numbers in watch.known()] == [1, 2]


def test_no_more_than_a_few_steps_are_outstanding():
    """A broken run that is noticed a thousand steps later."""
    watch = fast.Watch()
    pending(watch, fast.MOST_PENDING + 2)
    assert [numbers.step for numbers in watch.known()] == [1, 2]


def test_before_a_checkpoint_everything_is_looked_at():
    """An adapter saved although its last step was bad."""
    watch = fast.Watch()
    pending(watch, 3)
    found = list(watch.known(wait=True))
    assert [(n.step, sum(n.shares), n.norm) for n in found] == [
        (1, 1.0, 10.0),
        (2, 2.0, 20.0),
        (3, 3.0, 30.0),
    ]


def test_a_cpu_run_gets_no_gpu_options():
    """Arguments that only Liger understands, in a model without it."""
    assert fast.loss_options({"input_ids": torch.zeros(1, 4), "cu_seq_lens_q": None}) == {}


def test_a_machine_with_several_gpus(tiny_model, tmp_path):
    """Where torch sees two GPUs, the Trainer spread the model over both, and the first step failed."""
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    assert args.n_gpu == 0
    args._n_gpu = 2  # what it finds on such a machine
    trainer = AnswerTrainer(model=tiny_model, args=args, data_collator=StepCollator(0, 64, "padded"))
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == args.per_device_train_batch_size


@pytest.mark.cuda
def test_on_a_gpu_the_optimizer_skips_a_bad_step(tiny_model, tiny_tokenizer, tmp_path):
    """The run stops some steps after the bad one: the adapter must not have taken it."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    from fiqa_helpers.base import WorkshopError

    for parameter in tiny_model.parameters():
        parameter.data = parameter.data.bfloat16()
    model = get_peft_model(tiny_model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 64
    seen: dict[int, torch.Tensor] = {}

    class Poisoned(AnswerTrainer):
        def loss_sum(self, model, micro_batch):
            step = self.state.global_step
            seen[step] = next(p for n, p in self.model.named_parameters() if "lora_B" in n).detach().clone()
            loss = super().loss_sum(model, micro_batch)
            return loss * (float("nan") if step == 3 else 1.0)

    trainer = Poisoned(
        model=model,
        args=TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=12,
            learning_rate=1e-2,
            logging_steps=100,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=StepCollator(tiny_tokenizer.pad_token_id, 64, "padded"),
    )
    with pytest.raises(WorkshopError, match="at step 4"):
        trainer.train()
    assert all(weights.isfinite().all() for weights in seen.values())
    assert torch.equal(seen[3], seen[4]) if 4 in seen else True
