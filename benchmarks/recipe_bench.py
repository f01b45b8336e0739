"""The recipe that notebook 07 writes, timed on this machine's GPUs through torchrun.

    python benchmarks/random_8b.py MODEL --vocabulary llama_models-0.3.0-py3-none-any.whl
    python benchmarks/recipe_bench.py --model MODEL --random --out FOLDER
    python benchmarks/recipe_bench.py --model MODEL --random --out FOLDER --gpus 2 --kill \\
        --against FOLDER/recipe_1gpu.json

Each call trains `--steps` optimizer steps and writes FOLDER/recipe_Ngpu.json: real (not padded) tokens a
second, seconds of each step, memory, losses, the adapter's keys, what PEFT makes of the adapter, machine and
versions. `--kill` also ends a second run with SIGKILL after its first checkpoint and resumes it; `--against`
compares with an earlier file; `--notebook` takes the same steps as notebook 04 does, for comparison.
`--profile tiny` (without --model) tries the script on any CPU.
"""

import argparse
import gc
import hashlib
import json
import shlex
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import yaml
from notebook_trainer import notebook_trainer

from fiqa_helpers import data, model, profiles
from fiqa_helpers.base import Workspace, write_card
from fiqa_helpers.machinery import machine, recipe
from fiqa_helpers.machinery.recipe import (
    RecipePanel,
    check_recipe,
    kill_all,
    read_metrics,
    read_recipe,
    run_recipe,
)
from fiqa_helpers.rows import StepCollator, encode_rows, pad_rows
from fiqa_helpers.run import Run, quiet

WARM = 3  # steps that are not timed: kernels are chosen and memory is found in them


class MemoryWatch(threading.Thread):
    """The most memory in use on each GPU, by all programs, as nvidia-smi sees it twice a second (GiB)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak: list[float] = []
        self._over = threading.Event()

    def run(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._over.wait(0.5):
            try:
                said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
                used = [int(line) / 1024 for line in said.split()]
            except (OSError, ValueError, subprocess.SubprocessError):
                return
            self.peak = [max(pair) for pair in zip(self.peak or used, used, strict=True)]

    def end(self) -> list[float]:
        self._over.set()
        self.join(30)
        return [round(value, 2) for value in self.peak]


def speed(history: list[dict]) -> dict:
    """Speed over the steps after warm-up; a step that waited for an evaluation before it is left out."""
    waited = {row["step"] + 1 for row in history if "eval_loss" in row}
    timed = [row for row in history if "loss" in row and row["step"] > WARM and row["step"] not in waited]
    seconds = sum(row["seconds"] for row in timed)
    tokens = sum(row["tokens"] for row in timed)
    return {
        "steps_timed": len(timed),
        "tokens_per_second": round(tokens / seconds, 1),
        "tokens_per_step": round(tokens / len(timed), 1),
        "seconds_per_step_median": round(statistics.median(row["seconds"] for row in timed), 4),
    }


def with_tokens(history: list[dict]) -> list[dict]:
    """The history with `tokens`: real tokens of a step, from its rate and its time."""
    return [
        row | {"tokens": round(row["tokens_per_second"] * row["seconds"])} if "loss" in row else row
        for row in history
    ]


def keys_of(adapter: Path) -> dict[str, list[int]]:
    """Name -> shape of each matrix of the adapter."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}


def through_peft(run: Run, path: Path, adapter: Path) -> dict:
    """PEFT's model on the first device: are its keys the adapter's, and what is its validation loss?"""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    profile, name = run.profile, str(read_recipe(path).get("model.pretrained_model_name_or_path"))
    base = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, profile.dtype))
    tuned = PeftModel.from_pretrained(base.to(profile.device), str(adapter)).eval()
    mine = {n.replace(".default", ""): list(p.shape) for n, p in tuned.named_parameters() if "lora_" in n}
    tokenizer = model.load_tokenizer(replace(profile, model=name))
    rows = data.read_processed(run.workspace.data)["validation"]
    rows = rows.select(range(profile.eval_rows)) if profile.eval_rows >= 0 else rows
    total = tokens = 0.0
    with torch.no_grad():
        for row in encode_rows(rows, tokenizer, profile):
            batch = pad_rows([row], tokenizer.pad_token_id)
            batch = {key: value.to(profile.device) for key, value in batch.items()}
            total += tuned(**batch, use_cache=False, num_items_in_batch=1).loss.item()
            tokens += sum(label >= 0 for label in row["labels"])
    return {"keys_equal": mine == keys_of(adapter), "validation_loss": total / tokens}


