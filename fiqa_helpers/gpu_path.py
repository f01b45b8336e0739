"""What `AnswerTrainer` does otherwise on a GPU, so that the GPU never waits for the CPU and memory suffices.

A GPU works through a queue. Whoever asks for a number of it (`loss.item()`) waits until the queue is empty,
and then it stays idle while the CPU fills it again: a fifth of a step of the 8B model. So nothing here asks.
"""

import contextlib
import time
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

from fiqa_helpers.memory import LOGITS_CHUNK

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainingArguments

    from fiqa_helpers.training import AnswerTrainer

MOST_PENDING = 3  # steps whose numbers may be outstanding


def prepare(args: "TrainingArguments") -> None:
    """One process trains on one GPU, and batches are copied to it while it computes.

    Of several GPUs that it sees, a Trainer makes one model with torch's DataParallel, which would cut the
    micro-batches apart and copy 16 GB of weights at every step. Several GPUs are notebook 07's.
    """
    if args.device.type == "cuda":
        args.accelerator_config.non_blocking = True
    args._n_gpu = min(args.n_gpu, 1)  # transformers offers no public setting for it


def loss_options(inputs: Mapping) -> dict[str, object]:
    """Arguments for the model's forward pass on a GPU.

    Liger's fused loss computes its logits in chunks, too small to keep a large GPU busy unless told
    otherwise, and in evaluation it would write all of them out: 4.2 GB for 8,192 tokens of the 8B model.
    A mask of four dimensions counts as made: transformers then does not look for the limits of packed rows in
    `position_ids`, for which it would have to wait. `packed_attention` reads the offsets and no mask.
    """
    if not inputs["input_ids"].is_cuda:
        return {}
    options: dict[str, object] = {"chunk_mem_const": LOGITS_CHUNK, "skip_logits": True}
    if "cu_seq_lens_q" in inputs:
        options["attention_mask"] = inputs["position_ids"][None, None]
    return options


@contextlib.contextmanager
def fused_layers(model: "PeftModel", device: torch.device) -> Iterator[None]:
    """LoRA layers that spare the memory's bandwidth, and torch's own RMSNorm, which costs the CPU less than
    Liger's; on a GPU and as long as the context lasts."""
    if device.type != "cuda":
        yield
        return
    from fiqa_helpers.fused_lora import fuse_lora

    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    before = [norm.__dict__.get("forward") for norm in norms]
    for norm in norms:
        norm.forward = types.MethodType(_rms_norm, norm)
    try:
        with fuse_lora(model):
            yield
    finally:
        for norm, forward in zip(norms, before, strict=True):
            del norm.forward
            if forward:
                norm.forward = forward


def _rms_norm(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon)


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


class Numbers(NamedTuple):
    """A step's loss, the share of each micro-batch, and the norm of its gradient."""

    step: int
    shares: list[float]
    norm: float
    micro_batches: list[Mapping]


class Watch:
    """Numbers of the steps, given out when they are known: at once on a CPU, some steps later on a GPU.

    That is early enough: until then the optimizer itself skips a step whose gradient is no number, by means
    of `found_inf`, which torch's fused AdamW reads on the GPU.
    """

    def __init__(self):
        self._pending: deque = deque()

    def add(
        self, step: int, shares: list[torch.Tensor], norm, micro_batches: list[Mapping], optimizer
    ) -> None:
        """Take note of a step between its backward pass and the optimizer's step."""
        norm = torch.as_tensor(norm, device=shares[0].device).detach().float()
        values, event = torch.stack([*shares, norm]), None
        if values.is_cuda:
            inner = getattr(optimizer, "optimizer", optimizer)  # inside of accelerate's
            inner.grad_scale, inner.found_inf = None, (~norm.isfinite()).float()
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((event, step, values, micro_batches))

    def known(self, wait: bool = False) -> Iterator[Numbers]:
        """What is known by now; with `wait`, everything."""
        while self._pending:
            event, step, values, micro_batches = self._pending[0]
            if event and not (wait or len(self._pending) > MOST_PENDING or event.query()):
                return
            if event:
                event.synchronize()
            self._pending.popleft()
            *shares, norm = values.tolist()
            yield Numbers(step, shares, norm, micro_batches)


class StepTimer:
    """Seconds spent in steps, by the CPU's clock or by the GPU's own, which is behind it."""

    def __init__(self, device: torch.device):
        self._on_gpu, self._spans, self._began = device.type == "cuda", [], None

    def start(self) -> None:
        self._began = self._now()

    def stop(self) -> None:
        self._spans.append((self._began, self._now()))

    def seconds(self) -> float:
        """Since the last call. Waits for the GPU."""
        spans, self._spans = self._spans, []
        if not self._on_gpu:
            return sum(end - begin for begin, end in spans)
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in spans) / 1e3

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
