"""The tables of RECIPE.md from the files of `recipe_search.py`.

    python benchmarks/recipe_report.py benchmarks/results/recipe_search

Everything out of fold is scored here, from the answers, by the metrics, floors and intervals of notebook 06.
"""

import argparse
import statistics
from collections import Counter
from pathlib import Path

from recipe_search import DECODINGS, FOLDS, SETTINGS, Setting, inner_results, load_folds

from fiqa_helpers import metrics, notebook
from fiqa_helpers.evaluation import Evaluated
from fiqa_helpers.evaluation_report import compare_all, floor_means, score_floors
from fiqa_helpers.intervals import compare
from fiqa_helpers.metrics import METRICS
from fiqa_helpers.runcard import read_card
from fiqa_helpers.similarity import Similarity


def tried(out: Path) -> list[str]:
    """Every setting and decoding: base -> tuned on the rows that the inner trials left out."""
    lines = [
        "| setting | decoding | rows | reference NLL | similarity | token F1 | stopped | repeated | tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, decoding, pairs in inner_results(out):
        cells = [f"{name} | {decoding} | {len(pairs['nll'][0])}"]
        for metric in ("nll", "similarity", "token_f1"):
            found = compare(metric, *pairs[metric])
            half = (found.high - found.low) / 2
            cells.append(f"{found.base:.3f} -> {found.tuned:.3f} ({found.difference:+.3f} ± {half:.3f})")
        cells += [
            " -> ".join(f"{statistics.fmean(side):.1%}" for side in pairs[metric])
            for metric in ("stopped", "repeated")
        ]
        cells.append(" -> ".join(f"{statistics.fmean(side):.0f}" for side in pairs["tokens"]))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def incomplete(out: Path) -> list[str]:
    """Settings that failed, or that time did not reach, one line each."""
    lines = []
    for name in SETTINGS:
        trials = [(read_card(out / "inner" / f"{pair}.json") or {}).get(name) for pair in range(FOLDS)]
        for pair, trial in enumerate(trials):
            if trial is None:
                lines.append(f"- {name}, pair {pair}: not run, time was up")
            elif "failed" in trial:
                lines.append(f"- {name}, pair {pair}: {trial['failed']}")
    return lines


def settings() -> list[str]:
    """What each name stands for, as far as it differs from the reference hyper-parameters."""
    lines = ["| setting | differs from the reference in |", "|---|---|"]
    for name, setting in SETTINGS.items():
        changed = [f"{k} {v}" for k, v in vars(setting).items() if v != getattr(Setting(), k)]
        lines.append(
            f"| {name} | {', '.join(changed) or '(learning_rate 0.0002, 3 epochs, rank 8, q/k/v/o)'} |"
        )
    return lines


def out_of_fold(out: Path, which: str, decoding: str | None, similarity: Similarity) -> list[str]:
    """Base against tuned on all rows: what each fold has `chosen`, or a fixed setting and decoding."""
    rows, sides, chosen = [], {"base": [], "tuned": []}, Counter()
    for fold, held_out in enumerate(load_folds()):
        trials = read_card(out / "outer" / f"{fold}.json")
        name = trials["chosen"]["setting"] if which == "chosen" else which
        how = decoding or trials["chosen"]["decoding"]
        chosen[f"{name} / {how}"] += 1
        rows += held_out
        base = read_card(out / "base" / f"{fold}.json")[SETTINGS[name].prompt][how]
        for side, columns in (("base", base), ("tuned", trials[name]["found"][how])):
            sides[side] += samples(columns, held_out, similarity)
    base, tuned = (Evaluated(side, Path(), found, 0, {}, {}) for side, found in sides.items())
    comparisons, floors = compare_all(base, tuned), score_floors(rows, similarity)
    lines = [f"Folds: {dict(chosen)}; {len(rows)} rows.", ""]
    lines += [
        "| metric | base | tuned | difference, 95 % interval | rows won | verdict | "
        + " | ".join(floors)
        + " |"
    ]
    lines += ["|" + "---|" * (6 + len(floors))]
    for name, found in comparisons.items():
        means = floor_means(floors, name)
        lines.append(
            f"| {METRICS[name].title} | {found.base:.4f} | {found.tuned:.4f} | {found.difference:+.4f}, "
            f"{found.low:+.4f} to {found.high:+.4f} | {found.win_rate:.0%} | {found.verdict} | "
            + " | ".join(f"{means[floor]:.3f}" if means else "" for floor in floors)
            + " |"
        )
    return lines


def samples(columns: dict, rows: list[dict], similarity: Similarity) -> list[dict]:
    """One dict of metrics a row, from kept answers."""
    answers = columns["answer"]
    for cut in (False, True):
        similarity.embed([text.strip() for text in answers], cut)
    return [
        metrics.score(answer, row["ground_truths"], similarity) | {"nll": nll, "stopped": stopped}
        for answer, row, nll, stopped in zip(answers, rows, columns["nll"], columns["stopped"], strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    notebook.quiet()
    similarity = Similarity()
    for fold in range(FOLDS):
        print(f"Fold {fold}: {read_card(args.results / 'outer' / f'{fold}.json')['chosen']}")
    print("\n## Out of fold: what each fold chose\n")
    print("\n".join(out_of_fold(args.results, "chosen", None, similarity)))
    for decoding in DECODINGS:
        print(f"\n## Out of fold: the reference hyper-parameters, {decoding}\n")
        print("\n".join(out_of_fold(args.results, "reference", decoding, similarity)))
    print("\n## Every setting, inner trials\n")
    print("\n".join([*tried(args.results), "", *settings(), "", *incomplete(args.results)]))


if __name__ == "__main__":
    main()
