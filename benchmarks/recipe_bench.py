"""recipes/fiqa_lora.yaml on this machine's GPUs beside notebook 04's trainer.

    python benchmarks/recipe_bench.py speed FOLDER    # the 8B architecture, random weights, FiQA's lengths
    python benchmarks/recipe_bench.py agree FOLDER    # SmolLM2's real weights: losses, validation

Runs go to FOLDER, and each part writes its result to `--out` as soon as it has it. Runs that need more GPUs
than there are are left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

# ruff: noqa: E402
import torch
from contenders import FOLDER, WARM_UP, random_folder, rows
from notebook_trainer import logged, notebook_trainer
from transformers import AutoModelForCausalLM

from fiqa_helpers import data, model
from fiqa_helpers.base import WorkshopError, write_card
from fiqa_helpers.machinery import machine, recipe
from fiqa_helpers.machinery.fast import attention_implementation
from fiqa_helpers.machinery.live import LivePanel
from fiqa_helpers.profiles import PROFILES, Profile, load_profile
from fiqa_helpers.rows import StepCollator, encode_rows

FSDP2 = ["--distributed.strategy=fsdp2"]
CHUNKED = "--loss_fn._target_=nemo_automodel.components.loss.chunked_ce.ChunkedCrossEntropy"
SPEED = {  # result file: (GPUs, rows of a step, what else stands behind the recipe)
    "recipe": (1, 16, []),
    "recipe_2gpu": (2, 32, []),
    "recipe_4gpu": (4, 64, []),
    "recipe_2gpu_fsdp2": (2, 32, FSDP2),
    "recipe_4gpu_fsdp2": (4, 64, FSDP2),
    "recipe_2gpu_same_step": (2, 16, []),
    "recipe_4gpu_same_step": (4, 16, []),
    "recipe_chunked_loss": (1, 16, [CHUNKED, "--loss_fn.compile=false"]),
}
AGREE = {"ddp_1": (1, []), "ddp_2": (2, []), "fsdp2_2": (2, FSDP2), "ddp_4": (4, []), "fsdp2_4": (4, FSDP2)}


# -- runs of the recipe


def length_rows(tokenizer, split: str, rows_of=rows, **settings) -> list[dict]:
    """What `speed` trains on: random tokens, as long as FiQA's rows, with shifted labels."""
    return [recipe.shift(row) for row in (rows_of() if split == "train" else rows_of().take(8))]