def notebook_path(run: Run, folder: Path) -> dict:
    """The same steps as notebook 04 takes them: PEFT, AnswerTrainer, the profile's own layout; one GPU."""
    import torch
    from transformers import TrainerCallback

    profile, splits = run.profile, data.read_processed(run.workspace.data)
    tokenizer = model.load_tokenizer(profile)
    rows = {
        split: encode_rows(
            splits[split].take(min(n, len(splits[split]))) if n >= 0 else splits[split], tokenizer, profile
        )
        for split, n in (("train", profile.train_rows), ("validation", profile.eval_rows))
    }
    collator = StepCollator(tokenizer.pad_token_id, profile.tokens_per_batch, profile.layout)
    tokens, ends = [], []

    def counted(chosen: list[dict]) -> dict:
        tokens.append(sum(len(row["input_ids"]) for row in chosen))
        return collator(chosen)

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())  # the step's loss has been read: the device is done

    gc.collect()  # the model that PEFT was asked with
    torch.cuda.empty_cache()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = notebook_trainer(
        profile, folder / "notebook", rows["train"], rows["validation"], counted, [Clock()]
    )
    before = trainer.evaluate()["eval_loss"]
    tokens.clear()
    torch.cuda.empty_cache()
    trainer.train()
    timed = sum(tokens[WARM : len(ends)])
    peak = torch.cuda.max_memory_reserved() / 2**30
    return {
        "layout": profile.layout,
        "tokens_per_second": round(timed / (ends[-1] - ends[WARM - 1]), 1),
        "peak_reserved_gib": round(peak, 2),  # 0 without a GPU
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "validation_loss": {"before": before, "after": trainer.evaluate()["eval_loss"]},
    }


def change(path: Path, changes: list[str]) -> None:
    """Change keys of the recipe at `path`, each given as `section.key=value` in YAML."""
    if not changes:  # as `write_recipe` wrote it, comments and all
        return
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    for text in changes:
        key, _, value = text.partition("=")
        section, name = key.split(".")
        recipe[section][name] = yaml.safe_load(value)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def kill_and_resume(run: Run, args: argparse.Namespace, cpu: bool) -> dict:
    """Start the run again in a folder of its own, SIGKILL all of it after a checkpoint, and resume it."""
    folder = recipe.fresh_folder(run.workspace)
    path = recipe.write_recipe(run, folder / "recipe.yaml", folder / "run", args.gpus)
    change(path, args.set)
    (folder / "run").mkdir()
    line = recipe.launch_line(path, args.gpus, cpu=cpu, python=sys.executable)
    with (folder / "killed.log").open("wb") as log:
        process = subprocess.Popen(shlex.split(line), stdout=log, stderr=subprocess.STDOUT)
        first = run.profile.eval_steps
        while process.poll() is None and len(trained(read_metrics(folder / "run"))) <= first:
            time.sleep(0.1)  # a step after the checkpoint, so that the resumed run must take it again
        kill_all(process.pid)
        process.wait()
    before = trained(read_metrics(folder / "run"))
    for name in ("training.jsonl", "validation.jsonl"):  # so that only the resumed run's lines are read
        (folder / "run" / name).rename(folder / f"killed_{name}")
    panel = RecipePanel("resumed", live=False)
    run_recipe(path, panel, args.gpus, cpu=cpu, resume=True)
    after = trained(panel.history)
    return {
        "killed_after_step": before[-1]["step"],
        "resumed_at_step": after[0]["step"],
        "losses_before": [row["loss"] for row in before],
        "losses_after": [row["loss"] for row in after],
    }


def trained(history: list[dict]) -> list[dict]:
    """The rows of optimizer steps."""
    return [row for row in history if "loss" in row]


