"""Generated answers, alone and in a batch; the playground and the blind test."""

import html
import itertools
import re

import pytest
import torch
from peft import get_peft_model

from fiqa_helpers import generate, model
from fiqa_helpers.base import WorkshopError
from fiqa_helpers.generate import Answer, Playground, generate_answers
from fiqa_helpers.profiles import PROFILES
from fiqa_helpers.rows import encode_prompt

QUESTIONS = [
    "What is a bond?",
    "My broker offers an S&P 500 index fund with a 0.03 % fee and an active fund with a 1.2 % fee. I am 25 "
    "and will not touch the money for 40 years. Which of the two should I prefer, and why?",
    "Roth or traditional IRA?",
]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(llama3_tokenizer):
    return model.tiny_model(llama3_tokenizer).eval(), llama3_tokenizer


def adapted(base):
    """The model under an adapter that changes its answers."""
    tuned = get_peft_model(base, model.lora_config(PROFILES["tiny"]))
    torch.manual_seed(0)
    for name, value in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=2.0)
    return tuned


def say(tiny_model, *scripts: list[int]) -> None:
    """Make the model say its script in row r, whatever it is asked; one script is for every row."""
    steps = itertools.count()

    def forced(module, inputs, output):
        step = next(steps)
        output[:, -1, :] = -10.0
        for row in range(len(output)):
            script = scripts[row % len(scripts)]
            output[row, -1, script[min(step, len(script) - 1)]] = 10.0
        return output

    tiny_model.get_output_embeddings().register_forward_hook(forced)


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_a_batch_answers_as_each_question_alone(tiny, style):
    """Padding that is seen, or on the wrong side: short questions get worse answers the longer the others."""
    tuned, how = (adapted(tiny[0]).eval(), tiny[1]), {"style": style, "max_new_tokens": 12}
    together = generate_answers(*tuned, QUESTIONS, **how)
    assert together == [generate_answers(*tuned, [question], **how)[0] for question in QUESTIONS]
    assert len({answer.text for answer in together}) == 3


def test_greedy_answers_are_the_argmax_of_the_model(tiny):
    """Sampling left on by the model's own settings, or a prompt that is not the training prompt."""
    base, tokenizer = tiny
    base.generation_config.do_sample = True
    ids, found = encode_prompt(QUESTIONS[0], tokenizer, "chat"), []
    with torch.no_grad():
        for _ in range(4):
            found.append(int(base(torch.tensor([ids + found])).logits[0, -1].argmax()))
    (answer,) = generate_answers(*tiny, QUESTIONS[:1], "chat", max_new_tokens=4, no_repeat_ngram_size=0)
    assert answer.text == tokenizer.decode(found).strip() and answer.n_tokens == 4 and not answer.stopped


