"""Speed and memory of this workshop beside its peers: `make bench`, or `python benchmarks/bench.py`.

With an NVIDIA GPU: the 8B model with random weights, every contender of `contenders.py`, one after the other,
each in a process of its own. Without one: the laptop profile beside TRL, SmolLM2 in fp32 on the same packaged
rows, in turns (ours, TRL, ours, TRL ...), so that another program on the machine disturbs both alike. Results
go to benchmarks/results/, from which `report.py` makes README's lines, SPEED.md and a plot.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch
from contenders import CONTENDERS, HERE, random_folder
from notebook_trainer import Clock, arguments, notebook_trainer

from fiqa_helpers import data, model
from fiqa_helpers.base import versions
from fiqa_helpers.machinery import machine
from fiqa_helpers.profiles import load_profile
from fiqa_helpers.rows import StepCollator, encode_rows, pad_rows


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", default=",".join(CONTENDERS), help="names of contenders, with commas")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of each, 3 of them to warm up")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the result files")
    parser.add_argument("--minutes", type=float, default=8, help="stop there; what is missing then is named")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_available():
        on_gpu(args)
    else:
        on_cpu(args.out / "laptop.json")


def on_gpu(args: argparse.Namespace) -> None:
    ends = time.monotonic() + 60 * args.minutes
    names, found = args.only.split(","), {"date": time.strftime("%Y-%m-%d"), "runs": []}
    if {"nemo-native", "nemo-recipe"} & {*names}:
        random_folder()
    for name in names:
        card = run(name, CONTENDERS[name].get("steps", args.steps), ends - time.monotonic())
        found["runs"].append(card)
        print(f"{name}: {card.get('error') or card['tokens_per_second']}", flush=True)
        (args.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")


def run(name: str, steps: int, seconds: float) -> dict:
    """The result of one contender; a failure is a result too, with the last line of what it said."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log"
        command = [sys.executable, HERE / "contenders.py", name, out, "--steps", str(steps)]
        with log.open("w") as said:
            try:
                subprocess.run(command, stdout=said, stderr=said, timeout=max(1, seconds))
            except subprocess.TimeoutExpired:
                said.write("\nout of time\n")
        if out.exists():
            return json.loads(out.read_text())
        print(log.read_text()[-2000:], flush=True)
        last = log.read_text().strip().rpartition("\n")[2]
        return {"name": name, "error": last[:300] or "it said nothing"}


def on_cpu(out: Path, rounds: int = 3, steps: int = 5) -> None:
    """The first of the steps warms up."""
    profile = replace(load_profile("laptop"), max_steps=steps)
    tokenizer = model.load_tokenizer(profile)
    chosen = data.load_fiqa("packaged")["train"].take(steps * profile.batch_size)
    rows = encode_rows(chosen, tokenizer, profile)
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    for name, trainer_of in [("ours", ours), ("trl", trl)] * rounds:
        timer = Clock(1)
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(profile, folder, model.load_base(profile), tokenizer, rows)
            trainer.add_callback(timer)
            trainer.train()
        seconds[name].append(round(timer.ends[1] - timer.ends[0], 2))
        print(f"{name}: {seconds[name][-1]:.1f} s for {steps - 1} steps", flush=True)
    ratios = [round(a / b, 3) for a, b in zip(seconds["ours"], seconds["trl"], strict=True)]
    here = dict(cpu=machine.cpu_name(), cores=os.cpu_count(), trl=metadata.version("trl")) | versions()
    found = dict(seconds=seconds, ratio_median=statistics.median(ratios), ratios=ratios)
    found |= dict(steps=steps - 1, date=time.strftime("%Y-%m-%d"), machine=here)
    out.write_text(json.dumps(found, indent=1) + "\n")


def ours(profile, folder: str, base, tokenizer, rows):
    """Notebook 04's trainer and collator."""
    collator = StepCollator(tokenizer.pad_token_id, profile.tokens_per_batch, profile.layout)
    return notebook_trainer(profile, folder, base, collator, rows)


def trl(profile, folder: str, base, tokenizer, rows):
    """SFTTrainer as it comes (gradient checkpointing included), batch 4, two batches a step, padded."""
    from trl import SFTConfig, SFTTrainer

    settings = dict(
        gradient_accumulation_steps=profile.batch_size // 4,
        learning_rate=profile.learning_rate,
        max_length=profile.max_length,
        bf16=False,
        use_cpu=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return SFTTrainer(
        model=base,
        args=arguments(SFTConfig, folder, profile.max_steps, 4, **settings),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=lambda batch: pad_rows(batch, tokenizer.pad_token_id),
        peft_config=model.lora_config(profile),
    )


if __name__ == "__main__":
    main()