def compare(card: dict, other: dict) -> dict:
    """This run beside another one, which is normally that of one GPU."""
    pairs = list(zip(card["losses"], other["losses"], strict=False))[:20]

    def kind(run: dict) -> str | None:
        return (run["device"]["gpu"] or {}).get("name")

    ratio = card["tokens_per_second"] / other["tokens_per_second"]
    return {
        "with": f"{other['gpus']} GPU(s), local batch {other['local_batch_size']}",
        "same_kind_of_gpu": kind(card) == kind(other),
        "speedup": round(ratio, 4),
        "scaling_efficiency": round(ratio * other["gpus"] / card["gpus"], 4),
        "losses_compared": len(pairs),
        "largest_loss_difference": max(abs(a - b) for a, b in pairs),
        "adapter_keys_equal": card["adapter_keys_sha256"] == other["adapter_keys_sha256"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for data, checkpoints and results")
    parser.add_argument("--model", default="", help="model folder (empty: the profile's own model)")
    parser.add_argument("--random", action="store_true", help="say in the result that its weights are random")
    parser.add_argument("--profile", default="gpu80")
    parser.add_argument("--overrides", default="", help="YAML, as in the notebooks")
    parser.add_argument("--data", default="packaged", help="packaged, or a folder or file of rows")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--eval-rows", type=int, default=16)
    parser.add_argument("--set", nargs="*", default=[], help="changes of the recipe: section.key=value ...")
    parser.add_argument("--no-peft", action="store_true", help="don't load the adapter with PEFT")
    parser.add_argument("--notebook", action="store_true", help="also train as notebook 04 does, on one GPU")
    parser.add_argument("--kill", action="store_true", help="also kill a run and resume it")
    parser.add_argument("--against", type=Path, help="an earlier result to compare with")
    parser.add_argument("--label", default="", help="added to the name of the result")
    args = parser.parse_args()
    quiet()
    began = time.monotonic()
    profile = profiles.load_profile(args.profile, args.overrides)
    half = max(1, args.steps // 2)
    profile = replace(profile, max_steps=args.steps, eval_steps=half, eval_rows=args.eval_rows)
    profile = replace(profile, model=args.model or profile.model, data=args.data)
    cpu = profile.device == "cpu"
    workspace = Workspace(str(args.out))
    data.write_processed(data.load_with_report(args.data, workspace)[0], workspace.data)
    run = Run("07", {}, profile, workspace)
    folder = recipe.fresh_folder(workspace)
    path = recipe.write_recipe(run, folder / "recipe.yaml", folder / "run", args.gpus)
    change(path, args.set)
    report = check_recipe(path, args.gpus)
    print(f"{report}\n(checked after {time.monotonic() - began:.0f} s)", flush=True)

    watch = MemoryWatch()
    watch.start()
    panel = RecipePanel("recipe", png=folder / "recipe.png", live=False)
    started = time.monotonic()
    adapter = run_recipe(path, panel, args.gpus, cpu=cpu)
    seconds = time.monotonic() - started
    memory = watch.end()
    history = with_tokens(panel.history)
    keys = keys_of(adapter)
    card = {
        "benchmark": "recipe",
        "command": shlex.join(["python", "benchmarks/recipe_bench.py", *sys.argv[1:]]),
        "device": machine.describe(),
        "profile": asdict(profile),
        "weights": "random" if args.random or profile.model == "random" else profile.model,
        "gpus": args.gpus,
        "base_parameters": report.base_parameters,
        "trainable_parameters": report.trainable,
        "global_batch_size": profile.batch_size,
        "local_batch_size": read_recipe(path).get("step_scheduler.local_batch_size"),
        "accumulation": report.accumulation,
        "set": args.set,
        **speed(history),
        "peak_allocated_gib_first_gpu": round(max(row["memory_gib"] for row in trained(history)), 2),
        "peak_in_use_gib_each_gpu": memory,
        "losses": [row["loss"] for row in trained(history)],
        "learning_rates": [row["learning_rate"] for row in trained(history)],
        "validation": {str(row["step"]): row["eval_loss"] for row in history if "eval_loss" in row},
        "run_seconds_with_start": round(seconds, 1),
        "adapter_keys": len(keys),
        "adapter_keys_sha256": hashlib.sha256(json.dumps(keys).encode()).hexdigest(),
        "peft": {} if args.no_peft else through_peft(run, path, adapter),
        "steps": history,
    }
    if args.against:
        card["against"] = compare(card, json.loads(args.against.read_text()))
    target = args.out / f"recipe_{args.gpus}gpu{args.label}.json"
    write_card(target, **card)  # before the kill, which could go wrong
    if args.notebook:
        card["notebook_path"] = notebook_path(run, folder)
        write_card(target, **card)
    if args.kill:
        card["kill_and_resume"] = kill_and_resume(run, args, cpu)
        write_card(target, **card)
    shown = {key: value for key, value in card.items() if key not in ("profile", "steps", "device")}
    print(json.dumps(shown, indent=1))
    print(f"{target}: {time.monotonic() - began:.0f} s altogether")


if __name__ == "__main__":
    main()
