"""Ways to fine-tune the 8B model on one GPU, each timed in a process of its own: `contenders.py NAME OUT`.

All train the same LoRA (r 8, alpha 32, dropout 0.05 unless said, q/k/v/o) in bf16 on rows of FiQA's real
lengths under the Llama-3 vocabulary, 16 rows an optimizer step, AdamW. The weights are random and so are the
tokens: neither changes a speed or a byte, and nothing about learning can be read from here. Each peer's
settings stand here, and were fixed before its result was seen.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

ROWS_A_STEP = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
WARM_UP = 3  # steps before the clock starts
GIB = 2**30
CARD_24_GIB = 22.0  # what a 24 GB card leaves after the CUDA context


def rows():
    """A Dataset of 648 rows of random tokens, as long (prompt, answer) as the packaged FiQA rows."""
    from datasets import Dataset

    lengths = json.loads((HERE / "fiqa_lengths.json").read_text())
    chance = random.Random(0)
    chance.shuffle(lengths)
    made = []
    for prompt, answer in lengths:
        ids = [chance.randrange(5, 128000) for _ in range(prompt + answer)]
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(made)


def random_8b(attention: str, liger: bool):
    """The 8B architecture with random bf16 weights, made on the GPU (2 s; there is no hub here)."""
    import torch
    from transformers import AutoModelForCausalLM

    from fiqa_helpers.model import reference_config

    config = reference_config()
    config.use_cache = False
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    if liger:  # what NeMo AutoModel does with use_liger_kernel=True
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    return model


def peft_config(dropout: float = 0.05):
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=32, lora_dropout=dropout, target_modules=TARGETS, task_type="CAUSAL_LM")


class Counted:
    """A collator that remembers the real (not padding) tokens and the rows of every batch it makes."""

    def __init__(self, collator: Callable, real: Callable[[dict], int]):
        self.collator, self.real, self.tokens = collator, real, []

    def __call__(self, rows: list) -> dict:
        batch = self.collator(rows)
        self.tokens.append(self.real(batch))
        return batch


def unpadded(batch: dict) -> int:
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


def step_tokens(batch: dict) -> int:
    """Of a batch of StepCollator."""
    return sum(unpadded(micro) for micro in batch["micro_batches"])


def clock():
    """A Trainer callback that notes the time after the warm-up and after the last step, the GPU done."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (WARM_UP, state.max_steps):
                torch.cuda.synchronize()
                self.ends.append(time.perf_counter())

    return Clock()


