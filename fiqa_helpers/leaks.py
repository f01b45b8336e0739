"""No marks for answers that were in the lesson: an adapter is not tested on rows that it was trained on."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fiqa_helpers.data import fingerprint, load_with_report, read_processed
from fiqa_helpers.errors import WorkshopError

if TYPE_CHECKING:
    from fiqa_helpers.paths import Workspace


def refuse_leak(card: dict, rows: Sequence[dict], workspace: "Workspace") -> str:
    """Hold the rows that an adapter was trained on, as its run card has them, against `rows`.

    The packaged rows are the hub's test split, so an adapter that was trained on them may be tested on the
    packaged test part, and never on the hub's. Questions are compared without case and punctuation. Returns
    in words what was checked, also when the training rows are not to be found here.

    Raises:
        WorkshopError: some of `rows` were trained on.
    """
    trained = training_questions(card, workspace)
    if trained is None:
        return "The rows that this adapter was trained on are not here, so a leak cannot be ruled out."
    tested = [normalized(row["question"]) for row in rows]
    shared = [question for question in tested if question in trained]
    if shared:
        raise WorkshopError(
            f"The adapter was trained on {len(shared)} of these {len(tested)} test rows (such as "
            f"{shared[0][:60]!r}), so its figures would mean nothing: take rows that it has not "
            "seen, or train it on the hub's training split."
        )
    return (
        f"None of the {len(tested)} test questions is among the {len(trained)} that the adapter learned from."
    )


def training_questions(card: dict, workspace: "Workspace") -> set[str] | None:
    """Questions, normalized, of the training and validation splits that `card` names.

    It names them by fingerprint; the rows are looked for in the workspace and in the packaged ones. A card
    without fingerprints may still say that the data was packaged. None when the rows are not to be found.
    """
    definition = card.get("definition", {})
    splits = ("train", "validation")
    wanted = {split: definition[f"{split}_sha256"] for split in splits if f"{split}_sha256" in definition}
    packaged = definition.get("data", card.get("profile", {}).get("data")) == "packaged"
    if "train" not in wanted and not packaged:
        return None
    for load in (lambda: read_processed(workspace.data), lambda: load_with_report("packaged")[0]):
        try:
            found = load()
        except WorkshopError:
            continue
        if wanted and all(fingerprint(found[split]) == digest for split, digest in wanted.items()):
            break
    else:
        if not packaged:
            return None
        found = load_with_report("packaged")[0]
    return {normalized(question) for split in splits for question in found[split]["question"]}


def normalized(question: str) -> str:
    """Two questions are the same when these are: case, punctuation and spaces don't count."""
    return " ".join(re.findall(r"\w+", question.casefold())) or question
