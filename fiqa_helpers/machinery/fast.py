"""What makes training fast on a GPU: packed attention, forward copies, a queue that never runs empty.

A GPU works through a queue. Whoever asks for a number of it (`loss.item()`) waits until the queue is empty,
and then it stays idle while the CPU fills it again: a fifth of a step of the 8B model. So nothing here asks.
"""

import contextlib
import inspect
import time
import types
from collections.abc import Iterator, Mapping

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fiqa_helpers.machinery.machine import LOGITS_CHUNK

# --- Attention that stays inside each row of a packed sequence, without a flash-attn build.

NAME = "packed_varlen"


def attention_implementation(layout: str, device: str) -> str:
    """The transformers attention implementation for a batch layout.

    Packed rows on a GPU use torch's variable-length kernel. Elsewhere `sdpa` computes the same: without an
    attention mask and without a cache, transformers reads the limits of the rows from `position_ids`.
    """
    if layout != "packed" or device != "cuda":
        return "sdpa"
    return register_packed_attention()


def register_packed_attention() -> str:
    """Make `packed_varlen` known to transformers (AttentionInterface); returns that name."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, packed_mask)
    return NAME


def packed_mask(attention_mask: torch.Tensor | None = None, **kwargs: object) -> torch.Tensor | None:
    """No mask for packed rows, whose limits come as offsets; sdpa's for padded ones (`generate`)."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **kwargs)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each row; query (1, heads, tokens, size), key and value with fewer heads.

    Without row offsets (padded rows, `generate`) transformers' own sdpa function answers.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, size)
    output = _kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling)
    return output.unsqueeze(0), None


def _kernel(query, key, value, limits, longest, scaling):
    """torch's kernel. `window_size=(-1, 0)` makes it causal; its default lets a token see those after it."""
    from torch.nn.attention.varlen import varlen_attn  # a GPU's, needed nowhere else

    options = {"scale": scaling, "window_size": (-1, 0)}
    # Several query heads share a key and a value head; torch 2.11 takes that as it is and has no name for it.
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    return varlen_attn(query, key, value, limits, limits, longest, longest, **options)


# --- fp32 adapter weights for the optimizer, bf16 copies of them for the forward pass.


class ForwardCopies:
    """`with copies():` replaces the trainable fp32 weights of `model` by copies in the frozen weights' dtype.

    A step of AdamW changes a weight by less than bf16 can tell from nothing, so the trained weights stay
    fp32. Autocast would cast them, and every activation beside them, in each layer; here each weight is cast
    once for a forward pass. At the end of the block the copies' gradients are added to the fp32 weights' own,
    in fp32. Trainer, PEFT and checkpoints see the fp32 weights alone. Does nothing where all is one dtype.
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
            torch._foreach_copy_(self.copies, self.weights)  # one kernel for all of them
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
        """Move the copies' gradients to the fp32 weights."""
        pairs = [pair for pair in zip(self.weights, self.copies, strict=True) if pair[1].grad is not None]
        if not pairs:  # an evaluation
            return
        grads = [torch.empty_like(weight) for weight, _ in pairs]
        torch._foreach_copy_(grads, [copy.grad for _, copy in pairs])
        for (weight, copy), grad in zip(pairs, grads, strict=True):
            weight.grad = grad if weight.grad is None else weight.grad.add_(grad)
            copy.grad = None


# --- The rest of the way through a step.


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


def lighten_norms(model: torch.nn.Module) -> None:
    """torch's own RMSNorm in place of Liger's, whose launches cost the CPU more: 5 % of a step on a GPU."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and not getattr(module, "offset", 0):  # 1 in Gemma
            module.forward = types.MethodType(_rms_norm, module)


def _rms_norm(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon)


class StepTimer:
    """Seconds between pairs of marks, by the CPU's clock or by the GPU's own, which runs behind it."""

    def __init__(self, device: torch.device):
        self._on_gpu, self._marks = device.type == "cuda", []

    def mark(self) -> None:
        """Call it where a step begins and where it ends."""
        self._marks.append(torch.cuda.Event(enable_timing=True) if self._on_gpu else time.perf_counter())
        if self._on_gpu:
            self._marks[-1].record()

    def seconds(self) -> float:
        """Since the last call. The last mark must have come by: ask after reading a loss."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=False))
        self._marks = []
        if self._on_gpu:
            return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3
        return sum(end - begin for begin, end in pairs)
