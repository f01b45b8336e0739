"""Notebook 04's way to train, for what is held against it."""

import time
from collections.abc import Callable

import torch
from peft import get_peft_model
from transformers import TrainerCallback, TrainingArguments, set_seed

from fiqa_helpers import model
from fiqa_helpers.trainer import AnswerTrainer


def arguments(kind: type, folder: object, steps: int, batch: int, **more: object):
    """Training arguments of `kind` that all contenders share; `batch` rows of a forward pass, 16 a step."""
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=max(1, 16 // batch),
        max_steps=steps,
        learning_rate=2e-4,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        logging_steps=5,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=42,
        remove_unused_columns=False,
    )
    return kind(**settings | more)


def notebook_trainer(profile, folder, base, collator: Callable, train, validation=None, **more: object):
    """The AnswerTrainer of `profile` with a fresh adapter on `base`; nothing is saved.

    `train` and `validation` hold rows of tokens; `more` are further TrainingArguments.
    """
    set_seed(profile.seed)
    settings = dict(
        gradient_accumulation_steps=1,  # a batch is a step
        per_device_eval_batch_size=profile.batch_size,
        learning_rate=profile.learning_rate,
        warmup_steps=profile.warmup_ratio,
        gradient_checkpointing=profile.gradient_checkpointing,
        use_cpu=profile.device == "cpu",
        seed=profile.seed,
        logging_steps=1,
    )
    return AnswerTrainer(
        model=get_peft_model(base, model.lora_config(profile)),
        args=arguments(TrainingArguments, folder, profile.max_steps, profile.batch_size, **settings | more),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collator,
    )


def logged(trainer) -> list[float]:
    """The losses that a Trainer has logged."""
    return [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]


class Clock(TrainerCallback):
    """Notes the time after `warm_up` steps and after the last, the GPU done."""

    def __init__(self, warm_up: int):
        self.warm_up, self.ends = warm_up, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (self.warm_up, state.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
