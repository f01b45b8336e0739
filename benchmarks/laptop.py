"""The laptop profile beside TRL's SFTTrainer on a CPU: same model, rows, steps and adapter, one run each.

Both train SmolLM2-135M in fp32 on the same packaged FiQA rows, cut at the profile's length, 8 rows a step, in
turns (ours, TRL, ours, TRL ...), so that another program on the machine disturbs both alike.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from notebook_trainer import arguments, clock, logged, notebook_trainer  # noqa: E402

ROUNDS, STEPS, WARM_UP = 3, 5, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    from fiqa_helpers import data, model, run
    from fiqa_helpers.machinery import machine
    from fiqa_helpers.profiles import load_profile
    from fiqa_helpers.rows import encode_rows

    run.quiet()
    profile = replace(load_profile("laptop"), max_steps=STEPS)
    tokenizer = model.load_tokenizer(profile)
    chosen = data.load_fiqa("packaged")["train"].take(STEPS * profile.batch_size)
    rows = encode_rows(chosen, tokenizer, profile)
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    losses: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, trainer_of in (("ours", ours), ("trl", trl)):
            timer = clock(WARM_UP)
            with tempfile.TemporaryDirectory() as folder:
                trainer = trainer_of(profile, folder, model.load_base(profile), tokenizer, rows)
                trainer.add_callback(timer)
                trainer.train()
            losses[name] = logged(trainer)
            seconds[name].append(round(timer.ends[1] - timer.ends[0], 2))
            print(f"{name}: {seconds[name][-1]:.1f} s for {STEPS - WARM_UP} steps", flush=True)
    ratios = [round(a / b, 3) for a, b in zip(seconds["ours"], seconds["trl"], strict=True)]
    here = dict(cpu=machine.cpu_name(), cores=os.cpu_count())
    here |= {name: metadata.version(name) for name in ("torch", "transformers", "peft", "trl")}
    found = dict(seconds=seconds, ratio_median=statistics.median(ratios), ratios=ratios, losses=losses)
    found |= dict(steps=STEPS - WARM_UP, date=time.strftime("%Y-%m-%d"), machine=here)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"Time of ours over TRL's: {found['ratio_median']:.2f} (median of {ROUNDS})")


def ours(profile, folder: str, base, tokenizer, rows):
    """Notebook 04's trainer and collator."""
    from fiqa_helpers.rows import StepCollator

    collator = StepCollator(tokenizer.pad_token_id, profile.tokens_per_batch, profile.layout)
    return notebook_trainer(profile, folder, base, collator, rows)


def trl(profile, folder: str, base, tokenizer, rows):
    """SFTTrainer as it comes (gradient checkpointing included), batch 4, two batches a step, padded."""
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from fiqa_helpers.model import lora_config
    from fiqa_helpers.rows import pad_rows

    set_seed(profile.seed)
    settings = dict(
        gradient_accumulation_steps=profile.batch_size // 4,
        learning_rate=profile.learning_rate,
        max_length=profile.max_length,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return SFTTrainer(
        model=base,
        args=arguments(SFTConfig, folder, STEPS, 4, **settings),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=lambda batch: pad_rows(batch, tokenizer.pad_token_id),
        peft_config=lora_config(profile),
    )


if __name__ == "__main__":
    main()
