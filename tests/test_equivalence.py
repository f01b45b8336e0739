"""The heart of the training path: grouping rows changes no loss, no gradient and no validation loss."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_fast import per_row_sdpa
from torch.nn import functional
from transformers import TrainingArguments

from fiqa_helpers.machinery import fast
from fiqa_helpers.model import tiny_model
from fiqa_helpers.rows import IGNORE_INDEX, StepCollator, encode
from fiqa_helpers.trainer import AnswerTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
LIMIT = 320  # max_length here, in tokens; a token is a byte
IMPLEMENTATIONS = {"padded": "sdpa", "packed": "sdpa", "packed kernel": fast.NAME}
ways = pytest.mark.parametrize("way", IMPLEMENTATIONS)


@pytest.fixture(scope="module")
def rows(llama3_tokenizer, fiqa_rows):
    """Eight rows: two cut at the limit, one with a one-token answer and its end, one with a single label."""
    made = [
        encode(row["question"], (row["ground_truths"][0] * 9)[:n], llama3_tokenizer, "plain", LIMIT)
        for row, n in zip(fiqa_rows, (999, 60, 999, 20, 40, 9), strict=False)
    ]
    made.append(encode("Is it?", "", llama3_tokenizer, "plain", LIMIT))
    prompt = made[1]["labels"].count(IGNORE_INDEX)
    made.append({key: values[: prompt + 1] for key, values in made[1].items()})
    trained = [sum(label != IGNORE_INDEX for label in row["labels"]) for row in made]
    assert trained[-2:] == [2, 1] and [len(row["input_ids"]) for row in made].count(LIMIT) >= 2
    return made


@pytest.fixture(scope="module")
def model(llama3_tokenizer):
    """Tiny fp32 model with LoRA whose B is not zero (else A had no gradient), without dropout."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(tiny_model(llama3_tokenizer), lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def make_trainer(model, llama3_tokenizer, tmp_path, monkeypatch):
    """trainer(way, tokens_per_batch, rows): the workshop's own trainer on the model, freshly configured."""
    monkeypatch.setattr(fast, "_kernel", per_row_sdpa)
    fast.register_packed_attention()

    def make(way: str, tokens_per_batch: int, rows: list[dict], kind=AnswerTrainer, **arguments):
        model.get_base_model().set_attn_implementation(IMPLEMENTATIONS[way])
        settings = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        return kind(
            model=model,
            args=TrainingArguments(str(tmp_path), **settings | arguments),
            data_collator=StepCollator(llama3_tokenizer.pad_token_id, tokens_per_batch, way.split()[0]),
            train_dataset=rows,
            eval_dataset=rows,
        )

    return make


def by_hand(model, rows: list[dict]) -> torch.Tensor:
    """Nats per answer token: a forward pass for each row alone, its NLL from the logits, nothing shared."""
    total, tokens = torch.zeros(()), 0
    for row in rows:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        log_p = functional.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0], dim=-1)
        for position in range(1, len(ids)):
            if labels[position] != IGNORE_INDEX:
                total = total - log_p[position - 1, ids[position]]
                tokens += 1
    return total / tokens


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def agree(found: tuple, expected: tuple) -> None:
    """Two losses, and the gradients of each weight."""
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1].keys() == expected[1].keys() and len(found[1]) == 2 * 4 * 2
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def reference(model, rows):
    """Loss and gradients by hand."""
    model.get_base_model().set_attn_implementation("eager")
    model.zero_grad()
    loss = by_hand(model, rows)
    loss.backward()
    return loss.item(), gradients(model)


