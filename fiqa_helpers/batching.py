"""One optimizer step's rows, cut into forward passes: padded side by side, or packed end to end."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.prompts import IGNORE_INDEX

if TYPE_CHECKING:
    import torch

Row = dict[str, list[int]]  # input_ids and labels of one row, equally long


def split_rows(rows: Sequence[Row], tokens_per_batch: int, layout: str) -> list[list[Row]]:
    """`rows` in groups whose forward pass computes at most `tokens_per_batch` tokens.

    A padded group computes its longest row once for every row, so neighbours in length go together. A packed
    group computes just its own tokens, so the longest rows are placed first and short ones fill the gaps
    (first-fit decreasing: Johnson 1974, https://doi.org/10.1137/0203025).

    Raises:
        WorkshopError: one row alone is longer than the budget.
    """
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
    if by_length and len(by_length[0]["input_ids"]) > tokens_per_batch:
        raise WorkshopError(
            f"A row has {len(by_length[0]['input_ids'])} tokens and tokens_per_batch is {tokens_per_batch}: "
            "raise tokens_per_batch or lower max_length."
        )
    groups: list[list[Row]] = []
    used: list[int] = []
    for row in by_length:
        length = len(row["input_ids"])
        if layout == "padded":
            fits = groups and (len(groups[-1]) + 1) * len(groups[-1][0]["input_ids"]) <= tokens_per_batch
            place = len(groups) - 1 if fits else None
        else:
            place = next((i for i, n in enumerate(used) if n + length <= tokens_per_batch), None)
        if place is None:
            groups.append([row])
            used.append(length)
        else:
            groups[place].append(row)
            used[place] += length
    return groups


def pad_rows(rows: Sequence[Row], pad_token_id: int) -> dict[str, "torch.Tensor"]:
    """A micro-batch of shape (rows, longest row), padded on the right; padding is not seen or trained."""
    import torch

    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: Sequence[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*value, *[filler] * (width - len(value))] for value in values])

    return {
        "input_ids": padded([row["input_ids"] for row in rows], pad_token_id),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": padded([row["labels"] for row in rows], IGNORE_INDEX),
    }


def pack_rows(rows: Sequence[Row]) -> dict[str, "torch.Tensor | int"]:
    """A micro-batch of shape (1, all tokens): rows end to end, told apart by positions that restart at 0.

    `cu_seq_lens_q` (int32, rows + 1 offsets) and `max_length_q` carry the same limits to kernels that need
    them. The first label of a row is always on its prompt, so no row is asked for the next one's first token.

    The vocabulary is large and a prompt has no loss, so logits are wanted only where the next token is
    trained: `logits_to_keep` holds those positions, `shift_labels` (1, as many) what comes next there.
    """
    import torch

    lengths = [len(row["input_ids"]) for row in rows]
    limits = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    labels = torch.tensor([[label for row in rows for label in row["labels"]]])
    trained = (labels[0] != IGNORE_INDEX).nonzero()[:, 0]
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": labels,
        "logits_to_keep": trained - 1,
        "shift_labels": labels[:, trained],
        "cu_seq_lens_q": limits,
        "cu_seq_lens_k": limits,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


class StepCollator:
    """Collator for `AnswerTrainer`: all rows of one optimizer step -> its micro-batches.

    `labels` stands at the top level too, as one row of all labels, because transformers' Trainer counts the
    step's trained tokens there.
    """

    def __init__(self, pad_token_id: int, tokens_per_batch: int, layout: str):
        self.pad_token_id, self.tokens_per_batch, self.layout = pad_token_id, tokens_per_batch, layout

    def __call__(self, rows: Sequence[Row]) -> dict[str, object]:
        import torch

        groups = split_rows(rows, self.tokens_per_batch, self.layout)
        if self.layout == "packed":
            micro_batches = [pack_rows(group) for group in groups]
        else:
            micro_batches = [pad_rows(group, self.pad_token_id) for group in groups]
        labels = torch.cat([batch["labels"].flatten() for batch in micro_batches])
        return {"labels": labels, "micro_batches": micro_batches}
