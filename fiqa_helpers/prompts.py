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
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def encode_prompt(question: str, tokenizer: "PreTrainedTokenizerBase", style: str = "plain") -> list[int]:
    """Token ids of the prompt, with exactly one BOS where the tokenizer has one.

    Special tokens count as such only where the template wrote them: a question that contains the text of an
    end token is spelled out in ordinary tokens.
    """

    def plain_ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    if style == "plain":
        ids = plain_ids(build_prompt(question, style))
    else:
        before, after = build_prompt(_SLOT, style, tokenizer).split(_SLOT)
        template = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
        ids = [*template[0], *plain_ids(question), *template[1]]
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
        WorkshopError: the prompt alone fills the row, so that nothing would be trained.
    """
    prompt = encode_prompt(question, tokenizer, style)
    space = " " if style == "plain" else ""
    text = tokenizer(space + answer.strip(), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if len(prompt) >= max_length:
        raise WorkshopError(
            f"The prompt of {question[:60]!r} has {len(prompt)} tokens and max_length is {max_length}: "
            "raise max_length or drop the row."
        )
    ids = [*prompt, *text, tokenizer.eos_token_id][:max_length]
    return {"input_ids": ids, "labels": [IGNORE_INDEX] * len(prompt) + ids[len(prompt) :]}


def encode_rows(rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", profile: "Profile") -> "Dataset":
    """Every row of (`question`, `ground_truths`) encoded; an answer is the first of its ground truths."""

    def encoded(row: dict) -> dict[str, list[int]]:
        answer = row["ground_truths"][0]
        return encode(row["question"], answer, tokenizer, profile.prompt, profile.max_length)

    return rows.map(encoded, remove_columns=rows.column_names, load_from_cache_file=False, desc="tokenizing")
