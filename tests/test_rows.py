"""Prompts, loss mask and end token for any text in both styles; micro-batches that lose no row."""

import re

import pytest
import torch
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llama3_like import llama3_like

from fiqa_helpers.base import WorkshopError
from fiqa_helpers.profiles import load_profile
from fiqa_helpers.rows import (
    IGNORE_INDEX,
    SYSTEM_TEXT,
    StepCollator,
    build_prompt,
    encode,
    encode_prompt,
    encode_rows,
    split_rows,
)

QUESTION = "How do I report a stock split on my tax return?"
SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<empty_output>", "<reponame>", "<|begin_of_text|>"),
    *("<|eot_id|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<s>", "</s>", "[INST]", "Answer:"),
    *("Question:", "\n\n", " ", "\u241f question \u241f", "\u200b", "\u202e", "\x00", "é", "👩‍👩‍👧"),
)
# What SmolLM2's vocabulary cannot spell: six control characters, which loading removes from the rows, and the
# planes 4 to 11 of Unicode, in which no character is assigned. Its tokenizer drops them without a word.
UNKNOWN_TO_SMOLLM2 = re.compile("[\x04\x06\x13\x14\x16\x1d\U00040000-\U000bffff]")
any_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
hostile_text = st.lists(st.sampled_from(SPECIAL) | any_text, max_size=8).map("".join)
tokenizers = pytest.mark.parametrize("name", ["tiny_tokenizer", "llama3_tokenizer", "nemotron_tokenizer"])
styles = pytest.mark.parametrize("style", ["plain", "chat"])
layouts = pytest.mark.parametrize("layout", ["padded", "packed"])


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
        question = row["question"].strip()
        turns = [{"role": "system", "content": SYSTEM_TEXT}, {"role": "user", "content": question}]
        whole = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert encode_prompt(question, tokenizer, "chat") == whole


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


def test_rows_of_the_data_set(tiny_tokenizer, fiqa_rows):
    """Columns left over, an earlier tokenizer's cache, a second ground truth used, a row over the limit."""
    two = [row | {"ground_truths": [*row["ground_truths"], "other"]} for row in fiqa_rows[:20]]
    encoded = encode_rows(
        Dataset.from_list(two), tiny_tokenizer, load_profile("tiny", "{prompt: chat, max_length: 128}")
    )
    assert list(encoded) == [
        encode(row["question"], row["ground_truths"][0], tiny_tokenizer, "chat", 128) for row in two
    ]
    assert max(len(row["input_ids"]) for row in encoded) == 128


# --- micro-batches

PAD = 9_999


@st.composite
def rows_and_budget(draw):
    """Rows of distinct ids, each with a masked prompt and one or more answer tokens, and a budget."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 40)), min_size=1, max_size=20))
    rows, first = [], 0
    for prompt, answer in lengths:
        ids = list(range(first, first + prompt + answer))
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * prompt + ids[prompt:]})
        first += prompt + answer
    longest = max(len(row["input_ids"]) for row in rows)
    return rows, draw(st.integers(longest, longest * 6))


@layouts
@given(case=rows_and_budget())
def test_every_row_in_one_group_and_every_group_in_the_budget(layout, case):
    """A row lost or trained twice; a pass larger than the memory for it; two packs that could be one."""
    rows, budget = case
    groups = split_rows(rows, budget, layout)
    assert sorted(row["input_ids"][0] for group in groups for row in group) == sorted(
        row["input_ids"][0] for row in rows
    )
    lengths = [[len(row["input_ids"]) for row in group] for group in groups]
    sizes = sorted(len(n) * max(n) if layout == "padded" else sum(n) for n in lengths)
    assert sizes[-1] <= budget
    assert layout == "padded" or len(sizes) == 1 or sizes[0] + sizes[1] > budget
    with pytest.raises(WorkshopError, match="raise tokens_per_batch or lower max_length"):
        split_rows(rows, max(map(max, lengths)) - 1, layout)


@layouts
@given(case=rows_and_budget())
def test_collator_keeps_every_token_and_label(layout, case):
    """Ids, labels, padding or row limits mixed up in a tensor; a wrong count of trained tokens."""
    rows, budget = case
    step = StepCollator(PAD, budget, layout)(rows)
    assert set(step) == {"labels", "micro_batches"}
    assert step["labels"].dim() == 1 and step["labels"].dtype == torch.int64
    trained = sum(label != IGNORE_INDEX for row in rows for label in row["labels"])
    assert int((step["labels"] != IGNORE_INDEX).sum()) == trained
    found = {}
    for batch in step["micro_batches"]:
        assert batch["input_ids"].shape == batch["labels"].shape
        assert batch["input_ids"].numel() <= budget
        for ids, labels in unpacked(batch) if layout == "packed" else unpadded(batch):
            found[ids[0]] = {"input_ids": ids, "labels": labels}
    assert found == {row["input_ids"][0]: row for row in rows}
    shifted = [batch["labels"][:, 1:] for batch in step["micro_batches"]]  # as transformers' loss sees them
    assert sum(int((labels != IGNORE_INDEX).sum()) for labels in shifted) == trained


def unpadded(batch: dict) -> list[tuple[list[int], list[int]]]:
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    padding = batch["attention_mask"] == 0
    assert (batch["input_ids"][padding] == PAD).all() and (batch["labels"][padding] == IGNORE_INDEX).all()
    assert PAD not in batch["input_ids"][~padding] and PAD not in batch["labels"]
    lengths = batch["attention_mask"].sum(1).tolist()
    assert max(lengths) == batch["input_ids"].shape[1]  # no column of padding alone
    tensors = [batch[key] for key in ("input_ids", "labels", "attention_mask")]
    rows = []
    for ids, labels, mask, n in zip(*tensors, lengths, strict=True):
        assert mask[:n].all()  # padding on the right
        rows.append((ids[:n].tolist(), labels[:n].tolist()))
    return rows


def unpacked(batch: dict) -> list[tuple[list[int], list[int]]]:
    assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
    limits = batch["cu_seq_lens_q"]
    assert limits.dtype == torch.int32 and limits[0] == 0 and limits[-1] == batch["input_ids"].shape[1]
    assert torch.equal(limits, batch["cu_seq_lens_k"])
    assert batch["max_length_q"] == batch["max_length_k"] == int(limits.diff().max())
    rows = []
    for start, end in zip(limits[:-1].tolist(), limits[1:].tolist(), strict=True):
        assert batch["position_ids"][0, start:end].tolist() == list(range(end - start))
        assert batch["labels"][0, start] == IGNORE_INDEX  # no row is asked for the next one's first token
        rows.append((batch["input_ids"][0, start:end].tolist(), batch["labels"][0, start:end].tolist()))
    return rows