def behind(base: Path, output: Path, gpus: int, batch: int, steps: int) -> list[str]:
    """What stands behind recipes/fiqa_lora.yaml for any run here."""
    changes = {
        "model.pretrained_model_name_or_path": base,
        "dataset.tokenizer.name": base,
        "step_scheduler.global_batch_size": batch,
        "step_scheduler.local_batch_size": batch // gpus,
        "step_scheduler.max_steps": steps,
        "step_scheduler.val_every_steps": steps,
        "step_scheduler.ckpt_every_steps": steps,
        "lr_scheduler.lr_warmup_steps": -(-steps // 10),
        "checkpoint.checkpoint_dir": output,
    }
    return [f"--{name}={value}" for name, value in changes.items()]


def random_rows(output: Path, gpus: int, batch: int, steps: int) -> list[str]:
    """Behind the recipe for a run of `speed`, on `length_rows`."""
    ours = [f"--{name}._target_=recipe_bench.length_rows" for name in ("dataset", "validation_dataset")]
    return [*behind(FOLDER, output, gpus, batch, steps), *ours]


def train(changes: list[str], gpus: int) -> list[dict]:
    """The steps of one run: loss, tokens, seconds, passes and memory of each.

    Raises:
        WorkshopError: it failed, with the first error of its log.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # its processes look for `length_rows`
    panel = LivePanel([], lambda questions: [], 0, "recipe")
    recipe.run_recipe(changes, panel, gpus)
    steps = [row for row in panel.history if "loss" in row]
    return [row | {"seconds": row["tokens"] / row["tokens_per_second"]} for row in steps]


def undisturbed(steps: list[dict]) -> list[dict]:
    """Steps to be timed: kernels are chosen in the first ones; one after an evaluation has waited for it."""
    pairs = zip(steps[WARM_UP:], steps[WARM_UP - 1 :], strict=False)
    return [row for row, before in pairs if "eval_loss" not in before]


# -- speed


def speed(args: argparse.Namespace) -> None:
    ends = time.monotonic() + 60 * args.minutes
    random_folder()
    beside = args.folder / "gpu80.json"
    command = [sys.executable, HERE / "contenders.py", "gpu80", beside, "--steps", "14"]
    subprocess.run(command, check=True)
    notebook = json.loads(beside.read_text())["tokens_per_second"]
    print(f"notebook 04's trainer: {notebook} tokens/s", flush=True)
    for name in args.only.split(",") if args.only else SPEED:
        gpus, batch, more = SPEED[name]
        if gpus > torch.cuda.device_count() or time.monotonic() > ends:
            print(f"{name}: too few GPUs, or no time left", flush=True)
            continue
        try:
            steps = train([*random_rows(args.folder / name, gpus, batch, 14), *more], gpus)
        except WorkshopError as error:
            print(f"{name}: {error}", flush=True)
            continue
        timed = undisturbed(steps)
        card = {
            "benchmark": "recipe",
            "gpus": gpus,
            "global_batch_size": batch,
            "local_batch_size": batch // gpus,
            "strategy": "fsdp2" if more == FSDP2 else "ddp",
            "behind": more,
            "device": machine.describe(),
            "profile": asdict(PROFILES["gpu80"]),
            "weights": "random",
            "tokens_per_second": round(sum(r["tokens"] for r in timed) / sum(r["seconds"] for r in timed), 1),
            "seconds_per_step_median": round(statistics.median(row["seconds"] for row in timed), 4),
            "steps_timed": len(timed),
            "passes": [row["passes"] for row in steps],
            "peak_reserved_gib_first_gpu": round(max(row["memory_gib"] for row in steps), 2),
            "losses": [row["loss"] for row in steps],
            "notebook_tokens_per_second": notebook,
        }
        write_card(args.out / f"{name}.json", **card)
        print(f"{name}: {card['tokens_per_second']:,.0f} tokens/s, losses {card['losses'][:3]}", flush=True)


# -- the same losses on any number of GPUs, and as notebook 04


def smollm2(args: argparse.Namespace) -> Profile:
    """The reference settings on packaged rows and SmolLM2's real weights, in a folder.

    In bf16, as Nemotron's files are: NeMo keeps the type of the files.
    """
    profile = load_profile("gpu80", "{model: packaged, data: packaged}")
    folder = args.folder / "smollm2"
    if not folder.exists():
        weights = AutoModelForCausalLM.from_pretrained(model.model_path(profile), dtype=profile.dtype)
        weights.save_pretrained(folder)
        model.load_tokenizer(profile).save_pretrained(folder)
    return replace(profile, model=str(folder), max_steps=60, eval_rows=48)


def real_rows(args: argparse.Namespace, output: Path, gpus: int) -> list[str]:
    """Behind the recipe for a run of `agree`."""
    profile = smollm2(args)
    changes = behind(profile.model, output, gpus, profile.batch_size, profile.max_steps)
    changes += [f"--{name}.folder={args.folder}" for name in ("dataset", "validation_dataset")]
    return [*changes, f"--validation_dataset.rows={profile.eval_rows}"]


def agree(args: argparse.Namespace) -> None:
    found = {"notebook": notebook(args)}
    for name, (gpus, more) in AGREE.items():
        if gpus > torch.cuda.device_count():
            continue
        steps = train([*real_rows(args, args.folder / name, gpus), *more], gpus)
        losses, validated = [row["loss"] for row in steps], steps[-1]["eval_loss"]
        first = zip(losses[:20], found["notebook"]["losses"][:20], strict=True)
        found[name] = {
            "losses": losses,
            "validation_loss": validated,
            "largest_step_difference": round(max(abs(a - b) for a, b in first), 5),
            "validation_difference": round(validated - found["notebook"]["validation_loss"], 5),
        }
        print(name, {key: value for key, value in found[name].items() if key != "losses"}, flush=True)
        about = {"benchmark": "recipe_agree", "profile": asdict(smollm2(args))}
        write_card(args.out / "recipe_agree.json", **about, runs=found)


def notebook(args: argparse.Namespace) -> dict:
    """Notebook 04's trainer on the rows of `agree`, which it writes, on one GPU."""
    profile, splits = smollm2(args), data.load_fiqa("packaged")
    data.write_processed(splits, args.folder)
    tokenizer = model.load_tokenizer(profile)
    held_out = splits["validation"].take(profile.eval_rows)
    encoded = [encode_rows(split, tokenizer, profile) for split in (splits["train"], held_out)]
    collator = StepCollator(tokenizer.pad_token_id, profile.tokens_per_batch, profile.layout)
    base = model.load_base(profile, attention_implementation(profile.layout, profile.device))
    trainer = notebook_trainer(profile, args.folder / "notebook", base, collator, *encoded)
    trainer.train()
    same = {"largest_step_difference": 0.0, "validation_difference": 0.0}
    return {"losses": logged(trainer), "validation_loss": trainer.evaluate()["eval_loss"]} | same


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("part", choices=("speed", "agree"))
    parser.add_argument("folder", type=Path, help="for models and runs")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the result files")
    parser.add_argument("--minutes", type=float, default=8, help="of speed: begin no run later")
    parser.add_argument("--only", default="", help="of speed: names of result files, with commas")
    args = parser.parse_args()
    args.folder, args.out = args.folder.resolve(), args.out.resolve()
    for folder in (args.folder, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    globals()[args.part](args)


if __name__ == "__main__":
    main()
