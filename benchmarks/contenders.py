"""Ways to fine-tune the 8B model on one GPU, each timed in a process of its own: `contenders.py NAME OUT`.

All train a LoRA (r 8, alpha 32, dropout 0.05, q/k/v/o, unless said) in bf16 on rows of FiQA's real lengths
under the Llama-3 vocabulary, 16 rows an optimizer step unless said, AdamW. The weights are random and so are
the tokens: neither changes a speed or a byte, and nothing about learning can be read from here. Each peer
runs at the best public settings that install from the package index; they were fixed here, with their source,
before its result was seen.
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
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

ROWS_A_STEP = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = (*TARGETS, "gate_proj", "up_proj", "down_proj")
WARM_UP = 3  # steps before the clock starts
GIB = 2**30
CARD_24_GIB = 22.0  # what a 24 GB card leaves after the CUDA context
VERSIONS = ("torch", "triton", "transformers", "peft", "nemo-automodel", "liger-kernel", "trl", "datasets")
H100_TFLOPS = 989  # dense bf16, on paper


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


def peft_config():
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=32, lora_dropout=0.05, target_modules=TARGETS, task_type="CAUSAL_LM")


class Counted:
    """A collator that remembers the real (not padding) tokens of every batch it makes."""

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


def pad(rows: list[dict]) -> dict:
    from fiqa_helpers.rows import pad_rows

    return pad_rows(rows, 128004)


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


def measured(tokens: int, seconds: float, steps: int) -> dict:
    """Tokens and operations a second. `tokens` are real ones, in `steps` steps."""
    from fiqa_helpers.model import reference_config

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


def result(counted: Counted, ends: list[float], steps: int, batches_a_step: int, losses: list) -> dict:
    """From the end of the warm-up to the last step, everything between included."""
    import torch

    tokens = counted.tokens[WARM_UP * batches_a_step : steps * batches_a_step]
    return dict(
        **measured(sum(tokens), ends[1] - ends[0], steps - WARM_UP),
        peak_reserved_gib=round(torch.cuda.max_memory_reserved() / GIB, 2),
        losses=losses,
    )


def logged(trainer) -> list[float]:
    return [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]


# -- ours: the trainer of notebook 04


def ours(profile_name: str, steps: int, folder: str, **overrides) -> dict:
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

    profile = replace(PROFILES[profile_name], **overrides)
    if profile_name == "gpu24":
        torch.cuda.set_per_process_memory_fraction(
            CARD_24_GIB * GIB / torch.cuda.get_device_properties(0).total_memory
        )
    torch.manual_seed(profile.seed)
    base = random_8b(attention_implementation(profile.layout, "cuda"), liger=True)
    counted = Counted(StepCollator(128004, profile.tokens_per_batch, profile.layout), step_tokens)
    timer, data = clock(), rows()
    settings = dict(
        gradient_checkpointing=profile.gradient_checkpointing, per_device_eval_batch_size=len(data)
    )
    trainer = AnswerTrainer(
        model=get_peft_model(base, lora_config(profile)),
        args=arguments(TrainingArguments, folder, steps, ROWS_A_STEP, **settings),
        train_dataset=data,
        eval_dataset=data.take(64),
        data_collator=counted,
        callbacks=[timer],
    )
    trainer.train()
    found = result(counted, timer.ends, steps, 1, logged(trainer))
    trainer.evaluate()
    found["peak_reserved_with_evaluation_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
    return found


# -- peers


def trainer_padded(steps: int, folder: str) -> dict:
    """transformers' Trainer, bf16 autocast, Liger, batch 4 of like length, no checkpointing."""
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(random_8b("sdpa", liger=True), peft_config())
    counted, timer = Counted(pad, unpadded), clock()
    args = arguments(
        TrainingArguments, folder, steps, 4, bf16=True, train_sampling_strategy="group_by_length"
    )
    trainer = Trainer(model=model, args=args, train_dataset=rows(), data_collator=counted, callbacks=[timer])
    trainer.train()
    return result(counted, timer.ends, steps, 4, logged(trainer))


AS_IT_IS = {"dataset_kwargs": {"skip_prepare_dataset": True}}  # rows are tokens already
FAST = {"gradient_checkpointing": False, "use_liger_kernel": True}


