"""The tables of RECIPE.md from the files of `recipe_search.py`.

    python benchmarks/recipe_report.py benchmarks/results/recipe_search

Everything out of fold is scored here, from the answers, by the metrics, floors and intervals of notebook 06.
"""

import argparse
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from recipe_search import DECODINGS, FOLDS, MEASURED, SETTINGS, Setting, inner_results, load_folds, read_trial

from fiqa_helpers import metrics, notebook
from fiqa_helpers.evaluation import Evaluated
from fiqa_helpers.evaluation_report import compare_all, floor_means, score_floors
from fiqa_helpers.intervals import Comparison, compare
from fiqa_helpers.metrics import METRICS
from fiqa_helpers.runcard import read_card, write_json
from fiqa_helpers.similarity import Similarity


def untuned(out: Path) -> list[str]:
    """The base model on all rows by prompt and decoding, and what each gains over plain and greedy."""
    folds = [read_card(out / "base" / f"{fold}.json") for fold in range(FOLDS)]

    def column(style: str, decoding: str, metric: str) -> list[float]:
        return [value for fold in folds for value in fold[style][decoding][metric]]

    head = ["prompt; decoding", "similarity", "gain, 95 % interval", "token F1", "gain, 95 % interval"]
    head += ["reference NLL", "stopped", "repeated", "tokens"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for style in sorted(folds[0], reverse=True):
        for decoding in DECODINGS:
            cells = [f"{style}; {decoding}"]
            for metric in ("similarity", "token_f1"):
                found = compare(metric, column("plain", "greedy", metric), column(style, decoding, metric))
                gain = f"{found.difference:+.3f}, {found.low:+.3f} to {found.high:+.3f}"
                cells += [f"{found.tuned:.3f}", "" if (style, decoding) == ("plain", "greedy") else gain]
            means = {name: statistics.fmean(column(style, decoding, name)) for name in MEASURED}
            cells += [f"{means['nll']:.3f}", f"{means['stopped']:.1%}", f"{means['repeated']:.1%}"]
            lines.append("| " + " | ".join([*cells, f"{means['tokens']:.0f}"]) + " |")
    return lines


def tried(found: Iterable[tuple[str, str, dict]]) -> list[str]:
    """(setting, decoding, {metric: (base, tuned)}) as a table, base -> tuned."""
    lines = [
        "| setting | decoding | rows | reference NLL | similarity | token F1 | stopped | repeated | tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, decoding, pairs in found:
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
        for pair in range(FOLDS):
            trial = read_trial(out, pair, name)
            if not trial:
                lines.append(f"- {name}, pair {pair}: not run, time was up")
            elif "failed" in trial:
                lines.append(f"- {name}, pair {pair}: {trial['failed']}")
    return lines


def settings(named: dict[str, Setting]) -> list[str]:
    """What each name stands for, as far as it differs from the reference hyper-parameters."""
    lines = ["| setting | differs from the reference in |", "|---|---|"]
    for name, setting in named.items():
        changed = [f"{k} {v}" for k, v in vars(setting).items() if v != getattr(Setting(), k)]
        lines.append(
            f"| {name} | {', '.join(changed) or '(learning_rate 0.0002, 3 epochs, rank 8, q/k/v/o)'} |"
        )
    return lines


def out_of_fold(
    out: Path, which: str, decoding: str | None, similarity: Similarity, folds: list[list[dict]]
) -> dict:
    """Base against tuned on all rows: what each fold has `chosen`, or a fixed setting and decoding."""
    rows, sides, used = [], {"base": [], "tuned": []}, Counter()
    for fold, held_out in enumerate(folds):
        trials = read_card(out / "outer" / f"{fold}.json")
        name = trials["chosen"]["setting"] if which == "chosen" else which
        how = decoding or trials["chosen"]["decoding"]
        used[f"{name}; {how}"] += 1
        rows += held_out
        base = read_card(out / "base" / f"{fold}.json")[trials[name]["setting"]["prompt"]][how]
        for side, columns in (("base", base), ("tuned", trials[name]["found"][how])):
            sides[side] += samples(columns, held_out, similarity)
    base, tuned = (Evaluated(side, Path(), found, 0, {}, {}) for side, found in sides.items())
    comparisons, floors = compare_all(base, tuned), score_floors(rows, similarity)
    return {
        "folds": dict(used),
        "rows": len(rows),
        "criteria": criteria(comparisons),
        "comparisons": {name: found.as_row() for name, found in comparisons.items()},
        "floors": {name: floor_means(floors, name) for name in comparisons},
    }


def criteria(found: dict[str, Comparison]) -> dict[str, bool]:
    """What "it helps" was to mean, written down before the search, each with whether it came true."""
    return {
        "reference NLL lower": found["nll"].high < 0,
        "similarity higher, interval above zero": found["similarity"].low > 0,
        "token F1 higher, interval above zero": found["token_f1"].low > 0,
        "at least 95 % stopped by themselves": found["stopped"].tuned >= 0.95,
        "repetition not shown to be worse": found["repeated"].verdict != "worse",
    }


def as_table(result: dict) -> list[str]:
    """A result of `out_of_fold` as Markdown."""
    lines = [f"{result['rows']} rows; folds: {result['folds']}", ""]
    lines += [f"- {name}: {'yes' if met else '**no**'}" for name, met in result["criteria"].items()]
    names = list(result["floors"]["similarity"])
    head = ["metric", "base", "tuned", "difference, 95 % interval", "rows won", "verdict", *names]
    lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, found in result["comparisons"].items():
        difference = f"{found['difference']:+.4f}, {found['low']:+.4f} to {found['high']:+.4f}"
        cells = [METRICS[name].title, f"{found['base']:.4f}", f"{found['tuned']:.4f}", difference]
        cells += [f"{found['win_rate']:.0%}" if METRICS[name].better else "", found["verdict"]]
        means = result["floors"][name]
        cells += [f"{means[floor]:.3f}" if floor in means else "" for floor in names]
        lines.append("| " + " | ".join(cells) + " |")
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    out = parser.parse_args().results
    notebook.quiet()
    print("\n## The untuned model\n")
    print("\n".join(untuned(out)))
    if not (out / "outer").is_dir():
        print("\nNo setting has been measured out of fold.")
        return
    similarity, folds = Similarity(), load_folds()
    results = {"chosen": out_of_fold(out, "chosen", None, similarity, folds)}
    for decoding in DECODINGS:
        results[f"reference; {decoding}"] = out_of_fold(out, "reference", decoding, similarity, folds)
    chosen = [read_card(out / "outer" / f"{fold}.json")["chosen"] for fold in range(FOLDS)]
    write_json(out / "summary.json", {"chosen": chosen, "results": results})
    for name, result in results.items():
        print(f"\n## Out of fold: {name}\n")
        print("\n".join(as_table(result)))
    print("\n## Every setting, on rows outside its training and outside the fold that it is chosen for\n")
    print("\n".join([*tried(inner_results(out)), "", *settings(SETTINGS), "", *incomplete(out)]))


if __name__ == "__main__":
    main()
