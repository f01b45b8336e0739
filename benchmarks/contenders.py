"""Ways to fine-tune the 8B model on one GPU, each timed in a process of its own: `contenders.py NAME OUT`.

All train a LoRA (r 8, alpha 32, dropout 0.05, q/k/v/o, unless said) in bf16 on rows of FiQA's real lengths
under the Llama-3 vocabulary, 16 rows an optimizer step unless said, AdamW. The weights are random and so are
the tokens: neither changes a speed or a byte, and nothing about learning can be read from here. Names,
settings and where they come from: contenders.yaml.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

# ruff: noqa: E402
import torch
import yaml
from datasets import Dataset
from notebook_trainer import Clock, arguments, logged, notebook_trainer
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from fiqa_helpers.base import versions
from fiqa_helpers.machinery.fast import attention_implementation, register_packed_attention
from fiqa_helpers.model import reference_config
from fiqa_helpers.profiles import PROFILES
from fiqa_helpers.rows import StepCollator, pad_rows

CONTENDERS = yaml.safe_load((HERE / "contenders.yaml").read_text(encoding="utf-8"))
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LORA = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.05, target_modules=TARGETS, task_type="CAUSAL_LM")
PAD = 128_004
pad = partial(pad_rows, pad_token_id=PAD)
FOLDER = Path(tempfile.gettempdir()) / "fiqa_random_8b"
PARTIAL = FOLDER.with_suffix(".partial")
WARM_UP = 3  # steps before the clock starts
GIB = 2**30
H100_TFLOPS = 989  # dense bf16, on paper


def rows() -> Dataset:
    """648 rows of random tokens, as long (prompt, answer) as the packaged FiQA rows."""
    lengths = json.loads((HERE / "fiqa_lengths.json").read_text())
    chance = random.Random(0)
    chance.shuffle(lengths)
    made = []
    for prompt, answer in lengths:
        ids = [chance.randrange(5, 128000) for _ in range(prompt + answer)]
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(made)


def random_8b(attention: str = "sdpa", liger: bool = False):
    """The 8B architecture with random bf16 weights, made on the GPU in 2 s."""
    config = reference_config()
    config.use_cache = False
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    if liger:  # what NeMo AutoModel does with use_liger_kernel=True
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """As many tokens as the model has; it spells nothing, because the rows are tokens already."""
    words = models.WordLevel({f"<{n}>": n for n in range(128_256)}, unk_token="<0>")
    named = dict(bos_token="<128000>", eos_token="<128009>", pad_token=f"<{PAD}>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **named)


def random_folder() -> None:
    """Write `random_8b` to FOLDER (16 GB), unless it is there; a process of its own frees the GPU again."""
    if not FOLDER.exists():
        code = "import contenders as c; c.random_8b().save_pretrained(c.PARTIAL)"
        subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)
        tokenizer().save_pretrained(PARTIAL)
        PARTIAL.rename(FOLDER)


class Counted:
    """A collator that remembers the real (not padding) tokens of every batch it makes."""

    def __init__(self, collator: Callable):
        self.collator, self.tokens = collator, []

    def __call__(self, rows: list) -> dict:
        batch = self.collator(rows)
        parts = batch.get("micro_batches", [batch])
        self.tokens.append(sum(int((part["input_ids"] != PAD).sum()) for part in parts))
        return batch


def measured(tokens: int, seconds: float, steps: int) -> dict:
    """Tokens and operations a second. `tokens` are real ones, in `steps` steps."""
    config = reference_config()
    # Forward and the gradient of the activations, 2 operations each for a weight and token; the frozen
    # weights' own gradient is never computed. Embedding rows are looked up. Attention is not counted.
    operations = 4 * (8_030_261_248 - config.vocab_size * config.hidden_size)
    return dict(
        tokens_per_second=round(tokens / seconds, 1),
        tflops=round(operations * tokens / seconds / 1e12, 1),
        tokens_per_step=round(tokens / steps),
        steps=steps,
    )


def result(counted: Counted, ends: list[float], steps: int, batches: int, losses: list[float]) -> dict:
    """From the end of the warm-up to the last step, everything between included; `batches` make a step."""
    tokens = counted.tokens[WARM_UP * batches : steps * batches]
    found = measured(sum(tokens), ends[1] - ends[0], steps - WARM_UP)
    return found | dict(peak_reserved_gib=round(torch.cuda.max_memory_reserved() / GIB, 2), losses=losses)


def timed(trainer: Trainer, steps: int, batches: int) -> dict:
    """The result of a Trainer's training."""
    clock = Clock(WARM_UP)
    trainer.add_callback(clock)
    counted = trainer.data_collator = Counted(trainer.data_collator)
    trainer.train()
    return result(counted, clock.ends, steps, batches, logged(trainer))


