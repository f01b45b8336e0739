"""What an answer is measured by, and whether a difference between two models is real.

`floors` writes the answers that any model should beat; they are scored in `evaluate.score_floors`.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers.base import WorkshopError

if TYPE_CHECKING:
    import numpy as np
    from sklearn.pipeline import Pipeline

# --- Semantic similarity with MiniLM, of whole texts: what is longer than its window is embedded in chunks.


class Similarity:
    """Cosine similarity of texts under all-MiniLM-L6-v2 (Reimers and Gurevych 2019, arXiv:1908.10084).

    The model reads 256 word pieces and drops the rest in silence. Here a longer text is cut at word limits
    into windows of about equal size, and the mean of their embeddings, weighted by length, stands for it.
    """

    def __init__(self, folder: Path | None = None, device: str = "cpu"):
        from sentence_transformers import SentenceTransformer

        from fiqa_helpers.machinery import assets

        self.model = SentenceTransformer(str(folder or assets.fetch("minilm")), device=device)
        self.window = self.model.max_seq_length - 2  # [CLS] and [SEP] take two places
        self._known: dict[str, np.ndarray] = {}

    def embed(self, texts: Sequence[str]) -> "np.ndarray":
        """Unit vectors, float32 of shape (texts, 384). An empty text is the zero vector, near to nothing."""
        import numpy as np

        new = {text: self.chunks(text) for text in texts if text not in self._known}
        flat = [piece for chunks in new.values() for piece, _ in chunks]
        if flat:
            vectors = iter(self.model.encode(flat, normalize_embeddings=True, show_progress_bar=False))
        for text, chunks in new.items():
            total = sum(length * next(vectors) for _, length in chunks)
            self._known[text] = total / np.linalg.norm(total) if text.strip() else total * 0
        return np.stack([self._known[text] for text in texts])

    def chunks(self, text: str) -> list[tuple[str, int]]:
        """`text` in pieces that fit the window: (piece, its number of word pieces)."""
        tokens = self.model.tokenizer(
            text, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False
        )
        words, offsets = tokens.word_ids(), tokens["offset_mapping"]
        if not words:
            return [(text, 1)]
        size = math.ceil(len(words) / math.ceil(len(words) / self.window))
        starts, word = [0], 0  # where chunks begin; where the word at hand began
        for place in range(1, len(words)):
            if words[place] != words[place - 1]:
                word = place
            if place - starts[-1] >= size:
                starts.append(word)
        spans = zip(starts, [*starts[1:], len(words)], strict=True)
        return [(text[offsets[start][0] : offsets[end - 1][1]], end - start) for start, end in spans]

    def best(self, answer: str, references: Sequence[str]) -> float:
        """Similarity of `answer` with the nearest of `references`; 1 is the same, 0 unrelated."""
        return float((self.embed(references) @ self.embed([answer])[0]).max())


# --- What an answer is measured by, one number each.


@dataclass(frozen=True)
class Metric:
    """How a metric is named and read. `better` is +1 when more is better and -1 when less is."""

    title: str
    better: int


METRICS = {
    "similarity": Metric("semantic similarity", 1),  # MiniLM cosine, whole texts (primary)
    "tfidf": Metric("topic words", 1),  # TF-IDF cosine of the words that are no stop words
    "token_f1": Metric("token F1", 1),  # shared words, whatever their order, whole texts
    "token_f1_60": Metric("token F1, 60 words", 1),  # the same of the first 60 words of both texts
    "voice": Metric("voice", 1),  # how little a text is recognised as the untuned model's
    "stopped": Metric("stopped by itself", 1),  # share of answers that ended before the length limit
    "repeated": Metric("repeated 4-grams", -1),  # share of word 4-grams that occurred before
    "nll": Metric("reference NLL", -1),  # nats per token of the reference answer
}
PRIMARY = "similarity"

# A text that answers every question alike: what any decent finance answer says, and nothing of its own.
FIXED_ANSWER = (
    "It depends on your situation. In general you should pay off debt with a high interest rate first, keep "
    "some money in a savings account for an emergency, and then invest the rest for the long term in a "
    "diversified index fund with low fees. Look at the taxes, the risk and the costs before you decide, and "
    "read the terms of your account. If you are not sure, talk to an accountant or a financial advisor."
)


Score = Callable[[str, Sequence[str]], dict[str, float]]


def make_score(similarity: Similarity, people: Sequence[str] = (), voices: "Pipeline | None" = None) -> Score:
    """What scores an answer: (answer, references) -> every metric that needs no model that answers.

    Each metric is against the reference that suits the answer best. `people` are the answers of the training
    rows, which say how rare a word is; without them there are no topic words. `voices` is what
    `train_voice` returns; without it there is no voice.
    """
    topic = topic_words(people) if people else None

    def score(answer: str, references: Sequence[str]) -> dict[str, float]:
        answer = answer.strip()
        found = {"similarity": similarity.best(answer, references)}
        if topic:
            found["tfidf"] = topic(answer, references)
        found["token_f1"] = max(token_f1(answer, reference) for reference in references)
        found["token_f1_60"] = max(token_f1(answer, reference, words=60) for reference in references)
        if voices:
            found["voice"] = voice(voices, answer)
        return found | {"repeated": repeated(answer)}

    return score


def topic_words(texts: Sequence[str]) -> Callable[[str, Sequence[str]], float]:
    """A second judge of the topic, which chose no training text: TF-IDF cosine, stop words left out.

    How rare a word is comes from `texts`. What it returns takes an answer and its references.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(stop_words="english", sublinear_tf=True).fit(texts)
    return lambda answer, references: float(
        (vectors.transform(references) @ vectors.transform([answer]).T).toarray().max()
    )


