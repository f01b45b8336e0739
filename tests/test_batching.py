"""Micro-batches: every row once, within the budget, in both layouts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fiqa_helpers.base import WorkshopError
from fiqa_helpers.rows import IGNORE_INDEX, StepCollator, split_rows

PAD = 9_999
layouts = pytest.mark.parametrize("layout", ["padded", "packed"])


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


def computed_tokens(group: list[dict], layout: str) -> int:
    lengths = [len(row["input_ids"]) for row in group]
    return len(group) * max(lengths) if layout == "padded" else sum(lengths)


@layouts
@given(case=rows_and_budget())
def test_every_row_in_one_group_and_every_group_in_the_budget(layout, case):
    """A row lost or trained twice; a forward pass larger than the memory that the budget stands for."""
    rows, budget = case
    groups = split_rows(rows, budget, layout)
    assert sorted(row["input_ids"][0] for group in groups for row in group) == sorted(
        row["input_ids"][0] for row in rows
    )
    assert all(group for group in groups)
    assert all(computed_tokens(group, layout) <= budget for group in groups)


@given(case=rows_and_budget())
def test_packing_wastes_less_than_half_the_budget(case):
    """Rows left alone in a group although they would fit: two groups could be one, and time is lost."""
    rows, budget = case
    sizes = sorted(computed_tokens(group, "packed") for group in split_rows(rows, budget, "packed"))
    assert len(sizes) == 1 or sizes[0] + sizes[1] > budget


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


def row(length: int) -> dict:
    ids = list(range(length))
    return {"input_ids": ids, "labels": [IGNORE_INDEX, *ids[1:]]}


def test_padding_puts_neighbours_in_length_together():
    """Rows in the order they come: a short row beside a long one is padded to its length."""
    groups = split_rows([row(10), row(2), row(9), row(3), row(10), row(2)], 30, "padded")
    assert [[len(r["input_ids"]) for r in group] for group in groups] == [[10, 10, 9], [3, 2, 2]]


@layouts
def test_a_row_longer_than_the_budget_is_refused(layout):
    """A budget that one row exceeds ends in a CUDA out-of-memory error, an hour later."""
    sentence = r"A row has 11 tokens and tokens_per_batch is 10: raise tokens_per_batch or lower max_length\."
    with pytest.raises(WorkshopError, match=sentence):
        split_rows([row(4), row(11)], 10, layout)
    assert len(split_rows([row(4), row(10)], 10, layout)) == 2
