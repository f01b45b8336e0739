"""The playground over a real, tiny model; in a browser it is tested in tests/browser/."""

import re
import threading

import pytest

from fiqa_helpers.base import WorkshopError
from fiqa_helpers.generate import Playground, generate_answers, playground
from fiqa_helpers.profiles import load_profile

QUESTION = "Is a <b>bond</b> safer?"


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
def ground(tuned, tiny_tokenizer):
    ground = Playground(tuned, tiny_tokenizer, load_profile("tiny"))
    ground.question.value = QUESTION
    return ground


def press_and_wait(ground) -> None:
    ground.ask.click()
    ground.worker.join(120)
    assert not ground.worker.is_alive()


def shown(ground) -> list[str]:
    import html

    found = [re.search(r"<p[^>]*>(.*?)</p>", column.value, re.S)[1] for column in ground.answers]
    return [html.unescape(re.sub(r"</?span>", "", text)) for text in found]


def test_both_answers_are_those_of_the_model_with_and_without_adapter(ground, tuned, tiny_tokenizer):
    """The columns could be swapped, or both be the tuned model's."""
    press_and_wait(ground)
    (with_adapter,) = generate_answers(tuned, tiny_tokenizer, [QUESTION], "plain", ground.length.value)
    with tuned.disable_adapter():
        (without,) = generate_answers(tuned, tiny_tokenizer, [QUESTION], "plain", ground.length.value)
    assert shown(ground) == [without.text, with_adapter.text] and without.text != with_adapter.text
    assert ground.status.value.count("Done after") == 1
    assert not ground.busy


def test_the_answer_arrives_piece_by_piece(ground, monkeypatch):
    """With a slow model, a person would look at an empty box for a minute."""
    monkeypatch.setattr("fiqa_helpers.generate.EVERY", 0.0)
    ground.length.value = 32
    seen = []
    ground.answers[1].observe(lambda change: seen.append(len(shown(ground)[1])), "value")
    press_and_wait(ground)
    assert len(seen) >= 5 and seen[2:-1] == sorted(seen[2:-1])


def test_temperature_and_length_are_used(ground):
    """The sliders could be without effect."""
    ground.length.value = 8
    press_and_wait(ground)
    greedy = shown(ground)
    press_and_wait(ground)
    assert shown(ground) == greedy
    ground.temperature.value = 1.5
    press_and_wait(ground)
    assert shown(ground) != greedy
    assert all("8 tokens, cut at the limit" in column.value for column in ground.answers)


def test_generated_text_is_escaped(ground):
    """A model may write HTML: it must be read, not rendered."""
    ground._write(0, "<script>alert(1)</script>", "<b>end</b>")
    assert "<script>" not in ground.answers[0].value and "<b>end" not in ground.answers[0].value


def test_stop_ends_both_answers(ground, monkeypatch):
    """Stop could end the first answer and leave the person to wait for the second."""
    monkeypatch.setattr("fiqa_helpers.generate.EVERY", 0.0)
    ground.length.value = ground.length.max
    ground.answers[0].observe(lambda change: ground.stop.click(), "value")
    press_and_wait(ground)
    assert "Stopped after" in ground.status.value
    assert shown(ground)[1] == "" and not ground.busy


def test_an_error_is_shown_and_ends_the_writing(ground, monkeypatch):
    """An exception in a thread is seen by nobody, and the playground would seem to write for ever."""
    monkeypatch.setattr(ground.model, "generate", lambda **_: 1 / 0)
    press_and_wait(ground)
    assert "It failed: ZeroDivisionError" in ground.status.value and not ground.busy


def test_an_empty_question_starts_nothing(ground):
    """An empty prompt would be answered with nonsense."""
    ground.question.value = "  "
    ground.ask.click()
    assert ground.worker is None and "Type a question" in ground.status.value
    ground.stop.click()
    assert "Nothing to stop" in ground.status.value


def test_the_buttons_are_never_disabled(ground):
    """A disabled button loses the focus: someone without a mouse would be thrown out of the playground."""
    seen = []
    ground.answers[0].observe(
        lambda change: seen.append((ground.ask.disabled, ground.stop.disabled)), "value"
    )
    press_and_wait(ground)
    assert set(seen) == {(False, False)}


def test_a_second_press_while_it_writes_is_ignored(ground):
    """Two threads that switch the adapter on and off would mix base and tuned answers."""
    ground.start()
    worker = ground.worker
    ground.start()
    assert ground.worker is worker and "Still writing" in ground.status.value
    assert sum(thread.name == "playground" for thread in threading.enumerate()) <= 1
    worker.join(120)


def test_a_model_without_adapter_is_refused_in_one_sentence(tiny_model, tiny_tokenizer):
    """A merged model would show the same answer twice."""
    with pytest.raises(WorkshopError, match="needs a PEFT model"):
        playground(tiny_model, tiny_tokenizer, load_profile("tiny"))
