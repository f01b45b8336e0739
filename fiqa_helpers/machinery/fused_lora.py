"""LoRA layers whose dropout, down- and up-projection read the activations once: for training on a GPU.

PEFT writes `W x + s B A dropout(x)` with five passes over memory and keeps a dropped-out copy of `x` for each
projection. Here a mask is a function of a seed and a position, so it is made again in the backward pass
instead of kept, and both adapter terms are added in place. PEFT still owns the weights, saves and loads them;
only the forward method of its layers is another while `fuse_lora` is in force.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch.nn import functional

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora.layer import Linear

ROUNDS = tl.constexpr(7)  # of Philox 4x32, enough to pass BigCrush (Salmon et al. 2011)
SMALLEST_RANK = 16  # what the matrix units multiply; smaller ranks are padded with zeros
TOKENS, COLUMNS = 16, 64  # of one tile
SPLITS = 16  # parts of the tokens whose shares of A's gradient are added up at the end, in a fixed order


@triton.jit
def _dropped(x, random, probability):
    return tl.where(random >= probability, x * (1.0 / (1.0 - probability)), 0.0).to(x.dtype)


@triton.jit(do_not_specialize=["seed", "tokens"])
def _down_kernel(
    x, a, h, seed, tokens, width, probability,
    RANK: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """h (tokens, RANK) = dropout(x) @ a.T; one draw serves four columns, a quarter of the width apart."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    ranks = tl.arange(0, PADDED)
    quarter = width // 4
    total = tl.zeros((TOKENS, PADDED), tl.float32)
    for start in range(0, quarter, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (rows[:, None] < tokens) & (columns[None, :] < quarter)
        known = (ranks[:, None] < RANK) & (columns[None, :] < quarter)
        at = rows[:, None] * width + columns[None, :]
        a_at = ranks[:, None] * width + columns[None, :]
        r0, r1, r2, r3 = tl.rand4x(seed, rows[:, None] * quarter + columns[None, :], ROUNDS)
        x0 = _dropped(tl.load(x + at, inside, 0.0), r0, probability)
        total = tl.dot(x0, tl.trans(tl.load(a + a_at, known, 0.0)), total)
        x1 = _dropped(tl.load(x + at + quarter, inside, 0.0), r1, probability)
        total = tl.dot(x1, tl.trans(tl.load(a + a_at + quarter, known, 0.0)), total)
        x2 = _dropped(tl.load(x + at + 2 * quarter, inside, 0.0), r2, probability)
        total = tl.dot(x2, tl.trans(tl.load(a + a_at + 2 * quarter, known, 0.0)), total)
        x3 = _dropped(tl.load(x + at + 3 * quarter, inside, 0.0), r3, probability)
        total = tl.dot(x3, tl.trans(tl.load(a + a_at + 3 * quarter, known, 0.0)), total)
    written = (rows[:, None] < tokens) & (ranks[None, :] < RANK)
    tl.store(h + rows[:, None] * RANK + ranks[None, :], total.to(h.dtype.element_ty), written)


@triton.jit
def _tile_backward(x, gx, a_tile, gh, random, at, inside, probability, grad_a, INPUT_GRAD: tl.constexpr):
    grad_a = tl.dot(tl.trans(gh), _dropped(tl.load(x + at, inside, 0.0), random, probability), grad_a)
    if INPUT_GRAD:
        added = _dropped(tl.dot(gh, a_tile), random, probability)
        tl.store(gx + at, (tl.load(gx + at, inside, 0.0) + added).to(gx.dtype.element_ty), inside)
    return grad_a


@triton.jit(do_not_specialize=["seed", "tokens", "share"])
def _backward_kernel(
    x, gx, a, gh, parts, seed, tokens, width, probability, share,
    RANK: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    INPUT_GRAD: tl.constexpr,
):  # fmt: skip
    """parts[i] (RANK, width): a share of the gradient of a; gx += dropout(gh @ a), by the same mask."""
    quarter = width // 4
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, PADDED)
    known = (ranks[:, None] < RANK) & (columns[None, :] < quarter)
    a_at = ranks[:, None] * width + columns[None, :]
    a0 = tl.load(a + a_at, known, 0.0)
    a1 = tl.load(a + a_at + quarter, known, 0.0)
    a2 = tl.load(a + a_at + 2 * quarter, known, 0.0)
    a3 = tl.load(a + a_at + 3 * quarter, known, 0.0)
    g0 = tl.zeros((PADDED, COLUMNS), tl.float32)
    g1 = tl.zeros((PADDED, COLUMNS), tl.float32)
    g2 = tl.zeros((PADDED, COLUMNS), tl.float32)
    g3 = tl.zeros((PADDED, COLUMNS), tl.float32)
    first = tl.program_id(1) * share
    for start in range(first, first + share, TOKENS):
        rows = start + tl.arange(0, TOKENS)
        present = (rows[:, None] < tokens) & (ranks[None, :] < RANK)
        inside = (rows[:, None] < tokens) & (columns[None, :] < quarter)
        gh_tile = tl.load(gh + rows[:, None] * RANK + ranks[None, :], present, 0.0)
        at = rows[:, None] * width + columns[None, :]
        r0, r1, r2, r3 = tl.rand4x(seed, rows[:, None] * quarter + columns[None, :], ROUNDS)
        g0 = _tile_backward(x, gx, a0, gh_tile, r0, at, inside, probability, g0, INPUT_GRAD)
        g1 = _tile_backward(x, gx, a1, gh_tile, r1, at + quarter, inside, probability, g1, INPUT_GRAD)
        g2 = _tile_backward(x, gx, a2, gh_tile, r2, at + 2 * quarter, inside, probability, g2, INPUT_GRAD)
        g3 = _tile_backward(x, gx, a3, gh_tile, r3, at + 3 * quarter, inside, probability, g3, INPUT_GRAD)
    out = parts + tl.program_id(1) * RANK * width + a_at
    tl.store(out, g0, known)
    tl.store(out + quarter, g1, known)
    tl.store(out + 2 * quarter, g2, known)
    tl.store(out + 3 * quarter, g3, known)