def token_f1(answer: str, reference: str, words: int | None = None) -> float:
    """F1 of the words that two texts share, both cut after `words` of them: 1 for the same words, 0 for none.

    This is the F measure of ROUGE-1 (Lin 2004, https://aclanthology.org/W04-1013) without stemming:
    lower case, letters and digits only, a word counts as often as it stands in both.
    """
    cut = (" ".join(text.lower().split()[:words]) for text in (answer, reference))
    said, wanted = (Counter(re.findall(r"[a-z0-9]+", text)) for text in cut)
    shared = (said & wanted).total()
    return 2 * shared / (said.total() + wanted.total()) if shared else 0.0


def windows(text: str, size: int = 20, words: int = 60) -> list[str]:
    """The first `words` words in windows of `size`: letters only, so that no quotes or line breaks decide."""
    found = re.sub(r"[^a-z' ]+", " ", text.lower().replace("\u2019", "'")).split()[:words]
    parts = [found[start : start + size] for start in range(0, len(found), size)]
    if len(parts) > 1 and len(parts[-1]) < size // 2:
        parts[-2:] = [parts[-2] + parts[-1]]
    return [" ".join(part) for part in parts] or [""]


def train_voice(people: Sequence[str], untuned: Sequence[str]) -> "Pipeline":
    """A classifier that tells people's answers (1) from the untuned model's (0) by their words.

    A classifier two-sample test (Lopez-Paz and Oquab 2017, arXiv:1610.06545). Both are answers to training
    questions. It learns windows of 20 words, so that neither length nor an opening phrase decides.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    sides = ((1, people), (0, untuned))
    pairs = [(part, label) for label, texts in sides for text in texts for part in windows(text)]
    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    classifier = LogisticRegression(C=10, max_iter=3000, class_weight="balanced")
    return make_pipeline(vectors, classifier).fit(*zip(*pairs, strict=True))


def voice(voices: "Pipeline", answer: str) -> float:
    """How little `answer` is recognised as the untuned model's: 0 surely its own, 1 nothing of it.

    The classifier knows one class, the untuned model. People's words in random order score above people.
    """
    return float(voices.predict_proba(windows(answer))[:, 1].mean())


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
    others = [rows[i]["ground_truths"][0] for i in derangement(len(rows), seed)]
    draw = random.Random(seed)
    return {
        "echo the question": [row["question"] for row in rows],
        "another row's answer": others,
        "its words shuffled": [" ".join(draw.sample(text.split(), len(text.split()))) for text in others],
        "one fixed answer": [FIXED_ANSWER] * len(rows),
    }


def derangement(n: int, seed: int = 0) -> list[int]:
    """A random order of 0..n-1 that leaves nothing in its place, uniform over all of them; n >= 2."""
    generator, order = random.Random(seed), list(range(n))
    while any(i == place for i, place in enumerate(order)):  # succeeds once in e tries on average
        generator.shuffle(order)
    return order


# --- Is the difference real? Paired bootstrap intervals, and what they say in words.

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
    win_rate: float  # share of the rows that the tuned model wins; a tie counts half
    verdict: str  # better, worse or no difference

    def in_words(self) -> str:
        """One sentence with the figures."""
        said = self.verdict if self.verdict != "no difference" else "no difference is shown"
        return (
            f"{METRICS[self.metric].title}: {self.base:.3f} -> {self.tuned:.3f}, difference "
            f"{self.difference:+.3f} with 95 % interval {self.low:+.3f} to {self.high:+.3f} on {self.rows} "
            f"rows, {self.win_rate:.0%} of them won: {said}."
        )


def compare(metric: str, base: Sequence[float], tuned: Sequence[float], seed: int = 0) -> Comparison:
    """Paired comparison of one value per row from each model, rows in the same order.

    Rows are drawn again with their pair (Efron 1987, the bias-corrected and accelerated bootstrap, by
    `scipy.stats.bootstrap`). One row has no interval: `low` and `high` are NaN.

    Raises:
        ValueError: the two lists are not of one length.
    """
    import numpy as np
    from scipy.stats import bootstrap

    pairs = np.array([*zip(base, tuned, strict=True)], dtype=float)
    gains = pairs[:, 1] - pairs[:, 0]
    mean, better = gains.mean(), METRICS[metric].better
    low = high = mean if len(gains) > 1 else math.nan  # all gains alike: so are the means of all resamples
    if np.ptp(gains) > 0:
        # 200 resamples drawn at once: of a thousand rows they take 2 MB, and all 9,999 of them 80
        low, high = bootstrap((gains,), np.mean, batch=200, rng=seed).confidence_interval
    won = (np.sign(gains * better) + 1).mean() / 2
    verdict = "no difference"
    if low > 0 or high < 0:
        verdict = "better" if mean * better > 0 else "worse"
    figures = map(float, (*pairs.mean(axis=0), mean, low, high, won))
    return Comparison(metric, len(gains), *figures, verdict)


def table(comparisons: Mapping[str, dict], floors: Mapping[str, Mapping[str, float]]) -> list[dict[str, str]]:
    """Lines for a reader, one per metric, out of `comparisons` and `floors` as a summary.json holds them.

    Each line has both means, the difference with its interval, the verdict and the floors on the same rows.
    """
    lines = []
    for name in (name for name in METRICS if name in comparisons):
        found = comparisons[name]
        line = {
            "metric": METRICS[name].title,
            "base": f"{found['base']:.3f}",
            "tuned": f"{found['tuned']:.3f}",
            "difference": f"{found['difference']:+.3f}",
            "95 % interval": f"{found['low']:+.3f} to {found['high']:+.3f}",
            "verdict": found["verdict"],
        }
        lines.append(line | {floor: f"{of[name]:.3f}" if name in of else "" for floor, of in floors.items()})
    return lines
