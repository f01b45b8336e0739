"""What an answer is measured by, one number each, and the floors that every number is shown beside."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from fiqa_helpers.errors import WorkshopError

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

    from fiqa_helpers.similarity import Similarity


@dataclass(frozen=True)
class Metric:
    """How a metric is named and read. `better` is +1 when more is better, -1 when less is, 0 for neither."""

    name: str
    title: str
    better: int
    meaning: str


METRICS = {
    metric.name: metric
    for metric in (
        Metric("similarity", "semantic similarity", 1, "MiniLM cosine, whole texts (primary)"),
        Metric("similarity_cut", "similarity of the beginning", 1, "MiniLM cosine of the first 256 pieces"),
        Metric("token_f1", "token F1", 1, "shared words, whatever their order (ROUGE-1 F)"),
        Metric("rouge_l", "ROUGE-L", 1, "longest common subsequence of words, F"),
        Metric("nll", "reference NLL", -1, "nats per token of the reference answer"),
        Metric("stopped", "stopped by itself", 1, "share of answers that ended before the length limit"),
        Metric("repeated", "repeated 4-grams", -1, "share of word 4-grams that occurred before"),
        Metric("length_ratio", "length / reference", 0, "words of the answer over words of the reference"),
    )
}
PRIMARY = "similarity"
VERSION = 1  # raise it when a definition changes: kept answers are then scored again

# A text that answers every question alike: what any decent finance answer says, and nothing of its own.
FIXED_ANSWER = (
    "It depends on your situation. In general you should pay off debt with a high interest rate first, keep "
    "some money in a savings account for an emergency, and then invest the rest for the long term in a "
    "diversified index fund with low fees. Look at the taxes, the risk and the costs before you decide, and "
    "read the terms of your account. If you are not sure, talk to an accountant or a financial advisor."
)


def score(answer: str, references: Sequence[str], similarity: "Similarity") -> dict[str, float]:
    """All metrics of one answer that need no model, each against the reference that suits it best.

    Token F1 is ROUGE-1's F measure and ROUGE-L its sibling (Lin 2004, https://aclanthology.org/W04-1013),
    lower-cased, letters and digits only, no stemming.
    """
    answer = answer.strip()
    whole, nearest = similarity.best(answer, references)
    rouge = _rouge().score_multi(list(references), answer)
    return {
        "similarity": whole,
        "similarity_cut": similarity.best(answer, references, cut=True)[0],
        "token_f1": rouge["rouge1"].fmeasure,
        "rouge_l": rouge["rougeL"].fmeasure,
        "repeated": repeated(answer),
        "length_ratio": len(answer.split()) / max(1, len(references[nearest].split())),
    }


def repeated(text: str, n: int = 4) -> float:
    """Share of the word n-grams of `text` that occurred before in it: 0 for none, near 1 for a loop."""
    words = text.lower().split()
    grams = list(zip(*(words[start:] for start in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def floors(rows: Sequence[dict], seed: int = 0) -> dict[str, list[str]]:
    """Answers that know nothing, one for each of `rows` (`question`, `ground_truths`), by name.

    The other row's answer is a derangement drawn with `seed`: every row gets another row's reference.

    Raises:
        WorkshopError: fewer than two rows, so that there is no other answer.
    """
    if len(rows) < 2:
        raise WorkshopError(f"{len(rows)} row cannot be evaluated: take at least 2, as the floors need them.")
    return {
        "echo the question": [row["question"] for row in rows],
        "another row's answer": [rows[i]["ground_truths"][0] for i in derangement(len(rows), seed)],
        "one fixed answer": [FIXED_ANSWER] * len(rows),
        "empty": [""] * len(rows),
    }


def derangement(n: int, seed: int = 0) -> list[int]:
    """A random order of 0..n-1 that leaves nothing in its place, uniform over all of them; n >= 2."""
    generator = random.Random(seed)
    order = list(range(n))
    while any(i == place for i, place in enumerate(order)):  # succeeds once in e tries on average
        generator.shuffle(order)
    return order


@cache
def _rouge() -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
