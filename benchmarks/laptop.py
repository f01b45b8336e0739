"""The laptop profile beside TRL's SFTTrainer on a CPU: same model, rows, steps and adapter, one run each.

Both train SmolLM2-135M in fp32 on the same packaged FiQA rows, cut at the profile's length, 8 rows a step, in
turns (ours, TRL, ours, TRL ...), so that another program on the machine disturbs both alike.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
ROUNDS, STEPS, WARM_UP = 3, 5, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    from fiqa_helpers import run

    run.quiet()
    import torch
    from peft import get_peft_model

    from fiqa_helpers import data, model
    from fiqa_helpers.machinery import machine
    from fiqa_helpers.profiles import load_profile
    from fiqa_helpers.rows import encode_rows

    profile = load_profile("laptop")
    tokenizer = model.load_tokenizer(profile)
    rows = encode_rows(
        data.load_fiqa("packaged")["train"].take(STEPS * profile.batch_size), tokenizer, profile
    )
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    losses: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, train in (("ours", ours), ("trl", trl)):
            torch.manual_seed(profile.seed)
            adapter = get_peft_model(model.load_base(profile), model.lora_config(profile))
            clock = make_clock()
            with tempfile.TemporaryDirectory() as folder:
                losses[name] = train(adapter, tokenizer, rows, profile, folder, clock)
            seconds[name].append(round(clock.ends[-1] - clock.ends[WARM_UP - 1], 2))
            print(f"{name}: {seconds[name][-1]:.1f} s for {STEPS - WARM_UP} steps", flush=True)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["trl"], strict=True)]
    names = ["torch", "transformers", "peft", "trl"]
    result = dict(
        seconds=seconds,
        ratio_median=round(statistics.median(ratios), 3),
        ratios=[round(ratio, 3) for ratio in ratios],
        steps=STEPS - WARM_UP,
        losses=losses,
        date=time.strftime("%Y-%m-%d"),
        machine=dict(
            cpu=machine.cpu_name(),
            cores=os.cpu_count(),
            python=platform.python_version(),
            **{name: metadata.version(name) for name in names},
        ),
    )
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Time of ours over TRL's: {result['ratio_median']:.2f} (median of {ROUNDS})")


def make_clock():
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            self.ends.append(time.perf_counter())

    return Clock()


def common(kind, folder: str, profile, **more):
    settings = dict(
        output_dir=folder,
        max_steps=STEPS,
        learning_rate=profile.learning_rate,
        warmup_steps=profile.warmup_ratio,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        seed=profile.seed,
    )
    return kind(**settings | more)


def ours(adapter, tokenizer, rows, profile, folder: str, clock) -> list[float]:
    """Notebook 04's trainer and collator."""
    from transformers import TrainingArguments

    from fiqa_helpers.rows import StepCollator
    from fiqa_helpers.trainer import AnswerTrainer

    trainer = AnswerTrainer(
        model=adapter,
        args=common(TrainingArguments, folder, profile, per_device_train_batch_size=profile.batch_size),
        train_dataset=rows,
        data_collator=StepCollator(tokenizer.pad_token_id, profile.tokens_per_batch, profile.layout),
        callbacks=[clock],
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trl(adapter, tokenizer, rows, profile, folder: str, clock) -> list[float]:
    """SFTTrainer as it comes (gradient checkpointing included), batch 4, two batches a step, padded."""
    from trl import SFTConfig, SFTTrainer

    from fiqa_helpers.rows import pad_rows

    settings = dict(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=profile.batch_size // 4,
        max_length=profile.max_length,
        bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        model=adapter,
        args=common(SFTConfig, folder, profile, **settings),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=lambda batch: pad_rows(batch, tokenizer.pad_token_id),
        callbacks=[clock],
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
