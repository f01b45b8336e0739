"""fp32 adapter weights for the optimizer, bf16 copies of them for the forward pass.

A step of AdamW changes a weight by less than bf16 can tell from nothing, so the trained weights stay fp32.
Autocast would cast them, and every activation beside them, in each layer; here each weight is cast once a
step. Trainer, PEFT and checkpoints see the fp32 weights alone.
"""

import contextlib
from collections.abc import Iterator

import torch


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