def ours(steps: int, folder: str, name: str, held_to_gib: float | None = None, **overrides) -> dict:
    """Notebook 04's trainer, collator and adapter on profile `name`; then an evaluation of 64 rows."""
    if held_to_gib:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(held_to_gib * GIB / whole)
    profile = replace(PROFILES[name], max_steps=steps, **overrides)
    base = random_8b(attention_implementation(profile.layout, "cuda"), liger=True)
    collator = StepCollator(PAD, profile.tokens_per_batch, profile.layout)
    data, more = rows(), dict(logging_steps=5, per_device_eval_batch_size=64)
    trainer = notebook_trainer(profile, folder, base, collator, data, data.take(64), **more)
    found = timed(trainer, steps, 1)
    trainer.evaluate()
    return found | dict(peak_reserved_with_evaluation_gib=round(torch.cuda.max_memory_reserved() / GIB, 2))


def trainer_padded(steps: int, folder: str, **settings) -> dict:
    """transformers' Trainer with Liger and no checkpointing, batch 4 padded to its longest row."""
    model = get_peft_model(random_8b(liger=True), LORA)
    args = arguments(TrainingArguments, folder, steps, 4, **settings)
    return timed(Trainer(model=model, args=args, train_dataset=rows(), data_collator=pad), steps, 4)


def trl(steps: int, folder: str, batch: int = 4, attention: str = "sdpa", **settings) -> dict:
    """SFTTrainer; what `settings` don't say stays at its default (checkpointing, bf16 autocast, padding)."""
    from trl import SFTConfig, SFTTrainer

    register_packed_attention()
    torch.manual_seed(42)
    trainer = SFTTrainer(
        model=random_8b(attention),
        args=arguments(SFTConfig, folder, steps, batch, **settings),
        train_dataset=rows(),
        processing_class=tokenizer(),
        data_collator=None if settings.keys() & {"packing", "padding_free"} else pad,
        peft_config=LORA,
    )
    return timed(trainer, steps, 16 // batch)


def nemo_native(steps: int, folder: str, **settings) -> dict:
    """NeMo's own Llama with NeMo's own LoRA, batch 4 padded to its longest row, a plain training loop."""
    from nemo_automodel import NeMoAutoModelForCausalLM
    from nemo_automodel.components._peft.lora import PeftConfig

    targets = [f"*{name}" for name in TARGETS]
    model = NeMoAutoModelForCausalLM.from_pretrained(
        str(FOLDER),  # from a configuration it takes minutes: it fills the weights on the CPU
        dtype=torch.bfloat16,
        force_hf=False,
        attn_implementation="sdpa",
        use_liger_kernel=False,
        peft_config=PeftConfig(target_modules=targets, dim=8, alpha=32, dropout=0.05, **settings),
    )
    model = model.cuda().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    counted, ends, data, seen = Counted(pad), [], rows(), []
    for step in range(steps):
        at = [range(16 * step + i, 16 * step + i + 4) for i in range(0, 16, 4)]
        batches = [counted([data[i] for i in four]) for four in at]
        answers = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        total = torch.zeros((), device="cuda")
        for batch in batches:
            batch = {key: value.cuda() for key, value in batch.items()}
            labels = batch.pop("labels")[:, 1:].flatten()
            out = model(**batch)
            scores = getattr(out, "logits", out)[:, :-1].flatten(0, 1).float()
            loss = functional.cross_entropy(scores, labels, reduction="sum") / answers
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(total)
        if step + 1 in (WARM_UP, steps):
            torch.cuda.synchronize()
            ends.append(time.perf_counter())
    return result(counted, ends, steps, 4, [round(loss.item(), 4) for loss in seen])


def nemo_recipe(steps: int, folder: str) -> dict:
    """NeMo's recipe class through recipes/fiqa_lora.yaml on one GPU, packed by our collate function."""
    import recipe_bench

    taken = recipe_bench.train(recipe_bench.random_rows(Path(folder), 1, 16, steps), 1)
    steady = recipe_bench.undisturbed(taken)
    found = measured(sum(row["tokens"] for row in steady), sum(row["seconds"] for row in steady), len(steady))
    found["peak_reserved_gib"] = round(max(row["memory_gib"] for row in taken), 2)
    return found | dict(losses=[round(row["loss"], 4) for row in taken])


def matmul_tflops() -> float:
    """Rate of this card's bf16 matrix products: the median of 20 of size 8192."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return round(2 * 8192**3 / statistics.median(times[5:]) / 1e9, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=12, help=f"of the optimizer, {WARM_UP} to warm up")
    args = parser.parse_args()
    chosen = CONTENDERS[args.name]
    with tempfile.TemporaryDirectory() as folder:
        found = globals()[chosen["run"]](args.steps, folder, **chosen["settings"])
    torch.cuda.empty_cache()
    card = dict(name=args.name, title=chosen["title"], source=chosen["source"], weights="random", **found)
    more = {name: metadata.version(name) for name in ("trl", "triton", "liger-kernel")}
    card["machine"] = {"gpu": torch.cuda.get_device_name(0)} | more | versions()
    card["matmul_tflops"] = matmul_tflops()
    card["mfu"] = round(card["tflops"] / card["matmul_tflops"], 3)
    card["mfu_h100"] = round(card["tflops"] / H100_TFLOPS, 3)
    args.out.write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
