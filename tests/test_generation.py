"""Generated answers: a batch gives what each question alone would, and leaves no trace in a training run."""

import pytest
import torch

from fiqa_helpers import model
from fiqa_helpers.base import WorkshopError
from fiqa_helpers.generate import Answer, generate_answers
from fiqa_helpers.machinery import fast
from fiqa_helpers.profiles import load_profile
from fiqa_helpers.rows import encode_prompt

QUESTIONS = [
    "What is a bond?",
    "My broker offers an S&P 500 index fund with a 0.03 % fee and an active fund with a 1.2 % fee. I am 25 "
    "and will not touch the money for 40 years. Which of the two should I prefer, and why?",
    "Roth or traditional IRA?",
]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def real(smollm2):
    """SmolLM2 with its real weights, through plain transformers, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    tokenizer = model.load_tokenizer(load_profile("laptop"))
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval(), tokenizer


def test_a_batch_answers_as_each_question_alone(real):
    """Padding that is seen, or on the wrong side: short questions get worse answers the longer the others."""
    together = generate_answers(*real, QUESTIONS, "chat", max_new_tokens=6)
    alone = [generate_answers(*real, [question], "chat", max_new_tokens=6)[0] for question in QUESTIONS]
    assert together == alone
    assert len({answer.text for answer in alone}) == 3


def test_greedy_answers_are_the_argmax_of_the_model(real):
    """Sampling left on by the model's own settings, or a prompt that is not the training prompt."""
    base, tokenizer = real
    ids = encode_prompt(QUESTIONS[0], tokenizer, "chat")
    found = []
    with torch.no_grad():
        for _ in range(4):
            found.append(int(base(torch.tensor([ids + found])).logits[0, -1].argmax()))
    (answer,) = generate_answers(
        base, tokenizer, QUESTIONS[:1], "chat", max_new_tokens=4, no_repeat_ngram_size=0
    )
    assert answer.text == tokenizer.decode(found).strip() and answer.n_tokens == 4 and not answer.stopped


@pytest.fixture
def tiny(llama3_tokenizer):
    return model.tiny_model(llama3_tokenizer).eval(), llama3_tokenizer


def say(tiny_model, *scripts: list[int]) -> None:
    """Make the model say its script in row r, whatever it is asked; one script is for every row."""
    steps = iter(range(1_000))

    def forced(module, inputs, output):
        step = next(steps)
        output[:, -1, :] = -10.0
        for row in range(len(output)):
            script = scripts[row % len(scripts)]
            output[row, -1, script[min(step, len(script) - 1)]] = 10.0
        return output

    tiny_model.get_output_embeddings().register_forward_hook(forced)


END = "<end>"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (["o", "k", END, "o"], Answer("ok", True, 2)),  # its end token is not part of it
        (["o", "k", "a", "y"], Answer("okay", False, 4)),  # cut at the limit: not ended
        ([END], Answer("", True, 0)),
    ],
    ids=["ended", "at the limit", "ended at once"],
)
def test_an_end_token_stops_an_answer_and_is_not_part_of_it(tiny, script, expected):
    """A model that learned to stop counted as one that did not, or its end token shown to the reader."""
    base, tokenizer = tiny
    ends = {END: tokenizer.eos_token_id}
    say(base, [ends.get(letter) or tokenizer.convert_tokens_to_ids(letter) for letter in script])
    assert generate_answers(base, tokenizer, ["Why?", "How?"], max_new_tokens=4) == [expected] * 2


