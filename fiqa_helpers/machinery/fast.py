"""What makes training fast on a GPU: packed attention, forward copies, a queue that never runs empty.

Importing this module imports torch; the Triton kernels are in fused_lora.py.
"""

import contextlib
import time
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

from fiqa_helpers.base import WorkshopError
from fiqa_helpers.machinery.machine import LOGITS_CHUNK

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainingArguments

    from fiqa_helpers.trainer import AnswerTrainer

# --- Attention that stays inside each row of a packed sequence, without a flash-attn build.

NAME = "packed_varlen"


def attention_implementation(layout: str, device: str) -> str:
    """The transformers attention implementation for a batch layout.

    Packed rows on a GPU use torch's variable-length kernel. Elsewhere `sdpa` computes the same: without an
    attention mask and without a cache, transformers reads the limits of the rows from `position_ids`.

    Raises:
        WorkshopError: packed rows on a GPU, and this torch has no variable-length attention.
    """
    if layout != "packed" or device != "cuda":
        return "sdpa"
    import importlib.util

    import torch

    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        raise WorkshopError(
            f"torch {torch.__version__} has no variable-length attention, which layout packed needs: "
            "install torch 2.11 or newer, or set layout: padded in overrides."
        )
    return register_packed_attention()


def register_packed_attention() -> str:
    """Make `packed_varlen` known to transformers (AttentionInterface); returns that name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, packed_mask)
    return NAME


def packed_mask(attention_mask: "torch.Tensor | None" = None, **kwargs: object) -> "torch.Tensor | None":
    """No mask for packed rows, whose limits come as offsets; sdpa's for padded ones (`generate`)."""
    from transformers.masking_utils import sdpa_mask

    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **kwargs)


def packed_attention(
    module: "torch.nn.Module",
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: "torch.Tensor | None",
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: "torch.Tensor | None" = None,
    max_length_q: int | None = None,
    **kwargs: object,
) -> tuple["torch.Tensor", None]:
    """Causal attention inside each row; query (1, heads, tokens, size), key and value with fewer heads.

    Without row offsets (padded rows, `generate`) transformers' own sdpa function answers.
    """
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, size)
    output = _kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling)
    return output.unsqueeze(0), None


def _kernel(query, key, value, limits, longest, scaling):
    """torch's kernel. `window_size=(-1, 0)` makes it causal; its default lets a token see those after it."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    options = {"scale": scaling, "window_size": (-1, 0)}
    # Several query heads share a key and a value head; torch 2.11 takes that as it is and has no name for it.
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    return varlen_attn(query, key, value, limits, limits, longest, longest, **options)


# --- fp32 adapter weights for the optimizer, bf16 copies of them for the forward pass.
#
# A step of AdamW changes a weight by less than bf16 can tell from nothing, so the trained weights stay
# fp32. Autocast would cast them, and every activation beside them, in each layer; here each weight is cast
# once a step. Trainer, PEFT and checkpoints see the fp32 weights alone.


class ForwardCopies:
    """`with copies():` replaces the trainable fp32 weights of `model` by copies in the frozen weights' dtype.

    Gradients of the copies are added to the fp32 weights' own at the end of the block, so they accumulate in
    fp32 over the micro-batches of a step, one block each. Does nothing where both have one dtype.
    """

    def __init__(self, model: torch.nn.Module):
        frozen = next((p.dtype for p in model.parameters() if not p.requires_grad), torch.float32)
        self._places: list[tuple[torch.nn.Module, str]] = []
        self.weights: list[torch.nn.Parameter] = []
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.requires_grad and weight.dtype == torch.float32 != frozen:
                    self._places.append((module, name))
                    self.weights.append(weight)
        self.copies = [torch.nn.Parameter(weight.detach().to(frozen)) for weight in self.weights]

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if not self.weights:
            yield
            return
        with torch.no_grad():
            torch._foreach_copy_(self.copies, self.weights)
        self._put(self.copies)
        try:
            yield
        finally:
            self._put(self.weights)
            self._collect()

    def _put(self, parameters: list[torch.nn.Parameter]) -> None:
        for (module, name), parameter in zip(self._places, parameters, strict=True):
            module._parameters[name] = parameter

    @torch.no_grad()
    def _collect(self) -> None:
        """Move the copies' gradients to the fp32 weights, all of them in a few kernels."""
        with_grad = [i for i, copy in enumerate(self.copies) if copy.grad is not None]
        if not with_grad:
            return
        grads = [self.copies[i].grad for i in with_grad]
        first = [i for i in with_grad if self.weights[i].grad is None]
        for i in first:
            self.weights[i].grad = torch.zeros_like(self.weights[i])
        sums = [self.weights[i].grad for i in with_grad]
        if len(first) == len(with_grad):  # the first of a step's micro-batches
            torch._foreach_copy_(sums, grads)
        else:
            torch._foreach_add_(sums, [grad.float() for grad in grads])
        for i in with_grad:
            self.copies[i].grad = None


# --- What `AnswerTrainer` does otherwise on a GPU, so that the GPU never waits for the CPU and memory
# suffices.
#
# A GPU works through a queue. Whoever asks for a number of it (`loss.item()`) waits until the queue is
# empty, and then it stays idle while the CPU fills it again: a fifth of a step of the 8B model. So nothing
# here asks.

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
    from fiqa_helpers.machinery.fused_lora import fuse_lora

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
