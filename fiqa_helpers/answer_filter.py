"""Training answers reduced to what answers the question, for the profile setting `topical_words`.

Never for rows to test on: their references stay as people wrote them. What it does for the small model is in
benchmarks/RECIPE.md.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fiqa_helpers.errors import WorkshopError
from fiqa_helpers.eval_progress import EvalProgress

if TYPE_CHECKING:
    from datasets import Dataset

    from fiqa_helpers.similarity import Similarity

SHORTEST = 20  # words; what is shorter mostly points to somewhere else
LINK = re.compile(r"http|www\.")


def topical_answers(rows: "Dataset", words: int, similarity: "Similarity") -> "Dataset":
    """Of each answer the sentences nearest to its question, `words` words at most.

    Rows whose answer has under SHORTEST words or a link are left out. Only the first ground truth is kept, as
    only that is trained on.

    Raises:
        WorkshopError: no row is left.
    """

    def wanted(row: dict) -> bool:
        answer = row["ground_truths"][0]
        return len(answer.split()) >= SHORTEST and not LINK.search(answer)

    def on_topic(row: dict) -> dict:
        answer = unquoted(row["ground_truths"][0])
        return {"ground_truths": [topical(row["question"], answer, words, similarity)]}

    kept = rows.filter(wanted, load_from_cache_file=False)
    if not len(kept):
        raise WorkshopError(
            f"topical_words leaves no training row: all answers have under {SHORTEST} words or hold a link. "
            "Use training: reference, or rows with longer answers."
        )
    texts = [[row["question"], *sentences(unquoted(row["ground_truths"][0]))] for row in kept]
    _embed("Comparing sentences with their questions", texts, similarity)
    return kept.map(on_topic, load_from_cache_file=False)


def _embed(label: str, texts: Sequence[Sequence[str]], similarity: "Similarity") -> None:
    """Let `similarity` meet the texts of all answers, with progress; afterwards it knows them."""
    progress = EvalProgress(label, len(texts), reused=0)
    for start in range(0, len(texts), 32):
        part = texts[start : start + 32]
        similarity.embed([text for answer in part for text in answer])
        progress.done += len(part)
        progress.show()
    progress.close()


def topical(question: str, answer: str, words: int, similarity: "Similarity") -> str:
    """The sentences of `answer` nearest to the question, in their order, as far as `words` words reach.

    At least one sentence, however long.
    """
    found = sentences(answer)
    near = similarity.embed(found) @ similarity.embed([question])[0]
    kept: list[int] = []
    for place in sorted(range(len(found)), key=lambda place: -near[place]):
        if kept and sum(len(found[i].split()) for i in [*kept, place]) > words:
            break
        kept.append(place)
    return " ".join(found[place] for place in sorted(kept))


def sentences(answer: str) -> list[str]:
    """`answer` cut behind each full stop, question mark or exclamation mark that white space follows."""
    return re.split(r"(?<=[.!?])\s+", answer.strip())


def unquoted(answer: str) -> str:
    """`answer` without the quotes that a CSV export has put around it and doubled inside."""
    if len(answer) > 1 and answer[0] == answer[-1] == '"':
        return answer[1:-1].replace('""', '"').strip()
    return answer