class _LoraLinear(torch.autograd.Function):
    """y = x W' + bias + scale * dropout(x) A' B' for x (tokens, width); W and its bias are frozen."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale: float, probability: float):
        tokens, width = x.shape
        seed = int(torch.randint(2**31 - 1, (1,)))  # the CPU's generator: checkpoints restore it
        h = torch.empty(tokens, a.shape[0], dtype=x.dtype, device=x.device)
        sizes = dict(RANK=a.shape[0], PADDED=_padded(a.shape[0]), TOKENS=TOKENS, COLUMNS=COLUMNS)
        grid = (triton.cdiv(tokens, TOKENS),)
        _down_kernel[grid](x, a, h, seed, tokens, width, probability, **sizes)
        ctx.save_for_backward(x, weight, a, b, h)
        ctx.scale, ctx.probability, ctx.seed = scale, probability, seed
        return functional.linear(x, weight, bias).addmm_(h, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx, g):
        x, weight, a, b, h = ctx.saved_tensors
        g = g.contiguous()
        tokens, width = x.shape
        gh = torch.mm(g, b) * ctx.scale
        input_grad = ctx.needs_input_grad[0]
        gx = torch.mm(g, weight) if input_grad else x  # x: a pointer that is not followed
        parts = torch.empty(SPLITS, a.shape[0], width, dtype=torch.float32, device=x.device)
        share = triton.cdiv(triton.cdiv(tokens, SPLITS), TOKENS) * TOKENS
        sizes = dict(RANK=a.shape[0], PADDED=_padded(a.shape[0]), TOKENS=TOKENS, COLUMNS=COLUMNS)
        grid = (triton.cdiv(width // 4, COLUMNS), SPLITS)
        _backward_kernel[grid](
            x,
            gx,
            a,
            gh,
            parts,
            ctx.seed,
            tokens,
            width,
            ctx.probability,
            share,
            INPUT_GRAD=input_grad,
            **sizes,
        )
        gb = torch.mm(g.t(), h) * ctx.scale
        return gx if input_grad else None, None, None, parts.sum(0).to(a.dtype), gb, None, None


def _padded(rank: int) -> int:
    return max(SMALLEST_RANK, triton.next_power_of_2(rank))


def _forward(self: "Linear", x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """PEFT's layer in training; whatever else it can do (switched off, merged, mixed) is left to PEFT."""
    name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
    weight = self.base_layer.weight
    plain = name in self.lora_A and not (self.lora_variant or self.disable_adapters or self.merged or kwargs)
    if not (plain and self.training and self.lora_A[name].weight.dtype == x.dtype == weight.dtype):
        return type(self).forward(self, x, *args, **kwargs)
    probability = getattr(self.lora_dropout[name], "p", 0.0)
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    flat = x.reshape(-1, x.shape[-1])
    y = _LoraLinear.apply(flat, weight, self.base_layer.bias, a, b, self.scaling[name], probability)
    return y.view(*x.shape[:-1], y.shape[-1])


@contextlib.contextmanager
def fuse_lora(model: "PeftModel") -> Iterator[None]:
    """Give the model's LoRA layers the fused forward method; afterwards they have PEFT's again.

    Layers whose input width is no multiple of four keep PEFT's.
    """
    from peft.tuners.lora.layer import Linear

    layers = [layer for layer in model.modules() if type(layer) is Linear and layer.in_features % 4 == 0]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
