"""What the NeMo AutoModel recipe trains on: the notebooks' own rows and tokens, with labels shifted by one.

A recipe names these functions in its `dataset:` and `tokenizer:` sections; each process calls them once.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers import data, prompts
from fiqa_helpers.errors import WorkshopError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

PAD_KEY = "___PAD_TOKEN_IDS___"  # where NeMo AutoModel's default_collater looks for the fillers


class RecipeRows(Sequence):
    """Items for NeMo AutoModel's `default_collater`: lists of one length, and what to fill them up with."""

    def __init__(self, rows: list[dict[str, list[int]]], pad_token_id: int):
        self.rows, self.pad_token_id = rows, pad_token_id

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, object]:
        fillers = {"input_ids": self.pad_token_id, "labels": prompts.IGNORE_INDEX, "attention_mask": 0}
        return {**self.rows[index], PAD_KEY: fillers}  # a new dict: the collater takes the fillers out


def fiqa_rows(
    tokenizer: "PreTrainedTokenizerBase",
    folder: str,
    split: str = "train",
    rows: int = -1,
    prompt: str = "plain",
    max_length: int = 2048,
    shift_labels: bool = True,
) -> RecipeRows:
    """The first `rows` (-1: all) of a split that notebook 01 wrote to `folder`, encoded as in notebook 02.

    Raises:
        WorkshopError: a file is missing or damaged, the split is unknown, or the tokenizer pads with its end
            token, which would teach the model never to stop.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise WorkshopError(
            "The recipe's tokenizer pads with its end token: keep the section dataset.tokenizer, which loads "
            "it with another padding token."
        )
    splits = data.read_processed(Path(folder))
    if split not in splits:
        raise WorkshopError(f"The recipe asks for split {split!r}: known are {', '.join(splits)}.")
    chosen = splits[split] if rows < 0 else splits[split].select(range(min(rows, len(splits[split]))))
    encoded = [
        prompts.encode(row["question"], row["ground_truths"][0], tokenizer, prompt, max_length)
        for row in chosen
    ]
    return RecipeRows([recipe_row(row, shift_labels) for row in encoded], tokenizer.pad_token_id)


def recipe_row(row: dict[str, list[int]], shift_labels: bool = True) -> dict[str, list[int]]:
    """A row as `prompts.encode` makes it (n tokens) -> what a recipe wants (n - 1 tokens when shifted).

    transformers' models compare the logits at position i with the label at i + 1 themselves; NeMo AutoModel's
    recipes compare position i with label i, so there `labels[i]` must be the token after `input_ids[i]`.
    """
    ids, labels = row["input_ids"], row["labels"]
    if shift_labels:
        ids, labels = ids[:-1], labels[1:]
    return {"input_ids": list(ids), "labels": list(labels), "attention_mask": [1] * len(ids)}


def fault_of_batch(batch: "dict[str, torch.Tensor]", eos_token_id: int, max_length: int) -> str | None:
    """What is wrong with a recipe's batch (tensors of rows x tokens), in a sentence; None if nothing is."""
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    trained = labels != prompts.IGNORE_INDEX
    if not trained.any() or trained[:, 0].any():
        return "the first batch trains on prompts or on nothing: use fiqa_helpers.recipe_data.fiqa_rows."
    inner = trained[:, :-1] & (mask[:, 1:] == 1)
    if not (labels[:, :-1][inner] == ids[:, 1:][inner]).all():
        return "labels are not the tokens that come next, as a recipe wants them: leave shift_labels true."
    for row, carries_loss, length in zip(labels, trained, mask.sum(dim=1).tolist(), strict=True):
        answer = row[carries_loss]
        whole = length + 1 < max_length  # a row that was cut has lost its end token
        if whole and (len(answer) == 0 or answer[-1] != eos_token_id):
            return "an answer has no end token, so the model would never learn to stop: use fiqa_rows."
    return None


def load_tokenizer(
    name: str, revision: str = "main", trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """The tokenizer of the notebooks (padding token apart from the end token), for the recipe's YAML.

    NeMo AutoModel adds `trust_remote_code` by itself; whatever it says, no code of a model's is run.
    """
    from fiqa_helpers.model import load_tokenizer as load
    from fiqa_helpers.profiles import REFERENCE

    return load(replace(REFERENCE, model=name, model_revision=revision))
