"""Notebook 04's way to train, for what is held against it."""

from pathlib import Path

from fiqa_helpers import model
from fiqa_helpers.profiles import Profile


def notebook_trainer(profile: Profile, folder: Path, splits, base=None, **more):
    """The AnswerTrainer of `profile` on a fresh adapter; nothing is saved, every step's loss is logged.

    `splits` hold FiQA's rows (train, validation); `base` stands in for the profile's model. `more` are
    further TrainingArguments.
    """
    from peft import get_peft_model
    from transformers import TrainingArguments, set_seed

    from fiqa_helpers.machinery.fast import attention_implementation
    from fiqa_helpers.rows import StepCollator, encode_rows
    from fiqa_helpers.trainer import AnswerTrainer

    set_seed(profile.seed)
    tokenizer = model.load_tokenizer(profile)
    base = base or model.load_base(profile, attention_implementation(profile.layout, profile.device))
    counts = {"train": profile.train_rows, "validation": profile.eval_rows}
    rows = {name: splits[name].take(n if n >= 0 else len(splits[name])) for name, n in counts.items()}
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=profile.batch_size,
        per_device_eval_batch_size=profile.batch_size,
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
    )
    return AnswerTrainer(
        model=get_peft_model(base, model.lora_config(profile)),
        args=TrainingArguments(**settings | more),
        train_dataset=encode_rows(rows["train"], tokenizer, profile),
        eval_dataset=encode_rows(rows["validation"], tokenizer, profile),
        data_collator=StepCollator(tokenizer.pad_token_id, profile.tokens_per_batch, profile.layout),
    )
