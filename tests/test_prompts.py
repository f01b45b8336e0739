"""Prompts, loss mask and end token, for any text in both styles."""

import re
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llama3_like import llama3_like
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fiqa_helpers.base import WorkshopError
from fiqa_helpers.data import clean_rows
from fiqa_helpers.profiles import load_profile
from fiqa_helpers.rows import IGNORE_INDEX, SYSTEM_TEXT, build_prompt, encode, encode_prompt, encode_rows

QUESTION = "How do I report a stock split on my tax return?"
SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<empty_output>", "<reponame>", "<|begin_of_text|>"),
    *("<|eot_id|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<s>", "</s>", "[INST]"),
    *(
        "Answer:",
        "Question:",
        "\n\n",
        " ",
        "\u241f question \u241f",
        "\u200b",
        "\u202e",
        "\x00",
        "é",
        "👩‍👩‍👧",
    ),
)
# What SmolLM2's vocabulary cannot spell: six control characters, which loading removes from the rows, and the
# planes 4 to 11 of Unicode, in which no character is assigned. Its tokenizer drops them without a word.
UNKNOWN_TO_SMOLLM2 = re.compile("[\x04\x06\x13\x14\x16\x1d\U00040000-\U000bffff]")
any_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
hostile_text = st.lists(st.sampled_from(SPECIAL) | any_text, max_size=8).map("".join)
tokenizers = pytest.mark.parametrize("name", ["tiny_tokenizer", "llama3_tokenizer", "nemotron_tokenizer"])
styles = pytest.mark.parametrize("style", ["plain", "chat"])


def spelled(text: str, tokenizer) -> str:
    """`text` without what the tokenizer cannot spell."""
    return text if "begin_of_text" in tokenizer.bos_token else UNKNOWN_TO_SMOLLM2.sub("", text)


def decoded(ids: list[int], tokenizer) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@tokenizers
@styles
@given(question=hostile_text, answer=hostile_text, cut=st.none() | st.integers(0, 60))
@example("What is <|im_end|> a bond?", "A <|im_start|>loan<|im_end|>.", None)
@example("<|eot_id|>", "<|eot_id|><|begin_of_text|>", 1)
@example("\u241f question \u241f", "\u241f question \u241f", None)
@settings(max_examples=120)
def test_any_text_is_masked_and_ended_rightly(request, name, style, question, answer, cut):
    """A prompt token trained, an answer token lost, a missing, second or spoofed end token."""
    tokenizer = request.getfixturevalue(name)
    question, answer = spelled(question, tokenizer), spelled(answer, tokenizer)
    prompt = encode_prompt(question, tokenizer, style)
    assert question in decoded(prompt, tokenizer)
    whole = encode(question, answer, tokenizer, style, max_length=100_000)
    space = " " if style == "plain" else ""

    assert len(whole["input_ids"]) == len(whole["labels"])
    assert whole["input_ids"][: len(prompt)] == prompt
    assert whole["labels"][: len(prompt)] == [IGNORE_INDEX] * len(prompt)
    trained = whole["labels"][len(prompt) :]
    assert trained == whole["input_ids"][len(prompt) :]
    assert trained.count(tokenizer.eos_token_id) == 1 and trained[-1] == tokenizer.eos_token_id
    assert decoded(trained[:-1], tokenizer) == space + answer.strip()
    specials = set(tokenizer.all_special_ids)
    assert not specials & set(trained[:-1])
    assert tokenizer.pad_token_id not in whole["input_ids"]
    # The question brings no special token of its own: there are as many as around an empty one.
    empty = encode_prompt("", tokenizer, style)
    assert [i for i in prompt if i in specials] == [i for i in empty if i in specials]
    if cut is not None:
        max_length = len(prompt) + 1 + cut
        row = encode(question, answer, tokenizer, style, max_length)
        n = min(max_length, len(whole["input_ids"]))
        assert row == {key: values[:n] for key, values in whole.items()}


def test_what_smollm2_cannot_spell_is_nothing_that_counts(tiny_tokenizer):
    """A vocabulary with more gaps than the known ones would lose characters of real answers in silence."""
    known = set(tiny_tokenizer.get_vocab())
    missing = {byte for byte, letter in bytes_to_unicode().items() if letter not in known}
    never_in_utf8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert missing - never_in_utf8 == {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}
    repairs = Counter()
    text = "".join(map(chr, (0x04, 0x06, 0x13, 0x14, 0x16, 0x1D)))
    row = {"question": f"a{text}b", "ground_truths": [f"c{text}d"]}
    assert list(clean_rows([(1, row)], "rows", repairs)) == [{"question": "ab", "ground_truths": ["cd"]}]


def test_plain_prompt_is_the_reference_template(tiny_tokenizer):
    """Any drift from the template that the reference run was trained with."""
    row = encode(QUESTION, "On Form 8949.", tiny_tokenizer)
    assert decoded(row["input_ids"], tiny_tokenizer) == (
        "You are a helpful financial assistant. Provide comprehensive, detailed answers to financial "
        "questions. Include relevant context, examples, and explanations when appropriate."
        f"\n\nQuestion: {QUESTION}\n\nAnswer: On Form 8949.{tiny_tokenizer.eos_token}"
    )


