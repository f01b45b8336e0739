"""From a question and an answer to batches: prompts, token ids, end token, loss masks, micro-batches.

Rows are padded or packed here (`pack_rows`); attention inside a pack is in machinery/fast.py.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fiqa_helpers.base import WorkshopError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# --- From a question and an answer to token ids with a loss mask.

SYSTEM_TEXT = (
    "You are a helpful financial assistant. Provide comprehensive, detailed answers to financial questions. "
    "Include relevant context, examples, and explanations when appropriate."
)
IGNORE_INDEX = -100  # PyTorch's cross-entropy leaves out positions with this label
_SLOT = "\u241f question \u241f"  # stands for the question while a chat template is rendered


def build_prompt(
    question: str, style: str = "plain", tokenizer: "PreTrainedTokenizerBase | None" = None
) -> str:
    """The text that comes before the answer.

    `plain` is the reference template and ends in `Answer:`; the space that follows belongs to the answer's
    first token. `chat` is the tokenizer's own chat template, up to where the assistant begins to speak. A
    Nemotron system turn switches its reasoning and holds nothing else, so instructions go into the user
    turn there (model card of Llama-3.1-Nemotron-Nano-8B-v1).

    Raises:
        ValueError: `chat` with a tokenizer that has no chat template (transformers says so).
    """
    if style == "plain":
        return f"{SYSTEM_TEXT}\n\nQuestion: {question}\n\nAnswer:"
    system, user = SYSTEM_TEXT, question
    if "detailed thinking" in (tokenizer.chat_template or "") or "Nemotron" in str(tokenizer.name_or_path):
        system, user = "detailed thinking off", f"{SYSTEM_TEXT}\n\n{question}"
    turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def encode_prompt(question: str, tokenizer: "PreTrainedTokenizerBase", style: str = "plain") -> list[int]:
    """Token ids of the prompt, with exactly one BOS where the tokenizer has one.

    Special tokens count as such only where the template wrote them: a question that contains the text of an
    end token is spelled out in ordinary tokens.

    Raises:
        ValueError: the chat template leaves the question out, or writes it twice.
    """
    if style == "plain":
        ids = _spelled(build_prompt(question, style), tokenizer)
    else:
        around = build_prompt(_SLOT, style, tokenizer).split(_SLOT)
        before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in around)
        ids = [*before, *_spelled(question, tokenizer), *after]
    bos = tokenizer.bos_token_id
    return [bos, *ids] if adds_bos(tokenizer) and ids[:1] != [bos] else ids


def prompt_text(question: str, tokenizer: "PreTrainedTokenizerBase", style: str = "plain") -> str:
    """The prompt as a server wants it: without the BOS token, where the tokenizer adds it by itself."""
    text = build_prompt(question, style, tokenizer)
    return text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer puts its BOS token in front of a text: Llama's does, SmolLM2's does not."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def encode(
    question: str,
    answer: str,
    tokenizer: "PreTrainedTokenizerBase",
    style: str = "plain",
    max_length: int = 2048,
) -> dict[str, list[int]]:
    """One training row: `input_ids` and `labels`, both of length n <= max_length.

    Labels equal the ids on the answer and its end token and are `IGNORE_INDEX` on the prompt. They are not
    shifted: transformers' models do that. Prompt and answer are tokenized apart, so no token spans both. A
    row that is too long loses the end of its answer, and with it the end token.

    Raises:
        WorkshopError: the prompt alone fills the row, so that nothing would be trained.
    """
    prompt = encode_prompt(question, tokenizer, style)
    if len(prompt) >= max_length:
        raise WorkshopError(
            f"The prompt of {question[:60]!r} has {len(prompt)} tokens and max_length is {max_length}: "
            "raise max_length or drop the row."
        )
    space = " " if style == "plain" else ""
    text = _spelled(space + answer.strip(), tokenizer)
    ids = [*prompt, *text, tokenizer.eos_token_id][:max_length]
    return {"input_ids": ids, "labels": [IGNORE_INDEX] * len(prompt) + ids[len(prompt) :]}


def _spelled(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids of a text from a person or a file: whatever looks like a special token in it is ordinary text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_rows(rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", profile) -> "Dataset":
    """Every row of (`question`, `ground_truths`) encoded as the `Profile` says (prompt, max_length).

    An answer is the first of its ground truths.
    """

    def encoded(row: dict) -> dict[str, list[int]]:
        answer = row["ground_truths"][0]
        return encode(row["question"], answer, tokenizer, profile.prompt, profile.max_length)

    return rows.map(encoded, remove_columns=rows.column_names, load_from_cache_file=False, desc="tokenizing")


# --- One optimizer step's rows, cut into forward passes (micro-batches): padded side by side, or packed.

Row = dict[str, list[int]]  # input_ids and labels of one row, equally long


def split_rows(rows: Sequence[Row], tokens_per_batch: int, layout: str) -> list[list[Row]]:
    """`rows` in groups whose forward pass computes at most `tokens_per_batch` tokens.

    A padded group computes its longest row once for every row, so neighbours in length go together. A packed
    group computes just its own tokens, so the longest rows are placed first and short ones fill the gaps
    (first-fit decreasing: Johnson 1974, https://doi.org/10.1137/0203025).

    Raises:
        WorkshopError: one row alone is longer than the budget.
    """
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True):
        if len(row["input_ids"]) > tokens_per_batch:
            raise WorkshopError(
                f"A row has {len(row['input_ids'])} tokens and tokens_per_batch is {tokens_per_batch}: "
                "raise tokens_per_batch or lower max_length."
            )
        open_groups = groups if layout == "packed" else groups[-1:]
        fits = (group for group in open_groups if _computed([*group, row], layout) <= tokens_per_batch)
        group = next(fits, None)
        if group is None:
            groups.append([row])
        else:
            group.append(row)
    return groups


def _computed(group: list[Row], layout: str) -> int:
    """Tokens that one forward pass over `group` computes; its longest row comes first."""
    if layout == "packed":
        return sum(len(row["input_ids"]) for row in group)
    return len(group) * len(group[0]["input_ids"])


def pad_rows(rows: Sequence[Row], pad_token_id: int) -> dict[str, "torch.Tensor"]:
    """A micro-batch of shape (rows, longest row), padded on the right; padding is not seen or trained."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def padded(values: list[list[int]], filler: int) -> torch.Tensor:
        return pad_sequence(list(map(torch.tensor, values)), batch_first=True, padding_value=filler)

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": padded(ids, pad_token_id),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
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
