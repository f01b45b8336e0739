"""The playground over a real, tiny model; in a browser it is tested in tests/browser/."""

import html
import itertools
import re

import pytest

from fiqa_helpers import generate
from fiqa_helpers.generate import Answer, Playground, generate_answers
from fiqa_helpers.profiles import load_profile

QUESTION = "Is a <b>bond</b> safer?"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tuned(tiny_model):
    """The tiny model under an adapter that changes its answers."""
    import torch
    from peft import get_peft_model

    from fiqa_helpers.model import lora_config

    model = get_peft_model(tiny_model, lora_config(load_profile("tiny")))
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=2.0)
    return model


@pytest.fixture
def ground(tuned, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(generate, "EVERY", 0.0)
    ground = Playground(tuned, tiny_tokenizer, load_profile("tiny"))
    ground.question.value = QUESTION
    return ground


def press_and_wait(ground) -> None:
    ground.ask.click()
    ground.worker.join(120)
    assert not ground.worker.is_alive()


def shown(page: str) -> list[str]:
    """The two answers as a reader sees them, without how they ended."""
    found = re.findall(r"<td[^>]*>(.*?)(?:<br><i>.*?)?</td>", page, re.S)
    return [html.unescape(re.sub(r"</?(span|i)>", "", text)).replace("(nothing)", "") for text in found]


def test_both_answers_are_those_of_the_model_with_and_without_adapter(ground, tuned, tiny_tokenizer):
    """The columns could be swapped, or both be the tuned model's; a model's HTML could be rendered."""
    press_and_wait(ground)
    (with_adapter,) = generate_answers(tuned, tiny_tokenizer, [QUESTION], "plain", ground.length.value)
    with tuned.disable_adapter():
        (without,) = generate_answers(tuned, tiny_tokenizer, [QUESTION], "plain", ground.length.value)
    assert shown(ground.answers.value) == [without.text, with_adapter.text] and without != with_adapter
    assert "Done after" in ground.status.value and "<b>bond" not in ground.answers.value
    ground._draw("?", {"base model": "<script>alert(1)</script>", "tuned model": Answer("<img>", True, 1)})
    assert "<script>" not in ground.answers.value and "<img>" not in ground.answers.value


def test_the_answer_arrives_piece_by_piece(ground):
    """A person would look at an empty box for a minute."""
    ground.length.value, seen = 32, set()
    ground.answers.observe(lambda change: seen.add(shown(change["new"])[1]), "value")
    press_and_wait(ground)
    assert len(seen) >= 5


def test_temperature_and_length_are_used(ground):
    """The sliders could be without effect."""
    ground.length.value = 8
    press_and_wait(ground)
    greedy = ground.answers.value
    ground.temperature.value = 1.5
    press_and_wait(ground)
    assert shown(ground.answers.value) != shown(greedy)
    assert ground.answers.value.count("cut off at 8 tokens") == 2


def test_stop_ends_both_answers(ground):
    """Stop could end the first answer and leave the person to wait for the second."""
    ground.length.value = ground.length.max
    ground.answers.observe(lambda change: ground.stop.click(), "value")
    press_and_wait(ground)
    assert "Stopped after" in ground.status.value
    assert ground.answers.value.count("cut off at 1 token)") == 2


def test_an_error_is_shown_and_ends_the_writing(ground, monkeypatch):
    """An exception in a thread is seen by nobody, and the playground would seem to write for ever."""
    monkeypatch.setattr(ground.model, "generate", lambda **_: 1 / 0)
    press_and_wait(ground)
    assert "It failed: ZeroDivisionError" in ground.status.value and not ground.busy


def test_one_answer_at_a_time(ground):
    """An empty prompt answered with nonsense; two threads that switch the adapter on and off."""
    ground.question.value = "  "
    ground.ask.click()
    assert ground.worker is None and "Type a question" in ground.status.value
    ground.question.value = QUESTION
    ground.start()
    worker = ground.worker
    ground.start()
    assert ground.worker is worker
    worker.join(120)


def test_the_blind_test_is_blind_counts_and_escapes():
    """Cards in the order they came in, or a truth that shows before the guess, make it no test."""
    names = (generate.UNTUNED, "tuned", "a person")
    answers = {name: [f"<i>{name}</i> " + f"{i} " * 80 for i in range(4)] for name in names}
    questions = [f"question {i}?" for i in range(4)]
    cards = generate.blind_cards(questions, answers, lambda text: 0.1 if generate.UNTUNED in text else 0.9)
    assert len(cards) == 10 and {len(card.text.split()) for card in cards} <= {60}
    order = [card.truth for card in cards]
    assert sum(one != other for one, other in itertools.pairwise(order)) > 3, "they come in blocks"
    for card in cards:
        assert card.text in [" ".join(text.split()[:60]) for text in answers[card.truth]]
        assert card.question.split()[1] == f"{card.text.split()[-1]}?", "a card has another's question"
    boxes = generate.blind_test(cards).children
    for (text, buttons, told), card in zip((box.children for box in boxes), cards, strict=True):
        assert "<i>" not in text.value and told.value == ""
        buttons.value = card.truth
        assert f"It is: {card.truth}." in told.value
    assert "10 of 10 right" in told.value and "10 right" in told.value.split("says")[1]
    buttons.value = next(name for name in names if name != card.truth)
    assert "10 of 10 right" in told.value, "only the first guess counts"
    assert not generate.blind_cards(questions, answers)[0].heard
