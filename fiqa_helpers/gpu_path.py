"""What `AnswerTrainer` does otherwise on a GPU: fused layers and loss, a rehearsal of the largest pass."""

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peft import PeftModel

    from fiqa_helpers.training import AnswerTrainer

LOGITS_CHUNK = 8  # logits of a chunk take 8 times the memory of its hidden states


def loss_options(device: torch.device) -> dict[str, object]:
    """Arguments for the model's forward pass, which Liger's fused loss reads and other models ignore.

    Its chunks of logits are too small to keep a large GPU busy unless told otherwise, and in evaluation it
    would write out all logits: 4.2 GB for 8,192 tokens of the 8B model's vocabulary.
    """
    return {"chunk_mem_const": LOGITS_CHUNK, "skip_logits": True} if device.type == "cuda" else {}


def fused_layers(model: "PeftModel", device: torch.device) -> contextlib.AbstractContextManager:
    """LoRA layers that spare the memory's bandwidth, on a GPU and as long as the context lasts."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    from fiqa_helpers.fused_lora import fuse_lora

    return fuse_lora(model)


def rehearse(trainer: "AnswerTrainer", rows: int) -> None:
    """Forward and backward on the largest micro-batch that `rows` rows of the training data can give.

    What does not fit in memory fails here, in the first seconds, and not when the longest rows meet hours
    later. Weights, gradients and random state are left as they were. Does nothing without a GPU.
    """
    if trainer.args.device.type != "cuda":
        return
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    longest = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)[:rows]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in longest])
    largest: Mapping = max(batch["micro_batches"], key=lambda micro: micro["input_ids"].numel())
    with torch.random.fork_rng(), trainer.forward_copies():
        trainer.model.train()
        trainer.accelerator.backward(trainer.loss_sum(trainer.model, largest))
    trainer.model.zero_grad()