def step(trainer, rows: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step over `rows`, through the trainer's own training step."""
    trainer.model.zero_grad()
    inputs = trainer.data_collator(rows)
    trained = (inputs["labels"] != IGNORE_INDEX).sum()
    loss = trainer.training_step(trainer.model, inputs, num_items_in_batch=trained)
    return loss.item(), gradients(trainer.model)


@ways
@given(budget=st.integers(LIMIT, 8 * LIMIT))
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_loss_and_gradients_do_not_depend_on_the_grouping(make_trainer, reference, rows, way, budget):
    """Rows seeing one another, padding trained, a mean of means, a label shifted across rows."""
    agree(step(make_trainer(way, budget, rows), rows), reference)
    # a gradient of nothing would agree with anything
    assert all(gradient.abs().max() > 1e-4 for gradient in reference[1].values())


@ways
def test_the_order_of_the_rows_does_not_matter(make_trainer, reference, rows, way):
    """A row weighted by where it stands in its group."""
    agree(step(make_trainer(way, 3 * LIMIT, rows), rows[::-1]), reference)


@ways
@pytest.mark.parametrize("chosen", [slice(0, 1), slice(7, 8), slice(6, 8)], ids=["limit", "one label", "two"])
def test_a_step_of_few_rows(make_trainer, model, rows, way, chosen):
    """The last step of an epoch: one row, or a single answer token, divided by the wrong count."""
    found = step(make_trainer(way, LIMIT, rows), rows[chosen])
    model.zero_grad()
    expected = by_hand(model, rows[chosen])
    expected.backward()
    agree(found, (expected.item(), gradients(model)))


@ways
@pytest.mark.parametrize("eval_batch", [1, 3, 8])
@pytest.mark.parametrize("budget", [LIMIT, 9 * LIMIT])
def test_validation_loss_is_per_answer_token(make_trainer, reference, rows, way, eval_batch, budget):
    """Trainer's own mean of batch means: the same rows gave 7.188 at batch 1 and 7.288 at batch 4."""
    metrics = make_trainer(way, budget, rows, per_device_eval_batch_size=eval_batch).evaluate()
    assert metrics["eval_loss"] == pytest.approx(reference[0], abs=1e-5)
    assert metrics["eval_tokens"] == sum(label != IGNORE_INDEX for row in rows for label in row["labels"])


class Recorder(AnswerTrainer):
    """Notes the loss by hand of the rows of each step, before the step is made."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        rows = [row for batch in inputs["micro_batches"] for row in rows_of(batch)]
        with torch.no_grad():
            self.expected.append(by_hand(model, rows).item())
        return super().training_step(model, inputs, num_items_in_batch)


def rows_of(batch: dict) -> list[dict]:
    """The rows of a micro-batch, without padding."""
    if "attention_mask" in batch:
        lengths, of = batch["attention_mask"].sum(1).tolist(), lambda name: batch[name]
    else:
        lengths = batch["cu_seq_lens_q"].diff().tolist()
        of = lambda name: batch[name][0].split(lengths)  # noqa: E731
    rows = zip(of("input_ids"), of("labels"), lengths, strict=True)
    return [{"input_ids": ids[:n].tolist(), "labels": labels[:n].tolist()} for ids, labels, n in rows]


@pytest.fixture
def start_again(model):
    """Puts the adapter back to where it was; also at the end of the test."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]

    def restore() -> None:
        with torch.no_grad():
            for parameter, value in zip(trained, before, strict=True):
                parameter.copy_(value)

    yield restore
    restore()


@ways
def test_the_logged_loss_of_each_step_is_that_of_its_rows(make_trainer, start_again, rows, way):
    """A logged loss divided by the wrong count, in a whole run with updates."""
    arguments = {"per_device_train_batch_size": 3, "num_train_epochs": 2, "learning_rate": 1e-2, "seed": 7}
    trainer = make_trainer(way, 2 * LIMIT, rows, Recorder, logging_steps=1, **arguments)
    trainer.expected = []
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 6  # 8 rows in steps of 3, 3 and 2, twice
    assert logged == pytest.approx(trainer.expected, abs=1e-5)
    assert sum(logged[3:]) < sum(logged[:3]) - 0.01  # it did learn something


def test_a_run_is_the_same_in_every_layout(make_trainer, start_again, rows):
    """Small differences that add up over the steps of a run."""
    arguments = {"per_device_train_batch_size": 4, "max_steps": 8, "learning_rate": 5e-3, "warmup_steps": 1}
    arguments |= {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 4}
    losses = {}
    for way, budget in (("padded", 3 * LIMIT), ("packed", LIMIT), ("packed kernel", 9 * LIMIT)):
        start_again()
        trainer = make_trainer(way, budget, rows, **arguments)
        trainer.train()
        history = [(name, entry[name]) for entry in trainer.state.log_history for name in entry]
        losses[way] = [value for name, value in history if name in ("loss", "eval_loss")]
        assert len(losses[way]) == 8 + 2
    assert losses["packed"] == pytest.approx(losses["padded"], abs=1e-5)
    assert losses["packed kernel"] == pytest.approx(losses["padded"], abs=1e-5)
