"""The two attention blocks LinVT is made of, under the tensor names of the released code.

``PackedAttention`` carries the names of ``torch.nn.MultiheadAttention``; ``CrossAttention`` those of the
released cross attention (wq, wk, wv, dense). Neither adds residuals or norms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.ops import attention, merge_heads, split_heads

__all__ = ["CrossAttention", "LoneAttention", "PackedAttention"]


class PackedAttention(nn.Module):
    """Self attention with one packed input projection (3D, D) and an output projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, states: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D): every row of a sequence looks at every row."""
        packed = functional.linear(states, self.in_proj_weight, self.in_proj_bias)
        query, key, value = (split_heads(part, self.heads) for part in packed.chunk(3, dim=-1))
        projected: Tensor = self.out_proj(merge_heads(attention(query, key, value)))
        return projected


class LoneAttention(PackedAttention):
    """Self attention in which every row is a sequence of its own, as in the released TTA.

    Softmax over one key is 1: what is left of it are the value and output projections.
    """

    def forward(self, states: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D), row by row."""
        width = self.out_proj.in_features
        value = functional.linear(states, self.in_proj_weight[-width:], self.in_proj_bias[-width:])
        projected: Tensor = self.out_proj(value)
        return projected

    def drop_dead_weights(self) -> None:
        """Keep the value rows of the packed projection alone, for tracing."""
        width = self.out_proj.in_features
        self.in_proj_weight = nn.Parameter(self.in_proj_weight[-width:].clone(), requires_grad=False)
        self.in_proj_bias = nn.Parameter(self.in_proj_bias[-width:].clone(), requires_grad=False)


class CrossAttention(nn.Module):
    """Attention from queries to another sequence."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wq = nn.Linear(width, width)
        self.wk = nn.Linear(width, width)
        self.wv = nn.Linear(width, width)
        self.dense = nn.Linear(width, width)

    def forward(self, query: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, Q, D) and (B, S, D) -> (B, Q, D); ``mask`` (B, 1, 1, S) bool hides padded rows."""
        weighted = self.weigh(query, context, self.wv(context), mask)
        projected: Tensor = self.dense(weighted)
        return projected

    def weigh(self, query: Tensor, context: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Average ``value`` (B, S, D) per head with weights from the query and key projections."""
        query, key, value = (split_heads(part, self.heads) for part in (self.wq(query), self.wk(context), value))
        return merge_heads(attention(query, key, value, mask))