def arguments(kind, folder: str, steps: int, batch: int, **more):
    """Common training arguments; `batch` rows of a forward pass, as many passes as 16 rows need."""
    settings = dict(
        output_dir=folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=ROWS_A_STEP // batch,
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


def result(counted: Counted, ends: list[float], steps: int, batches_a_step: int, **more) -> dict:
    """Tokens/s and MFU from the end of the warm-up to the last step, everything between included."""
    import torch

    from fiqa_helpers.model import reference_config

    config = reference_config()
    tokens = counted.tokens[WARM_UP * batches_a_step : steps * batches_a_step]
    seconds = ends[1] - ends[0]
    # Forward and the gradient of the activations, 2 operations each for a weight and token; the frozen
    # weights' own gradient is never computed. Embedding rows are looked up. Attention is not counted.
    operations = 4 * (8_030_261_248 - config.vocab_size * config.hidden_size)
    return dict(
        tokens_per_second=round(sum(tokens) / seconds, 1),
        tflops=round(operations * sum(tokens) / seconds / 1e12, 1),
        seconds=round(seconds, 3),
        tokens=sum(tokens),
        steps=steps - WARM_UP,
        peak_allocated_gib=round(torch.cuda.max_memory_allocated() / GIB, 2),
        peak_reserved_gib=round(torch.cuda.max_memory_reserved() / GIB, 2),
        **more,
    )


# -- ours: the trainer of notebook 04


def ours(
    profile_name: str, steps: int, folder: str, overrides: dict | None = None, evaluate: bool = True
) -> dict:
    """Notebook 04's trainer, collator and adapter on the profile as it is; then an evaluation of 64 rows."""
    from dataclasses import replace

    import torch
    from peft import get_peft_model
    from transformers import TrainingArguments

    from fiqa_helpers.machinery.fast import attention_implementation
    from fiqa_helpers.model import lora_config
    from fiqa_helpers.profiles import PROFILES
    from fiqa_helpers.rows import StepCollator
    from fiqa_helpers.trainer import AnswerTrainer

    profile = replace(PROFILES[profile_name], **(overrides or {}))
    if profile_name == "gpu24":
        torch.cuda.set_per_process_memory_fraction(
            CARD_24_GIB * GIB / torch.cuda.get_device_properties(0).total_memory
        )
    torch.manual_seed(profile.seed)
    base = random_8b(attention_implementation(profile.layout, "cuda"), liger=True)
    model = get_peft_model(base, lora_config(profile))
    counted = Counted(StepCollator(128004, profile.tokens_per_batch, profile.layout), step_tokens)
    timer = clock()
    data = rows()
    trainer = AnswerTrainer(
        model=model,
        args=arguments(
            TrainingArguments,
            folder,
            steps,
            ROWS_A_STEP,
            gradient_checkpointing=profile.gradient_checkpointing,
            per_device_eval_batch_size=64,
        ),
        train_dataset=data,
        eval_dataset=data.take(64),
        data_collator=counted,
        callbacks=[timer],
    )
    trainer.train()
    found = result(counted, timer.ends, steps, 1, losses=losses(trainer))
    if evaluate:
        trainer.evaluate()
        found["peak_reserved_with_evaluation_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
    found["settings"] = dict(
        tokens_per_batch=profile.tokens_per_batch,
        layout=profile.layout,
        gradient_checkpointing=profile.gradient_checkpointing,
    )
    return found


def losses(trainer) -> list[float]:
    return [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]


# -- peers


def trainer_padded(steps: int, folder: str) -> dict:
    """transformers' Trainer, bf16 autocast, Liger, batch 4 padded to its longest row, no checkpointing."""
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(random_8b("sdpa", liger=True), peft_config())
    counted, timer = Counted(pad, unpadded), clock()
    args = arguments(TrainingArguments, folder, steps, 4, bf16=True)
    trainer = Trainer(model=model, args=args, train_dataset=rows(), data_collator=counted, callbacks=[timer])
    trainer.train()
    return result(counted, timer.ends, steps, 4, losses=losses(trainer))


def pad(rows: list[dict]) -> dict:
    from fiqa_helpers.rows import pad_rows

    return pad_rows(rows, 128004)


def trl(steps: int, folder: str, best: bool) -> dict:
    """SFTTrainer with its defaults (checkpointing, batch 4), or without checkpointing, with Liger and rows
    grouped by length: its best settings that need no flash-attn build."""
    import torch
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    settings = dict(max_length=2048, dataset_kwargs={"skip_prepare_dataset": True})
    if best:
        settings |= dict(
            gradient_checkpointing=False, use_liger_kernel=True, train_sampling_strategy="group_by_length"
        )
    torch.manual_seed(42)
    timer = clock()
    trainer = SFTTrainer(
        model=random_8b("sdpa", liger=False),
        args=arguments(SFTConfig, folder, steps, 4, **settings),
        train_dataset=rows(),
        processing_class=words_of_nothing(PreTrainedTokenizerFast),
        data_collator=pad,
        peft_config=peft_config(),
        callbacks=[timer],
    )
    counted = trainer.data_collator = Counted(pad, unpadded)
    trainer.train()
    return result(counted, timer.ends, steps, 4, losses=losses(trainer))


def words_of_nothing(kind):
    """A tokenizer that SFTTrainer asks for and never uses: the rows are tokens already."""
    from tokenizers import Tokenizer, models

    tokenizer = kind(tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1}, "<pad>")))
    tokenizer.eos_token, tokenizer.pad_token = "<eos>", "<pad>"
    return tokenizer


def nemo_native(steps: int, folder: str) -> dict:
    """NeMo's own Llama with NeMo's own LoRA, batch 4 padded to its longest row, a plain training loop."""
    import torch
    from nemo_automodel import NeMoAutoModelForCausalLM
    from nemo_automodel.components._peft.lora import PeftConfig
    from torch.nn import functional

    lora = PeftConfig(target_modules=[f"*{name}" for name in TARGETS], dim=8, alpha=32, dropout=0.05)
    model = NeMoAutoModelForCausalLM.from_pretrained(
        str(random_folder()),  # from a configuration it takes minutes: it fills the weights on the CPU
        dtype=torch.bfloat16,
        force_hf=False,
        attn_implementation="sdpa",
        use_liger_kernel=False,
        peft_config=lora,
    )
    model = model.cuda().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    counted, ends, data, seen = Counted(pad, unpadded), [], rows(), []
    for step in range(steps):
        at = [range(16 * step + i, 16 * step + i + 4) for i in range(0, ROWS_A_STEP, 4)]
        batches = [counted([data[i] for i in four]) for four in at]
        answers = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        total = torch.zeros((), device="cuda")
        for batch in batches:
            batch = {key: value.cuda() for key, value in batch.items()}
            labels = batch.pop("labels")
            out = model(**batch)
            logits = out.logits if hasattr(out, "logits") else out
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
            )
            (loss / answers).backward()
            total += loss.detach() / answers
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(total)
        if step + 1 in (WARM_UP, steps):
            torch.cuda.synchronize()
            ends.append(time.perf_counter())
    return result(counted, ends, steps, 4, losses=[round(loss.item(), 4) for loss in seen])