def test_the_text_of_an_end_token_is_no_end(tiny):
    """A generated `<|eot_id|>` spelled in letters cuts an answer that is searched for its text."""
    base, tokenizer = tiny
    spelled = tokenizer("<|eot_id|>!", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    say(base, spelled)
    (answer,) = generate_answers(base, tokenizer, ["Why?"], max_new_tokens=len(spelled))
    assert answer == Answer("<|eot_id|>!", False, len(spelled))


def test_rows_that_stop_at_different_times(tiny):
    """The padding behind a short answer counted as its tokens, or taken for its end."""
    base, tokenizer = tiny
    letters = tokenizer("abcdefgh", add_special_tokens=False)["input_ids"]
    say(base, [*letters[:2], tokenizer.eos_token_id], letters, [*letters[:4], tokenizer.eos_token_id])
    answers = generate_answers(base, tokenizer, QUESTIONS, max_new_tokens=5)
    assert answers == [Answer("ab", True, 2), Answer("abcde", False, 5), Answer("abcd", True, 4)]


def test_sampling_repeats_with_its_seed_and_leaves_the_random_state_alone(tiny):
    """Samples in the middle of a training run change the run, and a resumed one is another."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = generate_answers(*tiny, QUESTIONS, max_new_tokens=8, temperature=1.0, seed=1)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    assert generate_answers(*tiny, QUESTIONS, max_new_tokens=8, temperature=1.0, seed=1) == first
    assert generate_answers(*tiny, QUESTIONS, max_new_tokens=8, temperature=1.0, seed=2) != first


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_given_back_as_it_was(tiny, training):
    """Dropout silently off for the rest of the training, or on for the rest of the evaluation."""
    base, tokenizer = tiny
    base.train(training)
    generate_answers(base, tokenizer, QUESTIONS[:1], max_new_tokens=2)
    assert base.training is training and base.model.layers[0].training is training
    with pytest.raises(ValueError):
        generate_answers(base, tokenizer, QUESTIONS[:1], max_new_tokens=2, no_such_option=1)
    assert base.training is training


def test_dropout_is_off_while_answering(tiny):
    """Sample answers under dropout are worse than the model is."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, lora_dropout=0.9, target_modules=["q_proj"], init_lora_weights=False)
    tuned = get_peft_model(tiny[0], lora).eval()
    torch.nn.init.normal_(tuned.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    expected = generate_answers(tuned, tiny[1], QUESTIONS, max_new_tokens=6)
    assert generate_answers(tuned.train(), tiny[1], QUESTIONS, max_new_tokens=6) == expected
    assert tuned.training


def test_answers_under_packed_attention_equal_those_without(tiny):
    """A packed training run samples its answers from padded prompts: the padding must be masked there too."""
    base, tokenizer = tiny
    expected = generate_answers(base, tokenizer, QUESTIONS, max_new_tokens=8)
    base.set_attn_implementation(fast.register_packed_attention())
    assert generate_answers(base, tokenizer, QUESTIONS, max_new_tokens=8) == expected


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_a_batch_of_a_random_model_answers_as_each_question_alone(tiny, style):
    """The same for a tokenizer that writes BOS: padding before it, or a second one."""
    together = generate_answers(*tiny, QUESTIONS, style, max_new_tokens=12)
    assert together == [generate_answers(*tiny, [q], style, max_new_tokens=12)[0] for q in QUESTIONS]


def test_the_guard_is_on_unless_it_is_switched_off(tiny):
    """Base guarded and tuned not, or the other way round: the comparison would measure the decoding."""
    loop = [tiny[1].convert_tokens_to_ids(letter) for letter in "ab"]

    def answer(**how):
        base = model.tiny_model(tiny[1]).eval()
        say(base, loop * 10)
        return generate_answers(base, tiny[1], ["Why?"], max_new_tokens=12, **how)[0].text

    assert answer(no_repeat_ngram_size=0) == "ab" * 6
    guarded = answer()
    assert guarded.startswith("ababa") and "ababab" not in guarded
    assert answer(no_repeat_ngram_size=4) == guarded


def test_a_question_beyond_what_the_model_reads_is_refused(tiny):
    """Ten thousand words answered out of positions that the model never saw, without a word about it."""
    with pytest.raises(WorkshopError, match="shorten the question"):
        generate_answers(*tiny, ["bond " * 1000, "Why?"], max_new_tokens=8)
    assert generate_answers(*tiny, []) == []
