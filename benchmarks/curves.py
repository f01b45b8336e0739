"""The same 200 steps packed and padded, SmolLM2's real weights in bf16 on a GPU: do the losses agree?

    python benchmarks/curves.py --out benchmarks/results/curves.json

Both layouts see the same rows in the same order, without dropout (its random numbers fall on other places in
another layout). What is left between them is the order in which bf16 sums are taken.
"""

import argparse
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from fiqa_helpers import data, machine, model, notebook
from fiqa_helpers.profiles import Profile, load_profile
from fiqa_helpers.runcard import write_card

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
    notebook.quiet()
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
    from peft import get_peft_model
    from transformers import TrainingArguments, set_seed

    from fiqa_helpers.attention import attention_implementation
    from fiqa_helpers.batching import StepCollator
    from fiqa_helpers.prompts import encode_rows
    from fiqa_helpers.training import AnswerTrainer

    set_seed(profile.seed)
    tokenizer, splits = model.load_tokenizer(profile), data.load_fiqa(profile.data)
    base = model.load_base(profile, attention_implementation(profile.layout, profile.device))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=profile.batch_size,
            max_steps=profile.max_steps,
            learning_rate=profile.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=profile.warmup_ratio,
            bf16=profile.dtype == "bfloat16",
            eval_strategy="steps",
            eval_steps=profile.eval_steps,
            eval_on_start=True,
            logging_steps=1,
            save_strategy="no",
            remove_unused_columns=False,
            use_cpu=profile.device == "cpu",
            seed=profile.seed,
            disable_tqdm=True,
            report_to="none",
        )
        trainer = AnswerTrainer(
            model=get_peft_model(base, model.lora_config(profile)),
            args=arguments,
            train_dataset=encode_rows(splits["train"], tokenizer, profile),
            eval_dataset=encode_rows(splits["validation"], tokenizer, profile),
            data_collator=StepCollator(tokenizer.pad_token_id, profile.tokens_per_batch, profile.layout),
        )
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