def unsloth(steps: int, folder: str, packing: bool) -> dict:
    """Unsloth's model and LoRA (dropout 0, without which its fused path is off) in SFTTrainer, batch 4.

    `packing` joins rows to sequences of 2,048 tokens and keeps attention inside each, as Unsloth offers it;
    a step then has four such sequences.
    """
    from unsloth import FastLanguageModel  # isort: skip (before transformers and trl, which it patches)

    from trl import SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(random_folder()), max_seq_length=2048, load_in_4bit=False, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model, r=8, lora_alpha=32, lora_dropout=0, target_modules=TARGETS, use_gradient_checkpointing=False
    )
    data = rows()
    settings = dict(max_length=2048, bf16=True, gradient_checkpointing=False)
    if packing:
        settings |= dict(packing=True)
        data = data.select_columns(["input_ids"])
    else:
        settings |= dict(dataset_kwargs={"skip_prepare_dataset": True})
    timer = clock()
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=data,
        args=arguments(SFTConfig, folder, steps, 4, **settings),
        callbacks=[timer],
        **({} if packing else {"data_collator": pad}),
    )
    counted = trainer.data_collator = Counted(trainer.data_collator, unpadded)
    trainer.train()
    return result(counted, timer.ends, steps, 4, losses=losses(trainer))


def random_folder() -> Path:
    """A checkpoint of the random 8B model, for peers that load from a folder (`random_8b.py` makes it)."""
    folder = Path(os.environ.get("FIQA_RANDOM_8B", ""))
    if not (folder / "config.json").exists():
        sys.exit(
            "Set FIQA_RANDOM_8B to a folder that benchmarks/random_8b.py made: this peer loads from one."
        )
    return folder


CONTENDERS: dict[str, tuple[str, Callable[[int, str], dict]]] = {
    "gpu80": ("this workshop, profile gpu80", lambda steps, folder: ours("gpu80", steps, folder)),
    "gpu24": ("this workshop, profile gpu24, held to a 24 GB card", lambda s, f: ours("gpu24", s, f)),
    "trl-default": ("TRL SFTTrainer, defaults", lambda steps, folder: trl(steps, folder, best=False)),
    "trl-best": ("TRL SFTTrainer, Liger, no checkpointing", lambda s, f: trl(s, f, best=True)),
    "trainer-padded": ("transformers Trainer, padded, Liger", trainer_padded),
    "nemo-native": ("NeMo's own Llama and LoRA, padded", nemo_native),
    "unsloth-padded": ("Unsloth, padded", lambda steps, folder: unsloth(steps, folder, packing=False)),
    "unsloth-packed": ("Unsloth, its packing", lambda steps, folder: unsloth(steps, folder, packing=True)),
}


def matmul_tflops() -> float:
    """Rate of this card's bf16 matrix products: the median of 20 of size 8192."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for repeat in range(25):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        if repeat >= 5:
            times.append(start.elapsed_time(end))
    return round(2 * 8192**3 / statistics.median(times) / 1e9, 1)


def machine() -> dict[str, str]:
    """What ran: card, driver's CUDA, and the versions that matter."""
    import torch

    names = "torch triton transformers peft nemo-automodel liger-kernel trl unsloth accelerate datasets"
    versions = {}
    for name in names.split():
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    card = torch.cuda.get_device_properties(0)
    return dict(
        gpu=card.name,
        gpu_memory_gib=round(card.total_memory / GIB, 1),
        cuda=torch.version.cuda,
        python=platform.python_version(),
        **versions,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument(
        "--steps", type=int, default=15, help=f"optimizer steps, {WARM_UP} of them to warm up"
    )
    args = parser.parse_args()
    title, run = CONTENDERS[args.name]
    with tempfile.TemporaryDirectory() as folder:
        found = run(args.steps, folder)
    import torch

    torch.cuda.empty_cache()
    card = dict(name=args.name, title=title, weights="random", **found, machine=machine())
    card["matmul_tflops"] = matmul_tflops()
    card["mfu"] = round(card["tflops"] / card["matmul_tflops"], 3)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
