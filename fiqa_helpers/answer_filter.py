"""Training answers that are worth learning from, for the profile setting `longest_answer`."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

SHORTEST = 20  # words; what is shorter mostly points to somewhere else
LINK = re.compile(r"http|www\.")


def short_answers(rows: "Dataset", words: int) -> "Dataset":
    """The rows whose first ground truth has SHORTEST to `words` words and no link, without their CSV quotes.

    Only the first ground truth is kept, as only that is trained on. Never for rows to test on: their
    references stay as people wrote them. What it does for the small model is in benchmarks/RECIPE.md.
    """

    def wanted(row: dict) -> bool:
        answer = row["ground_truths"][0]
        return SHORTEST <= len(answer.split()) <= words and not LINK.search(answer)

    def bare(row: dict) -> dict:
        return {"ground_truths": [unquoted(row["ground_truths"][0])]}

    return rows.filter(wanted, load_from_cache_file=False).map(bare, load_from_cache_file=False)


def unquoted(answer: str) -> str:
    """`answer` without the quotes that a CSV export has put around it and doubled inside."""
    if len(answer) > 1 and answer[0] == answer[-1] == '"':
        return answer[1:-1].replace('""', '"').strip()
    return answer
