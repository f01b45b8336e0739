"""A real, small training run for the panel's tests: two Llama layers and LoRA in a Trainer."""

import time
from dataclasses import dataclass

VOCABULARY = 96
QUESTIONS = ["What is a <b>bond</b>?", "Should I buy $AAPL & hold?", "How do I start to save?"]


@dataclass
class Answer:
    text: str
    stopped: bool


def make_model():
    """Two Llama layers with a LoRA adapter (with dropout, so that random states matter), always the same."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    lora = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(LlamaForCausalLM(config), lora)


def make_rows(count: int, length: int = 24) -> list[dict]:
    """Rows with something to learn: each id is the one before plus the row's own stride."""
    rows = []
    for row in range(count):
        ids = [3 + (row + place * (1 + row % 3)) % (VOCABULARY - 3) for place in range(length)]
        rows.append({"input_ids": ids, "labels": ids})
    return rows


def collate(rows: list[dict], seconds: float = 0.0) -> dict:
    """A batch; `seconds` stands for the time that a step of a real model takes."""
    import torch

    time.sleep(seconds)
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


def sampler(model, temperature: float = 1.0, length: int = 16):
    """answer(questions) with the model's real `generate` at a temperature, one sign per id."""
    import torch

    def answer(questions: list[str]) -> list[Answer]:
        ids = [
            [3 + ord(sign) % (VOCABULARY - 3) for sign in question[:16].ljust(16)] for question in questions
        ]
        options = {"do_sample": temperature > 0, "max_new_tokens": length, "pad_token_id": 2}
        if temperature > 0:
            options["temperature"] = temperature
        output = model.generate(
            input_ids=torch.tensor(ids), attention_mask=torch.ones(3, 16, dtype=int), **options
        )
        rows = output[:, 16:].tolist()
        return [Answer("".join(chr(32 + i % 95) for i in row if i > 2), 1 in row) for row in rows]

    return answer


def make_trainer(folder, callbacks=(), steps: int = 12, seconds: float = 0.0, model=None, **options):
    """A real Trainer on the CPU: evaluation and checkpoint every four steps, a log line each step."""
    from functools import partial

    from transformers import Trainer, TrainingArguments, set_seed

    from fiqa_helpers.machinery.live import remove_progress_callbacks

    set_seed(1)
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "warmup_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
        "logging_nan_inf_filter": False,
    }
    trainer = Trainer(
        model=model or make_model(),
        args=TrainingArguments(**{**settings, **options}),
        train_dataset=make_rows(64),
        eval_dataset=make_rows(8),
        data_collator=partial(collate, seconds=seconds),
        callbacks=list(callbacks),
    )
    remove_progress_callbacks(trainer)
    return trainer
