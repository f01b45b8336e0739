"""What an answer is measured by, the floors beside every number, and whether a difference is real."""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.base import WorkshopError

if TYPE_CHECKING:
    import numpy as np
    from rouge_score.rouge_scorer import RougeScorer

# --- Semantic similarity with MiniLM, of whole texts: what is longer than its window is embedded in chunks.

MOST_KNOWN = 250_000  # vectors kept for texts that come again: 0.4 GiB


class Similarity:
    """Cosine similarity of texts under all-MiniLM-L6-v2 (Reimers and Gurevych 2019, arXiv:1908.10084).

    The model reads 256 word pieces and drops the rest in silence. Here a longer text is cut at word limits
    into windows of about equal size, and the mean of their embeddings, weighted by length, stands for it.
    `cut=True` gives what the model makes of the first 256 pieces alone, as published figures do.
    """

    def __init__(self, folder: Path | None = None, device: str = "cpu"):
        from sentence_transformers import SentenceTransformer

        from fiqa_helpers.machinery import assets

        self.model = SentenceTransformer(str(folder or assets.minilm_folder()), device=device)
        self.window = self.model.max_seq_length - 2  # [CLS] and [SEP] take two places
        self._known: dict[tuple[str, bool], np.ndarray] = {}

    def embed(self, texts: Sequence[str], cut: bool = False) -> "np.ndarray":
        """Unit vectors, float32 of shape (texts, 384). An empty text is the zero vector, near to nothing."""
        import numpy as np

        while len(self._known) > MOST_KNOWN:  # the oldest go
            del self._known[next(iter(self._known))]
        new = [text for text in dict.fromkeys(texts) if (text, cut) not in self._known]
        pieces = [[(text, 1)] if cut else self.chunks(text) for text in new]
        flat = [piece for text in pieces for piece, _ in text]
        if flat:
            vectors = self.model.encode(flat, normalize_embeddings=True, show_progress_bar=False)
        start = 0
        for text, chunks in zip(new, pieces, strict=True):
            weights = np.array([[length] for _, length in chunks], dtype=np.float32)
            total = (weights * vectors[start : start + len(chunks)]).sum(axis=0)
            start += len(chunks)
            empty = not text.strip()
            self._known[text, cut] = total * 0 if empty else total / np.linalg.norm(total)
        return np.stack([self._known[text, cut] for text in texts])

    def chunks(self, text: str) -> list[tuple[str, int]]:
        """`text` in pieces that fit the window: (piece, its word pieces)."""
        tokens = self.model.tokenizer(
            text, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False
        )
        words: list[list[int]] = []  # of each word: where it starts, where it ends, its word pieces
        last = None
        for word, (start, end) in zip(tokens.word_ids(), tokens["offset_mapping"], strict=True):
            if word == last:
                words[-1][1:] = [end, words[-1][2] + 1]
            else:
                words.append([start, end, 1])
            last = word
        count = max(1, -(-len(tokens["input_ids"]) // self.window))
        size = -(-len(tokens["input_ids"]) // count)
        groups: list[list[int]] = []
        for start, end, length in words:
            if groups and groups[-1][2] + length <= size:
                groups[-1][1:] = [end, groups[-1][2] + length]
            else:
                groups.append([start, end, length])
        return [(text[start:end], length) for start, end, length in groups] or [(text, 1)]

    def best(self, answer: str, references: Sequence[str], cut: bool = False) -> tuple[float, int]:
        """(similarity, index) of the reference that is nearest to `answer`; 1 is the same, 0 unrelated."""
        values = self.embed(references, cut) @ self.embed([answer], cut)[0]
        nearest = int(values.argmax())
        return float(values[nearest]), nearest


# --- What an answer is measured by, one number each, and the floors that every number is shown beside.


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


# --- Is the difference real? Paired bootstrap intervals, and what they say in words.

DRAWN_AT_ONCE = 10_000_000  # row numbers, 80 MB: all resamples of 648 rows, and not of 100,000
BCA_ROWS = 5000  # its jackknife grows with the square of the rows; beyond, percentiles are as good
RESAMPLES = 9999
FEW_ROWS = 30  # below this a bootstrap interval itself is too narrow to be trusted to the digit


@dataclass(frozen=True)
class Comparison:
    """Tuned minus base on the same rows. `low` and `high` bound the mean difference with 95 % confidence."""

    metric: str
    rows: int
    base: float  # mean
    tuned: float  # mean
    difference: float  # mean of the paired differences
    low: float
    high: float
    wins: int  # rows on which the tuned model is better; for a metric without better or worse, higher
    ties: int

    @property
    def win_rate(self) -> float:
        """Share of the rows that the tuned model wins; a tie counts half."""
        return (self.wins + self.ties / 2) / self.rows

    @property
    def verdict(self) -> str:
        """ "better", "worse" or "no difference"; "changed" where more is neither better nor worse."""
        better = METRICS[self.metric].better
        if self.low <= 0 <= self.high or math.isnan(self.low):
            return "no difference"
        if better == 0:
            return "changed"
        return "better" if (self.difference > 0) == (better > 0) else "worse"

    def needed_rows(self, smallest: float) -> int:
        """Rows at which an interval of this spread would be narrower than `smallest` to each side."""
        half = (self.high - self.low) / 2
        return math.ceil(self.rows * (half / smallest) ** 2)

    def in_words(self) -> str:
        """One sentence with the figures."""
        said = {
            "no difference": "no difference is shown",
            "better": "the tuned model is better",
            "worse": "the tuned model is worse",
            "changed": "the models differ",
        }[self.verdict]
        return (
            f"{METRICS[self.metric].title}: {self.base:.3f} -> {self.tuned:.3f}, difference "
            f"{self.difference:+.3f} with 95 % interval {self.low:+.3f} to {self.high:+.3f} on {self.rows} "
            f"rows, {self.win_rate:.0%} of them won: {said}."
        )

    def as_row(self) -> dict:
        """All of it as plain values, for a table or JSON."""
        return asdict(self) | {"win_rate": self.win_rate, "verdict": self.verdict}


def compare(metric: str, base: Sequence[float], tuned: Sequence[float], seed: int = 0) -> Comparison:
    """Paired comparison of one value per row from each model, rows in the same order.

    Rows are drawn again with their pair (Efron 1987, the bias-corrected and accelerated bootstrap, by
    `scipy.stats.bootstrap`). One row has no interval: `low` and `high` are NaN.

    Raises:
        ValueError: the two lists are not of one length, or empty.
    """
    import numpy as np
    from scipy.stats import bootstrap

    pairs = np.array(list(zip(base, tuned, strict=True)), dtype=float)
    if pairs.size == 0:
        raise ValueError("nothing to compare")
    differences = pairs[:, 1] - pairs[:, 0]
    low = high = float("nan")
    if len(differences) > 1 and np.ptp(differences) == 0:
        low = high = float(differences[0])  # every resample has the same mean
    elif len(differences) > 1:
        found = bootstrap(
            (pairs[:, 0], pairs[:, 1]),
            lambda b, t, axis: (t - b).mean(axis=axis),
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, DRAWN_AT_ONCE // len(differences)),
            method="BCa" if len(differences) <= BCA_ROWS else "percentile",
            confidence_level=0.95,
            rng=np.random.default_rng(seed),
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    sign = METRICS[metric].better or 1
    return Comparison(
        metric=metric,
        rows=len(differences),
        base=float(pairs[:, 0].mean()),
        tuned=float(pairs[:, 1].mean()),
        difference=float(differences.mean()),
        low=low,
        high=high,
        wins=int((sign * differences > 0).sum()),
        ties=int((differences == 0).sum()),
    )
