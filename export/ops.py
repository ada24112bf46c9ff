"""Operators that are plain PyTorch here and one ONNX node each when traced.

Eagerly these are the obvious formulas and serve as the reference. While ``torch.onnx.export`` traces,
each becomes the operator of the same meaning, so that an engine sees one fusable node instead of a
dozen: the standard ONNX domain's where it has one (opset 23 and 24), ``linvt::GatherPool`` for the pooling.

Holds no weights and no model structure.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from kernels.spec import DOMAIN, NAME, VERSION, pooled_length

__all__ = ["attention", "gather_pool", "merge_heads", "rms_norm", "rotary", "scatter_rows", "split_heads"]


def split_heads(states: Tensor, heads: int) -> Tensor:
    """(B, S, D) -> (B, heads, S, D / heads)."""
    split: Tensor = states.unflatten(-1, (heads, -1))
    return split.transpose(1, 2)


def merge_heads(states: Tensor) -> Tensor:
    """(B, heads, S, head_dim) -> (B, S, heads * head_dim)."""
    return states.transpose(1, 2).flatten(2)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention, scaled by 1 / sqrt(head_dim); grouped when there are fewer key heads.

    Args:
        query: (B, heads, S, head_dim).
        key: (B, heads_kv, P, head_dim); heads is a multiple of heads_kv.
        value: (B, heads_kv, P, value_dim).
        mask: bool, broadcastable to (B, heads, S, P), True where a query may look; None looks everywhere.

    Returns:
        (B, heads, S, value_dim).
    """
    if torch.onnx.is_in_onnx_export():
        exported: Tensor = torch.onnx.ops.attention(query, key, value, mask, softmax_precision=precision(query))[0]
        return exported
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weighted: Tensor = scores.softmax(-1) @ value
    return weighted


def precision(states: Tensor) -> int | None:
    """What softmax computes in, in ONNX's numbering: float32 in a narrow graph, the default in any other."""
    return None if states.dtype == torch.float32 else int(ir.DataType.FLOAT)


def rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of every head's first channels by its position's angles.

    Args:
        states: (B, heads, S, head_dim).
        cos: (B, S, dims / 2) float32, one angle per pair; channels from ``dims`` on stay as they are.
        sin: the same shape as ``cos``.
    """
    cos, sin = cos.to(states.dtype), sin.to(states.dtype)
    dims = 2 * cos.shape[-1]
    if dims < states.shape[-1]:
        return torch.cat((rotary(states[..., :dims], cos, sin), states[..., dims:]), dim=-1)
    if torch.onnx.is_in_onnx_export():
        exported: Tensor = torch.onnx.ops.rotary_embedding(states, cos, sin)
        return exported
    cos, sin = cos[:, None], sin[:, None]
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale to unit root mean square over the last axis, then by ``weight`` (D,)."""
    normed: Tensor = functional.rms_norm(states, weight.shape, weight, eps)
    return normed


def scatter_rows(past: Tensor, new: Tensor, write_index: Tensor) -> Tensor:
    """``past`` (B, heads, P, head_dim) with ``new`` (B, heads, S, head_dim) from row ``write_index`` (B,) on."""
    if torch.onnx.is_in_onnx_export():
        scattered: Tensor = torch.onnx.ops.symbolic(
            "TensorScatter",
            [past, new, write_index],
            attrs={"axis": -2, "mode": "linear"},
            dtype=past.dtype,
            shape=past.shape,
            version=24,
        )
        return scattered
    slots = torch.arange(new.shape[2], device=new.device) + write_index[:, None]  # (B, S)
    return past.scatter(2, slots[:, None, :, None].expand_as(new), new)


def gather_pool(tokens: Tensor, indices: Tensor, scales: Sequence[int]) -> Tensor:
    """Gather rows of (B, L, D) at (B, k) and average windows of every scale: (B, M, D); see ``kernels.spec``."""
    top_k = indices.shape[1]
    if torch.onnx.is_in_onnx_export():
        pooled: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{NAME}",
            [tokens, indices],
            attrs={"scales": list(scales)},
            dtype=tokens.dtype,
            shape=(tokens.shape[0], pooled_length(top_k, scales), tokens.shape[2]),
            version=VERSION,
        )
        return pooled
    picked = tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))
    means = []
    for scale in (scale for scale in scales if scale <= top_k):
        windows = top_k // scale
        means.append(picked[:, : windows * scale].reshape(-1, windows, scale, tokens.shape[-1]).mean(2))
    return torch.cat(means, dim=1)
