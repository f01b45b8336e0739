"""A real, small training run for the panel's tests: two Llama layers and LoRA in a Trainer."""

import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

TRAIN = """
import sys; sys.path.insert(0, {tests!r})
import panel_training as t
from fiqa_helpers.machinery.live import LivePanel
from fiqa_helpers.show import style_page
style_page()
model = t.make_model()
panel = LivePanel(t.QUESTIONS, t.sampler(model), {every}, title="Small", png={run!r} + "/picture.png")
trainer = t.make_trainer({run!r}, [panel], model=model, steps={steps}, seconds={seconds}, eval_on_start=True)
"""
QUESTIONS = ["What is a <b>bond</b>?", "Should I buy $AAPL & hold?", "How do I start to save?"]
TOKENS = 96  # of the vocabulary


def write_notebook(path: Path, steps: int, seconds: float, every: int = 4) -> None:
    """A notebook like 04 in small; its cells are called make, train and after."""
    values = {"steps": steps, "seconds": seconds, "every": every, "run": str(path.with_suffix(""))}
    sources = {"make": TRAIN.format(tests=str(Path(__file__).parent), **values)}
    sources |= {"train": "with panel:\n    trainer.train();", "after": "print('after:', panel.outcome)"}
    cells = [nbformat.v4.new_code_cell(source, id=name) for name, source in sources.items()]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


def make_model():
    """Two Llama layers with a LoRA adapter (with dropout, so that random states matter), always the same."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=TOKENS, **sizes, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    places = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, **places))


def sampler(model, temperature: float = 1.0):
    """answer(questions) with the model's real `generate` at a temperature, one sign per id."""
    options = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}

    def answer(questions: list[str]) -> list:
        ids = torch.tensor([[3 + ord(sign) % (TOKENS - 3) for sign in text[:16]] for text in questions])
        options["attention_mask"] = torch.ones_like(ids)
        output = model.generate(input_ids=ids, max_new_tokens=16, pad_token_id=2, **options)
        texts = ["".join(chr(32 + i % 95) for i in row) for row in output[:, 16:].tolist()]
        return [SimpleNamespace(text=text, stopped=False) for text in texts]

    return answer


def at_step(step: int, function) -> TrainerCallback:
    """Calls `function` when the trainer reaches the beginning of the step after `step`."""
    callback = TrainerCallback()
    callback.on_step_begin = lambda args, state, *_, **__: function() if state.global_step == step else None
    return callback


def make_trainer(folder, callbacks=(), steps: int = 12, seconds: float = 0.0, model=None, **options):
    """A real Trainer on the CPU: evaluation and checkpoint every four steps, a log line each step.

    `seconds` stands for the time that a step of a real model takes.
    """
    transformers.set_seed(1)
    often = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "logging_steps": 1}
    plain = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_nan_inf_filter": False}
    recipe = {"per_device_train_batch_size": 4, "learning_rate": 5e-3, "warmup_steps": 2, "seed": 1}

    def collate(rows: list[dict]) -> dict:
        time.sleep(seconds)
        return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}

    # something to learn: each id is the one before plus the row's own stride
    rows = [[3 + (row + i * (1 + row % 3)) % (TOKENS - 3) for i in range(24)] for row in range(64)]
    rows = [{"input_ids": ids, "labels": ids} for ids in rows]
    trainer = Trainer(
        model=model or make_model(),
        args=TrainingArguments(str(folder), max_steps=steps, **often, **plain, **recipe, **options),
        train_dataset=rows,
        eval_dataset=rows[:8],
        data_collator=collate,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer
