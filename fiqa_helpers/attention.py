"""Attention that stays inside each row of a packed sequence, without a flash-attn build."""

from typing import TYPE_CHECKING

from fiqa_helpers.errors import WorkshopError

if TYPE_CHECKING:
    import torch

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
