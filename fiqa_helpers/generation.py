"""Answers from a model: batched, with whether each stopped by itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


GUARD = 4  # no sequence of so many tokens occurs twice in an answer: small models loop without it


@dataclass(frozen=True)
class Answer:
    """A generated answer; `stopped` is whether the model ended it, not the length limit."""

    text: str
    stopped: bool
    n_tokens: int


def generate_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[str],
    style: str = "plain",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    no_repeat_ngram_size: int = GUARD,
    **generate_kwargs: object,
) -> list[Answer]:
    """One answer a question, in one batch. `temperature` 0 is greedy decoding.

    No sequence of `no_repeat_ngram_size` tokens occurs twice, the prompt's counted; 0 switches that off.

    The model is returned to the mode it was in, and the global random state is left as it was, so that
    sampling in the middle of a training run does not change the run. Other keywords go to `generate`.
    """
    import torch

    from fiqa_helpers.prompts import encode_prompt

    if not questions:
        return []
    ids = [encode_prompt(question, tokenizer, style) for question in questions]
    inputs = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
                no_repeat_ngram_size=no_repeat_ngram_size,
                **sampling,
                **generate_kwargs,
            )
    finally:
        model.train(was_training)
    return [_answer(row, tokenizer) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]


def _answer(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> Answer:
    """Cut generated ids at the first end token, which is found by id and never by searching the text."""
    stopped = tokenizer.eos_token_id in ids
    if stopped:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), stopped, len(ids))
