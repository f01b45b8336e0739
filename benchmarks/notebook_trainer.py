"""Notebook 04's way to train, for the benchmarks that hold something else against it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fiqa_helpers import model
from fiqa_helpers.profiles import Profile

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback

    from fiqa_helpers.trainer import AnswerTrainer


def notebook_trainer(
    profile: Profile,
    folder: Path,
    train: "Dataset",
    validation: "Dataset",
    collator: Callable[[list[dict]], dict],
    callbacks: "Sequence[TrainerCallback]" = (),
    **more: object,
) -> "AnswerTrainer":
    """The AnswerTrainer of `profile` on a fresh base model with a fresh adapter, every step's loss logged.

    `more` are further TrainingArguments. Nothing is saved and nothing reported.
    """
    from peft import get_peft_model
    from transformers import TrainingArguments, set_seed

    from fiqa_helpers.machinery.fast import attention_implementation
    from fiqa_helpers.trainer import AnswerTrainer

    set_seed(profile.seed)
    base = model.load_base(profile, attention_implementation(profile.layout, profile.device))
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=profile.batch_size,
        max_steps=profile.max_steps,
        learning_rate=profile.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=profile.warmup_ratio,
        gradient_checkpointing=profile.gradient_checkpointing,
        save_strategy="no",
        logging_steps=1,
        remove_unused_columns=False,
        use_cpu=profile.device == "cpu",
        seed=profile.seed,
        disable_tqdm=True,
        report_to="none",
        **more,
    )
    return AnswerTrainer(
        model=get_peft_model(base, model.lora_config(profile)),
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collator,
        callbacks=[*callbacks],
    )
