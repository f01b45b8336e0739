"""From a question and an answer to token ids with a loss mask."""

from typing import TYPE_CHECKING

from fiqa_helpers.errors import WorkshopError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from fiqa_helpers.profiles import Profile

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
    """
    from jinja2 import TemplateError

    if style == "plain":
        return f"{SYSTEM_TEXT}\n\nQuestion: {question}\n\nAnswer:"
    if tokenizer is None or not tokenizer.chat_template:
        raise WorkshopError("prompt is 'chat' and this tokenizer has no chat template: use prompt plain.")
    if "detailed thinking" in tokenizer.chat_template or "Nemotron" in str(tokenizer.name_or_path):
        turns = [
            {"role": "system", "content": "detailed thinking off"},
            {"role": "user", "content": f"{SYSTEM_TEXT}\n\n{question}"},
        ]
    else:
        turns = [{"role": "system", "content": SYSTEM_TEXT}, {"role": "user", "content": question}]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:  # a template may refuse a system turn, for one
        raise WorkshopError(
            f"The chat template of this tokenizer fails ({error}): use prompt plain."
        ) from None


def encode_prompt(question: str, tokenizer: "PreTrainedTokenizerBase", style: str = "plain") -> list[int]:
    """Token ids of the prompt, with exactly one BOS where the tokenizer has one.

    Special tokens count as such only where the template wrote them: a question that contains the text of an
    end token is spelled out in ordinary tokens.

    Raises:
        WorkshopError: `question` is not text, or the chat template cannot be used.
    """
    if style == "plain":
        ids = _spelled(build_prompt(question, style), tokenizer)
    else:
        parts = build_prompt(_SLOT, style, tokenizer).split(_SLOT)
        if len(parts) != 2:
            raise WorkshopError(
                f"The chat template of this tokenizer writes the user turn {len(parts) - 1} times, not once: "
                "use prompt plain."
            )
        before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
        ids = [*before, *_spelled(question, tokenizer), *after]
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids


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
        WorkshopError: the prompt alone fills the row, so that nothing would be trained, or a text is no text.
    """
    prompt = encode_prompt(question, tokenizer, style)
    space = " " if style == "plain" else ""
    text = _spelled(space + answer.strip(), tokenizer)
    if len(prompt) >= max_length:
        raise WorkshopError(
            f"The prompt of {question[:60]!r} has {len(prompt)} tokens and max_length is {max_length}: "
            "raise max_length or drop the row."
        )
    ids = [*prompt, *text, tokenizer.eos_token_id][:max_length]
    return {"input_ids": ids, "labels": [IGNORE_INDEX] * len(prompt) + ids[len(prompt) :]}


def _spelled(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids of a text from a person or a file: whatever looks like a special token in it is ordinary text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        start = max(0, error.start - 20)
        raise WorkshopError(
            f"The text {text[start : error.end + 20]!r} holds half of a surrogate pair, which no tokenizer "
            "reads: remove it."
        ) from None
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_rows(rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", profile: "Profile") -> "Dataset":
    """Every row of (`question`, `ground_truths`) encoded; an answer is the first of its ground truths."""

    def encoded(row: dict) -> dict[str, list[int]]:
        answer = row["ground_truths"][0]
        return encode(row["question"], answer, tokenizer, profile.prompt, profile.max_length)

    return rows.map(encoded, remove_columns=rows.column_names, load_from_cache_file=False, desc="tokenizing")
