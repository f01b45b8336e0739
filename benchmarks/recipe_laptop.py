"""A setting that makes the small model better, found on a laptop: chosen on 100 rows, confirmed on 548.

Where no GPU is there for `recipe_search.py`. `CANDIDATES`, short enough for a CPU, are trained on the 548
rows that nobody has looked at and measured on the 100 of the packaged test part, which earlier work has
looked at; the best of them, by the rule of the search, is then trained and measured once on the 548 in five
folds: each fold is answered by an adapter trained on the four others, and by the untuned model, in the same
precision on the same machine. Criteria, metrics and floors are those of the search.

    python benchmarks/recipe_laptop.py --out FOLDER     # a run that was ended goes on where it was
"""

import argparse
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

from recipe_report import as_table, out_of_fold, settings, tried
from recipe_search import DECODINGS, FOLDS, MEASURED, Search, Setting, rank

from fiqa_helpers import assets, data, notebook, profiles
from fiqa_helpers.machine import describe
from fiqa_helpers.runcard import read_card, write_card, write_json
from fiqa_helpers.similarity import Similarity

# profile laptop's learning rate and number of steps, nearly; batches of 8
SHORT = Setting(2e-3, 1, shortest=20, longest=200, links=False, unquoted=True, most_steps=16)
CANDIDATES = {
    "laptop": Setting(2e-3, 1, most_steps=10),
    "no long answers": SHORT,
    "answers of 60 to 250 words": replace(SHORT, shortest=60, longest=250, most_steps=12),
}
WAYS = {name: DECODINGS[name] for name in ("no_repeat, ends",)}  # no other ends 95 % of the base's answers
OVERRIDES = "{max_new_tokens: 192}"
LOOKED_AT = FOLDS  # the place of those 100 rows behind the five folds
_search: Search  # of this process


def rows_in_folds(rows: int = 0) -> list[list[dict]]:
    """The 548 rows (or the first so many) in five folds; behind them, in place `LOOKED_AT`, the 100."""
    splits = data.load_fiqa("packaged")
    unseen = [row for split in ("train", "validation") for row in splits[split]][: rows or None]
    return [unseen[fold::FOLDS] for fold in range(FOLDS)] + [list(splits["test"])[: rows or None]]


def start(args: argparse.Namespace) -> None:
    """Load the model, once in each process."""
    global _search
    import torch

    notebook.quiet()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.workers))
    _search = Search(args)
    _search.folds, _search.settings = rows_in_folds(args.rows), CANDIDATES


def untuned(fold: int, ways: list[str]) -> str:
    """The untuned model's answers to `fold`, to base/FOLD.json."""
    path, began = _search.out / "base" / f"{fold}.json", time.time()
    if not path.exists():
        _search.decodings = {name: WAYS[name] for name in ways}
        write_json(path, {"plain": _search.measure(_search.model, _search.folds[fold], "plain", True)})
    return f"untuned, rows {fold}: {time.time() - began:.0f} s"


def tuned(name: str, fold: int, ways: list[str]) -> str:
    """Answers to `fold` after training `name` on the others, to outer/FOLD.json or choice/NAME.json."""
    path = _search.out / (f"choice/{name}.json" if fold == LOOKED_AT else f"outer/{fold}.json")
    began = time.time()
    if not path.exists():
        _search.decodings = {name: WAYS[name] for name in ways}
        found = {name: _search.trial(name, (fold,), seed=fold, keep_answers=True)}
        write_json(path, found | {"chosen": {"setting": name, "decoding": ways[0]}})
    return f"{name}, rows {fold}: {time.time() - began:.0f} s"


def candidates(out: Path) -> Iterator[tuple[str, str, dict]]:
    """(setting, decoding, {metric: (base, tuned)}) on the rows that have been looked at."""
    base = read_card(out / "base" / f"{LOOKED_AT}.json")["plain"]
    for name in CANDIDATES:
        trial = read_card(out / "choice" / f"{name}.json")[name]
        for way in WAYS if "found" in trial else ():
            yield name, way, {metric: (base[way][metric], trial["found"][way][metric]) for metric in MEASURED}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--workers", type=int, default=2, help="processes; each has its share of the cores")
    parser.add_argument("--batch", type=int, default=48, help="answers in one generate")
    parser.add_argument("--rows", type=int, default=0, help="so many rows of each part, to try the script")
    parser.add_argument("--cap-steps", type=int, default=0, help="at most so many steps, to try the script")
    args = parser.parse_args()
    args.profile, args.overrides = "laptop", OVERRIDES
    started, out, ways = time.time(), Path(args.out), list(WAYS)
    for part in ("base", "choice", "outer"):
        (out / part).mkdir(parents=True, exist_ok=True)
    assets.minilm_folder(), assets.fiqa_test_file(), assets.smollm2_folder()  # once, before the workers
    with ProcessPoolExecutor(args.workers, get_context("spawn"), start, (args,)) as pool:
        work = [pool.submit(tuned, name, LOOKED_AT, ways) for name in CANDIDATES]
        work.append(pool.submit(untuned, LOOKED_AT, ways))
        for done in work:
            print(done.result(), flush=True)
        _, name, way = max((rank(pairs), name, way) for name, way, pairs in candidates(out))
        print(f"Chosen on the rows that have been looked at: {name}; {way}", flush=True)
        work = [pool.submit(tuned, name, fold, [way]) for fold in range(FOLDS)]
        work += [pool.submit(untuned, fold, [way]) for fold in range(FOLDS)]
        for done in work:
            print(done.result(), flush=True)
    result = out_of_fold(out, name, way, Similarity(), rows_in_folds(args.rows)[:FOLDS])
    write_json(out / "summary.json", {"chosen": {"setting": name, "decoding": way}, "result": result})
    profile = asdict(profiles.load_profile(args.profile, args.overrides))
    write_card(out / "search.json", seconds=round(time.time() - started), profile=profile, device=describe())
    print("\n" + "\n".join([*settings(CANDIDATES), "", *tried(candidates(out)), "", *as_table(result)]))


if __name__ == "__main__":
    main()
