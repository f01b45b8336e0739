"""How likely a model finds the reference answers: a measure that needs no generated text."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.prompts import IGNORE_INDEX, encode
from fiqa_helpers.runcard import read_card, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fiqa_helpers.profiles import Profile

LOGIT_TOKENS = 2048  # tokens of one forward pass at most: logits over a large vocabulary are big


def reference_nll(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[dict],
    profile: "Profile",
    kept: Path | None = None,
) -> list[float]:
    """Negative log-likelihood of each row's first reference, in nats per token, end token included.

    Rows are cut at `profile.max_length` as in training. `kept` is a file to keep the result in; when it holds
    the values of as many rows already, nothing is computed.
    """
    found = read_card(kept) if kept else None
    if found and found.get("max_length") == profile.max_length and len(found["nll"]) == len(rows):
        return found["nll"]
    values = _compute(model, tokenizer, rows, profile)
    if kept:
        write_json(kept, {"max_length": profile.max_length, "nll": values})
    return values


def _compute(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: Sequence[dict], profile: "Profile"
) -> list[float]:
    import torch

    from fiqa_helpers.batching import pad_rows, split_rows

    encoded = [
        encode(row["question"], row["ground_truths"][0], tokenizer, profile.prompt, profile.max_length)
        | {"row": i}
        for i, row in enumerate(rows)
    ]
    budget = max(profile.max_length, min(profile.tokens_per_batch, LOGIT_TOKENS))
    values = [0.0] * len(encoded)
    was_training = model.training
    model.eval()
    try:
        for group in split_rows(encoded, budget, "padded"):
            batch = {
                name: tensor.to(model.device)
                for name, tensor in pad_rows(group, tokenizer.pad_token_id).items()
            }
            labels = batch.pop("labels")
            with torch.no_grad():
                logits = model(**batch, use_cache=False).logits
            for place, row in enumerate(group):
                wanted = labels[place, 1:] != IGNORE_INDEX  # logits at a position predict the next token
                loss = torch.nn.functional.cross_entropy(
                    logits[place, :-1][wanted].float(), labels[place, 1:][wanted]
                )
                values[row["row"]] = loss.item()
    finally:
        model.train(was_training)
    return values
