"""A real, small training run for the panel's tests: two Llama layers and LoRA in a Trainer."""

import time
from functools import partial
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

QUESTIONS = ["What is a <b>bond</b>?", "Should I buy $AAPL & hold?", "How do I start to save?"]
TOKENS = 96  # of the vocabulary


def Answer(text: str, stopped: bool):  # noqa: N802, as the helper's class
    return SimpleNamespace(text=text, stopped=stopped)


def make_model():
    """Two Llama layers with a LoRA adapter (with dropout, so that random states matter), always the same."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=TOKENS, **sizes, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    places = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, **places))


def make_rows(count: int, length: int = 24) -> list[dict]:
    """Rows with something to learn: each id is the one before plus the row's own stride."""
    rows = [[3 + (row + i * (1 + row % 3)) % (TOKENS - 3) for i in range(length)] for row in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def collate(rows: list[dict], seconds: float = 0.0) -> dict:
    """A batch; `seconds` stands for the time that a step of a real model takes."""
    time.sleep(seconds)
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


def sampler(model, temperature: float = 1.0, length: int = 16):
    """answer(questions) with the model's real `generate` at a temperature, one sign per id."""
    options = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}

    def answer(questions: list[str]) -> list:
        ids = torch.tensor([[3 + ord(sign) % (TOKENS - 3) for sign in text[:16]] for text in questions])
        options["attention_mask"] = torch.ones_like(ids)
        output = model.generate(input_ids=ids, max_new_tokens=length, pad_token_id=2, **options)
        rows = output[:, 16:].tolist()
        return [Answer("".join(chr(32 + i % 95) for i in row if i > 2), 1 in row) for row in rows]

    return answer


def at_step(step: int, function) -> TrainerCallback:
    """Calls `function` when the trainer reaches the beginning of the step after `step`."""
    callback = TrainerCallback()
    callback.on_step_begin = lambda args, state, *_, **__: function() if state.global_step == step else None
    return callback


def make_trainer(folder, callbacks=(), steps: int = 12, seconds: float = 0.0, model=None, **options):
    """A real Trainer on the CPU: evaluation and checkpoint every four steps, a log line each step."""
    set_seed(1)
    often = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "logging_steps": 1}
    plain = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_nan_inf_filter": False}
    recipe = {"per_device_train_batch_size": 4, "learning_rate": 5e-3, "warmup_steps": 2, "seed": 1}
    trainer = Trainer(
        model=model or make_model(),
        args=TrainingArguments(str(folder), max_steps=steps, **often, **plain, **recipe, **options),
        train_dataset=make_rows(64),
        eval_dataset=make_rows(8),
        data_collator=partial(collate, seconds=seconds),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