def trl(steps: int, folder: str, batch: int = 4, attention: str = "sdpa", **settings) -> dict:
    """SFTTrainer; what `settings` don't say stays at its default (checkpointing, bf16 autocast, padding)."""
    import torch
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from fiqa_helpers.machinery.fast import register_packed_attention

    register_packed_attention()
    torch.manual_seed(42)
    timer, collator = clock(), {}
    if not settings.keys() & {"packing", "padding_free"}:
        collator = {"data_collator": pad}
    trainer = SFTTrainer(
        model=random_8b(attention, liger=False),
        args=arguments(SFTConfig, folder, steps, batch, **settings),
        train_dataset=rows(),
        processing_class=words_of_nothing(PreTrainedTokenizerFast),
        peft_config=peft_config(),
        callbacks=[timer],
        **collator,
    )
    counted = trainer.data_collator = Counted(trainer.data_collator, unpadded)
    trainer.train()
    return result(counted, timer.ends, steps, ROWS_A_STEP // batch, logged(trainer))


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
    from random_8b import FOLDER
    from torch.nn import functional

    lora = PeftConfig(
        target_modules=[f"*{name}" for name in TARGETS],
        dim=8,
        alpha=32,
        dropout=0.05,
        use_triton=True,
        use_memory_efficient_lora=False,
    )
    model = NeMoAutoModelForCausalLM.from_pretrained(
        str(FOLDER),  # from a configuration it takes minutes: it fills the weights on the CPU
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
    return result(counted, ends, steps, 4, [round(loss.item(), 4) for loss in seen])


def nemo_recipe(steps: int, folder: str) -> dict:
    """NeMo's recipe class through recipes/fiqa_lora.yaml on one GPU, packed by our collate function."""
    import recipe_bench
    from random_8b import FOLDER

    taken = recipe_bench.train(recipe_bench.random_rows(FOLDER, Path(folder), 1, ROWS_A_STEP, steps), 1)
    timed = recipe_bench.undisturbed(taken)
    seconds = sum(row["seconds"] for row in timed)
    return dict(
        **measured(sum(row["tokens"] for row in timed), seconds, len(timed)),
        peak_reserved_gib=round(max(row["memory_gib"] for row in taken), 2),
        losses=[round(row["loss"], 4) for row in taken],
    )


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    title: str
    source: str  # the page or file that its settings come from
    run: Callable[[int, str], dict]


PROFILE_FILE = "fiqa_helpers/profiles.yaml"
NVIDIA = (
    "https://github.com/NVIDIA-NeMo/Automodel/blob/main/"
    "examples/llm_benchmark/llama3_1/llama3_1_8b_peft_benchmark.yaml"
)
TRL_DOCS = "https://huggingface.co/docs/trl/"
CONTENDERS = {
    "gpu80": Contender("this workshop, profile gpu80", PROFILE_FILE, lambda n, f: ours("gpu80", n, f)),
    "gpu24": Contender(
        "this workshop, profile gpu24, held to a 24 GB card", PROFILE_FILE, lambda n, f: ours("gpu24", n, f)
    ),
    "gpu80-all-linear": Contender(
        "this workshop, gpu80 with LoRA r 16 on all linear layers",
        f"{PROFILE_FILE}; the adapter of {NVIDIA}",
        lambda n, f: ours("gpu80", n, f, lora_rank=16, lora_targets=ALL_LINEAR),
    ),
    "nemo-recipe": Contender(
        "NeMo's recipe, packed by this workshop's collate function", "recipes/fiqa_lora.yaml", nemo_recipe
    ),
    "trl-best": Contender(
        "TRL SFTTrainer, padding-free, Liger, no checkpointing",
        f"{TRL_DOCS}reducing_memory_usage (padding-free), {TRL_DOCS}speeding_up_training (bf16, Liger)",
        lambda n, f: trl(n, f, 16, padding_free=True, max_length=None, **FAST, **AS_IT_IS),
    ),
    "trl-packing": Contender(
        "TRL SFTTrainer, its packing, Liger, no checkpointing",
        f"{TRL_DOCS}reducing_memory_usage (packing), {TRL_DOCS}speeding_up_training (bf16, Liger)",
        lambda n, f: trl(n, f, packing=True, max_length=2048, **FAST),
    ),
    "trl-varlen": Contender(
        "the same, padding-free, with this workshop's attention in place of sdpa",
        f"{TRL_DOCS}reducing_memory_usage, which asks for FlashAttention; the index has no wheel of it",
        lambda n, f: trl(n, f, 16, "packed_varlen", padding_free=True, max_length=None, **FAST, **AS_IT_IS),
    ),
    "nemo-native": Contender(
        "NeMo's own Llama and LoRA, padded, NVIDIA's benchmark settings",
        f"{NVIDIA} (use_triton: true, use_memory_efficient_lora: false)",
        nemo_native,
    ),
    "trainer-padded": Contender(
        "transformers Trainer, padded, grouped by length, Liger",
        "https://huggingface.co/docs/transformers/perf_train_gpu_one, and /kernels (Liger)",
        trainer_padded,
    ),
    "trl-default": Contender(
        "TRL SFTTrainer, defaults",
        f"{TRL_DOCS}sft_trainer",
        lambda n, f: trl(n, f, max_length=2048, **AS_IT_IS),
    ),
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

    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    card = torch.cuda.get_device_properties(0)
    size = round(card.total_memory / GIB, 1)
    return dict(
        gpu=card.name,
        gpu_memory_gib=size,
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
    chosen = CONTENDERS[args.name]
    with tempfile.TemporaryDirectory() as folder:
        found = chosen.run(args.steps, folder)
    import torch

    torch.cuda.empty_cache()
    card = dict(name=args.name, title=chosen.title, source=chosen.source, weights="random", **found)
    card |= {"machine": machine(), "matmul_tflops": matmul_tflops()}
    card["mfu"] = round(card["tflops"] / card["matmul_tflops"], 3)
    card["mfu_h100"] = round(card["tflops"] / H100_TFLOPS, 3)
    args.out.write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