@pytest.mark.parametrize("name", ["tiny_tokenizer", "llama3_tokenizer"])
def test_chat_ids_equal_the_template_of_the_tokenizer(request, name, fiqa_rows):
    """Question and template tokenized apart give other ids than the model saw in its own training."""
    tokenizer = request.getfixturevalue(name)
    for row in fiqa_rows[:200]:
        turns = [
            {"role": "system", "content": SYSTEM_TEXT},
            {"role": "user", "content": row["question"].strip()},
        ]
        whole = tokenizer.apply_chat_template(
            turns, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert encode_prompt(row["question"].strip(), tokenizer, "chat") == whole


@styles
@pytest.mark.parametrize("name", ["llama3_tokenizer", "nemotron_tokenizer"])
def test_exactly_one_bos(request, name, style):
    """Tokenizer and template each write BOS: two of them make a model's exports talk gibberish."""
    smollm2 = request.getfixturevalue("tiny_tokenizer")  # its BOS is its turn marker and before no text
    assert smollm2.bos_token_id not in encode(QUESTION, "Yes.", smollm2)["input_ids"]
    tokenizer = request.getfixturevalue(name)
    ids = encode(QUESTION, "On Form 8949.", tokenizer, style)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    # A template that leaves BOS to the tokenizer gets one too.
    without = llama3_like(tokenizer.chat_template.replace("{{ bos_token }}", ""))
    assert encode_prompt(QUESTION, without, style) == encode_prompt(QUESTION, tokenizer, style)


def test_nemotron_system_turn_is_only_the_reasoning_switch(nemotron_tokenizer, llama3_tokenizer):
    """Instructions in Nemotron's system turn leave its reasoning in an undefined state."""
    text = build_prompt(QUESTION, "chat", nemotron_tokenizer)
    assert "system<|end_header_id|>\n\ndetailed thinking off<|eot_id|>" in text
    assert f"user<|end_header_id|>\n\n{SYSTEM_TEXT}\n\n{QUESTION}<|eot_id|>" in text
    assert text.endswith("assistant<|end_header_id|>\n\n")
    other = build_prompt(QUESTION, "chat", llama3_tokenizer)
    assert f"system<|end_header_id|>\n\n{SYSTEM_TEXT}<|eot_id|>" in other and "thinking" not in other
    renamed = llama3_like(llama3_tokenizer.chat_template)
    renamed.name_or_path = "nvidia/Llama-3.1-Nemotron-Nano-8B-v1"
    assert build_prompt(QUESTION, "chat", renamed) == text


@styles
def test_a_prompt_that_fills_the_row_is_refused(tiny_tokenizer, style):
    """A row without a trained token would divide a loss by zero; at the limit one token must be left."""
    n = len(encode_prompt(QUESTION, tiny_tokenizer, style))
    with pytest.raises(WorkshopError, match=rf"has {n} tokens and max_length is {n}: raise max_length"):
        encode(QUESTION, "Yes.", tiny_tokenizer, style, max_length=n)
    row = encode(QUESTION, "Yes, on Form 8949.", tiny_tokenizer, style, max_length=n + 1)
    assert [label for label in row["labels"] if label != IGNORE_INDEX] == row["input_ids"][-1:]
    assert row["input_ids"][-1] != tiny_tokenizer.eos_token_id


@pytest.mark.parametrize("times", [0, 2])
def test_a_chat_template_that_loses_the_question_is_refused(times):
    """A model trained and asked without a question, or with it twice, and nobody is told."""
    template = "{% for m in messages %}" + "{{ m['content'] }}" * times + "hello{% endfor %}"
    with pytest.raises(WorkshopError, match=f"writes the question {times} times: use prompt plain"):
        encode_prompt(QUESTION, llama3_like(template), "chat")


@styles
def test_rows_of_the_data_set(tiny_tokenizer, fiqa_rows, style):
    """Columns left over, an earlier tokenizer's cache, a second ground truth used, a row over the limit."""
    from datasets import Dataset

    chosen = fiqa_rows[:20]
    rows = Dataset.from_list([{**row, "ground_truths": [*row["ground_truths"], "other"]} for row in chosen])
    profile = load_profile("tiny", f"{{prompt: {style}, max_length: 128}}")
    encoded = encode_rows(rows, tiny_tokenizer, profile)
    assert encoded.column_names == ["input_ids", "labels"] and len(encoded) == 20
    for row, source in zip(encoded, chosen, strict=True):
        answer = source["ground_truths"][0]
        assert row == encode(source["question"], answer, tiny_tokenizer, style, 128)
        assert len(row["input_ids"]) <= 128
    assert max(len(row["input_ids"]) for row in encoded) == 128
