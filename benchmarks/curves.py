"""The same 200 steps packed and padded, SmolLM2's real weights in bf16 on a GPU: do the losses agree?

    python benchmarks/curves.py --out benchmarks/results/curves.json

Both layouts see the same rows in the same order, without dropout (its random numbers fall on other places in
another layout). What is left between them is the order in which bf16 sums are taken.
"""

import argparse
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from notebook_trainer import notebook_trainer

from fiqa_helpers import data, model, run
from fiqa_helpers.base import write_card
from fiqa_helpers.machinery import machine
from fiqa_helpers.profiles import Profile, load_profile

OVERRIDES = "{model: packaged, data: packaged, learning_rate: 5e-4, lora_dropout: 0, eval_steps: 20}"
LAYOUTS = ("padded", "packed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--profile", default="gpu80")
    parser.add_argument("--overrides", default=OVERRIDES, help="YAML, as in the notebooks")
    args = parser.parse_args()
    run.quiet()
    profile = replace(load_profile(args.profile, args.overrides), max_steps=args.steps)
    runs = {}
    for layout in LAYOUTS:
        runs[layout] = train(replace(profile, layout=layout))
        print(f"{layout}: validation {runs[layout]['validation']}", flush=True)
    apart = differences(*runs.values())
    print(f"Apart: {apart}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_card(args.out, profile=asdict(profile), device=machine.describe(), runs=runs, differences=apart)


def train(profile: Profile) -> dict[str, list[float]]:
    """{"training": the loss of every step, "validation": the loss at the start and every `eval_steps`}."""
    from fiqa_helpers.rows import StepCollator, encode_rows

    tokenizer, splits = model.load_tokenizer(profile), data.load_fiqa(profile.data)
    rows = [encode_rows(splits[split], tokenizer, profile) for split in ("train", "validation")]
    collator = StepCollator(tokenizer.pad_token_id, profile.tokens_per_batch, profile.layout)
    evaluated = dict(eval_strategy="steps", eval_steps=profile.eval_steps, eval_on_start=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = notebook_trainer(profile, Path(folder), *rows, collator, **evaluated)
        trainer.train()
    log = trainer.state.log_history
    return {
        "training": [row["loss"] for row in log if "loss" in row],
        "validation": [row["eval_loss"] for row in log if "eval_loss" in row],
    }


def differences(one: dict, other: dict) -> dict[str, float]:
    """Mean and largest distance of two runs' losses, step by step (nats per answer token)."""
    found = {}
    for kind in ("training", "validation"):
        apart = [abs(a - b) for a, b in zip(one[kind], other[kind], strict=True)]
        found[f"{kind}_mean"], found[f"{kind}_largest"] = sum(apart) / len(apart), max(apart)
    return {name: round(value, 5) for name, value in found.items()}


if __name__ == "__main__":
    main()