def test_an_end_token_stops_an_answer_and_is_not_part_of_it(tiny):
    """A model that learned to stop counted as one that did not; padding behind an end counted as tokens."""
    base, tokenizer = tiny
    letters, end = tokenizer("abcdefgh", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
    say(base, [*letters[:2], end, letters[0]], letters, [end])
    answers = generate_answers(base, tokenizer, QUESTIONS, max_new_tokens=5)
    assert answers == [Answer("ab", True, 2), Answer("abcde", False, 5), Answer("", True, 0)]


def test_the_text_of_an_end_token_is_no_end(tiny):
    """A generated `<|eot_id|>` spelled in letters cuts an answer that is searched for its text."""
    base, tokenizer = tiny
    spelled = tokenizer("<|eot_id|>!", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    say(base, spelled)
    (answer,) = generate_answers(base, tokenizer, ["Why?"], max_new_tokens=len(spelled))
    assert answer == Answer("<|eot_id|>!", False, len(spelled))


def test_sampling_repeats_with_its_seed_and_leaves_the_random_state_alone(tiny):
    """Samples in the middle of a training run change the run, and a resumed one is another."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = generate_answers(*tiny, QUESTIONS, max_new_tokens=8, temperature=1.0, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert generate_answers(*tiny, QUESTIONS, max_new_tokens=8, temperature=1.0, seed=1) == first
    assert generate_answers(*tiny, QUESTIONS, max_new_tokens=8, temperature=1.0, seed=2) != first


def test_the_model_is_given_back_as_it_was(tiny):
    """Dropout on while answering, off for the rest of the training, or on for the rest of the evaluation."""
    tuned, tokenizer = adapted(tiny[0]), tiny[1]
    tuned.base_model.model.model.layers[0].self_attn.q_proj.lora_dropout["default"].p = 0.9
    expected = generate_answers(tuned.eval(), tokenizer, QUESTIONS, max_new_tokens=6)
    assert not tuned.training
    assert generate_answers(tuned.train(), tokenizer, QUESTIONS, max_new_tokens=6) == expected
    with pytest.raises(ValueError):
        generate_answers(tuned, tokenizer, QUESTIONS[:1], max_new_tokens=2, no_such_option=1)
    assert tuned.training


def test_the_guard_is_on_unless_it_is_switched_off(tiny):
    """Base guarded and tuned not, or the other way round: the comparison would measure the decoding."""
    loop = [tiny[1].convert_tokens_to_ids(letter) for letter in "ab"]

    def answer(**how):
        base = model.tiny_model(tiny[1]).eval()
        say(base, loop * 10)
        return generate_answers(base, tiny[1], ["Why?"], max_new_tokens=12, **how)[0].text

    assert answer(no_repeat_ngram_size=0) == "ab" * 6
    assert answer().startswith("ababa") and "ababab" not in answer()


def test_a_question_beyond_what_the_model_reads_is_refused(tiny):
    """Ten thousand words answered out of positions that the model never saw, without a word about it."""
    with pytest.raises(WorkshopError, match="shorten the question"):
        generate_answers(*tiny, ["bond " * 1000, "Why?"], max_new_tokens=8)
    assert generate_answers(*tiny, []) == []


# --- the playground and the blind test

QUESTION = "Is a <b>bond</b> safer?"


@pytest.fixture
def ground(tiny_model, tiny_tokenizer):
    ground = Playground(adapted(tiny_model), tiny_tokenizer, PROFILES["tiny"])
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


def test_both_answers_arrive_and_are_those_of_the_model_with_and_without_adapter(ground, tiny_tokenizer):
    """Columns swapped, or both the tuned model's; an empty box for a minute; sliders without effect."""
    seen = set()
    ground.answers.observe(lambda change: seen.add(shown(change["new"])[1]), "value")
    for temperature in (0.0, 1.5):
        ground.temperature.value = temperature
        press_and_wait(ground)
        how = (tiny_tokenizer, [QUESTION], "plain", ground.length.value, temperature)
        (tuned,) = generate_answers(ground.model, *how)
        with ground.model.disable_adapter():
            (base,) = generate_answers(ground.model, *how)
        assert shown(ground.answers.value) == [base.text, tuned.text] and base != tuned
    assert "Done after" in ground.status.value and "<b>bond" not in ground.answers.value
    assert len(seen) >= 5


def test_stop_ends_both_answers(ground):
    """Stop could end the first answer and leave the person to wait for the second."""
    ground.length.value = ground.length.max
    ground.answers.observe(lambda change: ground.stop.click(), "value")
    press_and_wait(ground)
    assert "Stopped after" in ground.status.value
    assert ground.answers.value.count("cut off at 1 token)") == 2


def test_one_answer_at_a_time_and_an_error_is_shown(ground, monkeypatch):
    """Two threads that switch the adapter on and off; an exception in a thread, which nobody sees."""
    ground.start()
    worker = ground.worker
    ground.start()
    assert ground.worker is worker
    worker.join(120)
    monkeypatch.setattr(ground.model, "generate", lambda **_: 1 / 0)
    press_and_wait(ground)
    assert "It failed: ZeroDivisionError" in ground.status.value


def test_the_blind_test_is_blind_counts_and_escapes():
    """Cards in the order they came in, or a truth that shows before the guess, make it no test."""
    names, questions = (generate.UNTUNED, "tuned", "a person"), [f"question {i}?" for i in range(4)]
    answers = {name: [f"<i>{name}</i> " + f"{i} " * 80 for i in range(4)] for name in names}
    cards = generate.blind_cards(questions, answers, lambda text: 0.1 if generate.UNTUNED in text else 0.9)
    order = list(cards["truth"])
    assert sum(one != other for one, other in itertools.pairwise(order)) > 3, "they come in blocks"
    for card, box in zip(cards.itertuples(), generate.blind_test(cards).children, strict=True):
        text, buttons, told = box.children
        assert card.text in [" ".join(text.split()[:60]) for text in answers[card.truth]]
        assert card.question.split()[1] == f"{card.text.split()[-1]}?", "a card has another's question"
        assert "<i>" not in text.value and told.value == ""
        buttons.value = card.truth
        assert f"It is: {card.truth}." in told.value and card.voice in told.value
    buttons.value = next(name for name in names if name != card.truth)
    assert "10 of 10 right" in told.value, "only the first guess counts"
