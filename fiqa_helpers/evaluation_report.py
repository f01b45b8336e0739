"""From two evaluations to what a reader is told: comparisons, floors, changed answers, files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers import metrics
from fiqa_helpers.generation import Answer
from fiqa_helpers.intervals import FEW_ROWS, Comparison, compare
from fiqa_helpers.metrics import METRICS, PRIMARY
from fiqa_helpers.runcard import write_card
from fiqa_helpers.storage import atomic_writer

if TYPE_CHECKING:
    import pandas as pd

    from fiqa_helpers.evaluation import Evaluated
    from fiqa_helpers.paths import Workspace
    from fiqa_helpers.show import Shown
    from fiqa_helpers.similarity import Similarity

Floors = dict[str, list[dict[str, float]]]  # name of the floor -> the metrics of every row


def score_floors(rows: Sequence[dict], similarity: "Similarity", seed: int = 0) -> Floors:
    """The floors of `metrics.floors`, scored on the same `rows` by the same metrics as the answers."""
    answers = metrics.floors(rows, seed)
    texts = [answer for column in answers.values() for answer in column]
    for cut in (False, True):  # all at once: many texts of a batch cost little more than one
        similarity.embed(texts + [text for row in rows for text in row["ground_truths"]], cut)
    return {
        name: [
            metrics.score(answer, row["ground_truths"], similarity)
            for answer, row in zip(column, rows, strict=True)
        ]
        for name, column in answers.items()
    }


def floor_means(floors: Floors, metric: str) -> dict[str, float]:
    """Mean of one metric for each floor; {} for a metric that a floor has no value of."""
    return {
        name: sum(scores[metric] for scores in rows) / len(rows)
        for name, rows in floors.items()
        if metric in rows[0]
    }


def compare_all(base: "Evaluated", tuned: "Evaluated", seed: int = 0) -> dict[str, Comparison]:
    """Tuned minus base in every metric that both have."""
    shared = [name for name in METRICS if name in base.samples[0] and name in tuned.samples[0]]
    return {name: compare(name, base.values(name), tuned.values(name), seed) for name in shared}


def table(comparisons: dict[str, Comparison], floors: Floors) -> "pd.DataFrame":
    """One line per metric: both means, the difference with its interval, and the floors beside them."""
    import pandas as pd

    lines = []
    for name, found in comparisons.items():
        line = {
            "metric": METRICS[name].title,
            "better": {1: "higher", -1: "lower", 0: "neither"}[METRICS[name].better],
            "base": f"{found.base:.3f}",
            "tuned": f"{found.tuned:.3f}",
            "difference": f"{found.difference:+.3f}",
            "95 % interval": f"{found.low:+.3f} to {found.high:+.3f}",
            "rows won": f"{found.win_rate:.0%}" if METRICS[name].better else "",
            "verdict": found.verdict,
        }
        means = floor_means(floors, name)
        lines.append(line | {floor: f"{means[floor]:.3f}" if means else "" for floor in floors})
    return pd.DataFrame(lines).set_index("metric")


def in_words(comparisons: dict[str, Comparison], floors: Floors, all_rows: int) -> str:
    """What the primary metric allows one to say, and what it does not. `all_rows` are there to be tested."""
    found, means = comparisons[PRIMARY], floor_means(floors, PRIMARY)
    lines = [found.in_words()[:1].upper() + found.in_words()[1:]]
    half = (found.high - found.low) / 2
    if half > 0:
        lines.append(
            f"{found.rows} rows leave {half:.3f} to each side; a gain of 0.03 would need some "
            f"{found.needed_rows(0.03):,} rows to stand out."
        )
    if found.rows < FEW_ROWS:
        finding = found.verdict in ("better", "worse")
        means_what = (
            "a hint, to be tested on more rows" if finding else "how little is known, not who is better"
        )
        lines.append(
            f"With fewer than {FEW_ROWS} rows even this interval is too narrow rather than too wide: "
            f"what it shows is {means_what}."
        )
    if found.rows < all_rows:
        lines.append(f"This is a subset: {found.rows} of {all_rows} test rows.")
    best = max(means, key=means.get)
    stands = {
        side: "below" if getattr(found, side) < means[best] else "not below" for side in ("base", "tuned")
    }
    lines.append(
        f"The highest floor is {best!r} with {means[best]:.3f}: the base model's {found.base:.3f} is "
        f"{stands['base']} it, the tuned model's {found.tuned:.3f} is {stands['tuned']} it."
    )
    return "\n".join(lines)


def changes(base: "Evaluated", tuned: "Evaluated", count: int = 5) -> tuple["Shown", "Shown"]:
    """The rows whose similarity rose and fell most, both answers in full: (best, worst) for display."""
    from fiqa_helpers import show

    gain = [t - b for b, t in zip(base.values(PRIMARY), tuned.values(PRIMARY), strict=True)]
    order = sorted(range(len(gain)), key=lambda i: (-gain[i], i))
    count = min(count, len(order) // 2)

    def shown(rows: list[int], caption: str) -> "Shown":
        questions = [
            f"{base.samples[i]['question']}\n\nsimilarity {base.samples[i][PRIMARY]:.3f} -> "
            f"{tuned.samples[i][PRIMARY]:.3f} ({gain[i]:+.3f})"
            for i in rows
        ]
        columns = {
            side.label: [
                Answer(side.samples[i]["answer"], bool(side.samples[i]["stopped"]), side.samples[i]["tokens"])
                for i in rows
            ]
            for side in (base, tuned)
        }
        return show.answers(questions, columns, caption)

    best = shown(order[:count], f"The {count} best changes in similarity")
    return best, shown(order[::-1][:count], f"The {count} worst changes in similarity")


def save(
    workspace: "Workspace",
    rows: Sequence[dict],
    base: "Evaluated",
    tuned: "Evaluated",
    floors: Floors,
    comparisons: dict[str, Comparison],
    **about: object,
) -> list[Path]:
    """Write `samples.jsonl`, one line a row, and `summary.json` to `outputs/evaluation`; returns both."""
    samples, summary = workspace.evaluation / "samples.jsonl", workspace.evaluation / "summary.json"
    with atomic_writer(samples) as file:
        for i, row in enumerate(rows):
            line = {"row": i, "question": row["question"], "references": list(row["ground_truths"])}
            for side, evaluated in (("base", base), ("tuned", tuned)):
                line[side] = {k: v for k, v in evaluated.samples[i].items() if k not in line}
            line["floors"] = {name: scores[i] for name, scores in floors.items()}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    write_card(
        summary,
        rows=len(rows),
        comparisons={name: found.as_row() for name, found in comparisons.items()},
        floors={
            name: {metric: floor_means(floors, metric)[name] for metric in floors[name][0]} for name in floors
        },
        evaluator={side.label: side.sdk for side in (base, tuned)},
        definitions={side.label: side.definition for side in (base, tuned)},
        logs={side.label: workspace.shown(side.folder) for side in (base, tuned)},
        metric_version=metrics.VERSION,
        **about,
    )
    return [samples, summary]
