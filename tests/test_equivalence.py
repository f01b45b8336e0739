"""The heart of the training path: grouping rows changes no loss, no gradient and no validation loss."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
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
    lengths = (999, 60, 999, 20, 40, 9)
    texts = [
        (row["question"], (row["ground_truths"][0] * 9)[:n])
        for row, n in zip(fiqa_rows[:6], lengths, strict=True)
    ]
    made = [encode(*text, llama3_tokenizer, "plain", LIMIT) for text in [*texts, ("Is it?", "")]]
    prompt = made[1]["labels"].count(IGNORE_INDEX)
    made.append({key: values[: prompt + 1] for key, values in made[1].items()})
    assert [labels_in([row]) for row in made[-2:]] == [2, 1]
    assert [len(row["input_ids"]) for row in made].count(LIMIT) >= 2
    return made


def labels_in(rows: list[dict]) -> int:
    return sum(label != IGNORE_INDEX for row in rows for label in row["labels"])


@pytest.fixture(scope="module")
def model(llama3_tokenizer):
    """Tiny fp32 model with LoRA whose B is not zero (else A had no gradient), without dropout."""
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
        collate = StepCollator(llama3_tokenizer.pad_token_id, tokens_per_batch, way.split()[0])
        args = TrainingArguments(str(tmp_path), **settings | arguments)
        return kind(model=model, args=args, data_collator=collate, train_dataset=rows, eval_dataset=rows)

    return make


def by_hand(model, rows: list[dict]) -> torch.Tensor:
    """Nats per answer token: a forward pass for each row alone, its NLL from the logits, nothing shared."""
    total = torch.zeros(())
    for row in rows:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        total = total + functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    return total / labels_in(rows)


def with_gradients(model, loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss as a number, and the gradients of each trained weight."""
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def expected(model, rows: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by hand."""
    model.zero_grad()
    loss = by_hand(model, rows)
    loss.backward()
    return with_gradients(model, loss)


@pytest.fixture(scope="module")
def reference(model, rows):
    """Those of all rows."""
    model.get_base_model().set_attn_implementation("eager")
    return expected(model, rows)


def agree(trainer, rows: list[dict], expected: tuple) -> None:
    """The trainer's own training step over `rows` has this loss and these gradients."""
    trainer.model.zero_grad()
    inputs = trainer.data_collator(rows)
    trained = (inputs["labels"] != IGNORE_INDEX).sum()
    loss = trainer.training_step(trainer.model, inputs, num_items_in_batch=trained)
    found = with_gradients(trainer.model, loss)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1].keys() == expected[1].keys() and len(found[1]) == 2 * 4 * 2
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@ways
@given(budget=st.integers(LIMIT, 8 * LIMIT), order=st.permutations(range(8)))
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_loss_and_gradients_do_not_depend_on_grouping(make_trainer, reference, rows, way, budget, order):
    """Rows seeing one another, padding trained, a mean of means, a label shifted across rows."""
    agree(make_trainer(way, budget, rows), [rows[i] for i in order], reference)
    # a gradient of nothing would agree with anything
    assert all(gradient.abs().max() > 1e-4 for gradient in reference[1].values())


@ways
@pytest.mark.parametrize("chosen", [slice(0, 1), slice(7, 8), slice(6, 8)], ids=["limit", "one label", "two"])
def test_a_step_of_few_rows(make_trainer, model, rows, way, chosen):
    """The last step of an epoch: one row, or a single answer token, divided by the wrong count."""
    trainer = make_trainer(way, LIMIT, rows)
    agree(trainer, rows[chosen], expected(model, rows[chosen]))


@ways
@pytest.mark.parametrize(("eval_batch", "budget"), [(1, LIMIT), (3, 9 * LIMIT), (8, LIMIT)])
def test_validation_loss_is_per_answer_token(make_trainer, reference, rows, way, eval_batch, budget):
    """Trainer's own mean of batch means: the same rows gave 7.188 at batch 1 and 7.288 at batch 4."""
    metrics = make_trainer(way, budget, rows, per_device_eval_batch_size=eval_batch).evaluate()
    assert metrics["eval_loss"] == pytest.approx(reference[0], abs=1e-5)
    assert metrics["eval_tokens"] == labels_in(rows)


class Recorder(AnswerTrainer):
    """Notes the loss by hand of the rows of each step, before the step is made."""

    def __init__(self, data_collator, **kwargs):
        self.collated, self.by_hand = [], []
        collate = lambda rows: self.collated.append(rows) or data_collator(rows)  # noqa: E731
        super().__init__(data_collator=collate, **kwargs)

    def training_step(self, model, *args):
        with torch.no_grad():
            self.by_hand.append(by_hand(model, self.collated[self.state.global_step]).item())
        return super().training_step(model, *args)


@pytest.fixture
def start_again(model):
    """Puts the adapter back to where it was; also at the end of the test."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    yield lambda: model.load_state_dict(before)
    model.load_state_dict(before)


@ways
def test_the_logged_loss_of_each_step_is_that_of_its_rows(make_trainer, start_again, rows, way):
    """A logged loss divided by the wrong count, in a whole run with updates."""
    arguments = {"per_device_train_batch_size": 3, "num_train_epochs": 2, "learning_rate": 1e-2, "seed": 7}
    trainer = make_trainer(way, 2 * LIMIT, rows, Recorder, logging_steps=1, **arguments)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 6  # 8 rows in steps of 3, 3 and 2, twice
    assert logged == pytest.approx(trainer.by_hand, abs=1e-5)
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
        losses[way] = [entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history[:-1]]
        assert len(losses[way]) == 8 + 2  # without the last, the run's summary
        assert losses[way] == pytest.approx(losses["padded"], abs=1e-5)
