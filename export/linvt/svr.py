"""SVR: score all tokens of a clip, keep the best ``top_k`` and pool them at several scales.

The names ``spatial_attention`` and ``temporal_attention`` are those of the released tensors. In the released
form the first attends over frames and the second over positions, against their names; ``axes="paper"`` makes
the names true.

Clips of a batch never mix. Selection is not differentiable here: whoever trains adds a loss on ``scores``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from export.linvt.attend import PackedAttention
from export.ops import gather_pool
from runtime.linvt import LinVTConfig

__all__ = ["SVR", "Selection"]


class Selection(NamedTuple):
    """What the SVR found in a clip of T frames of N tokens.

    Attributes:
        visual: (B, M, D) pooled tokens of all scales, one scale after the other.
        indices: (B, k) int64, flat index = frame * N + position, in the order of the tokens.
        scores: (B, T * N) significance of every token.
    """

    visual: Tensor
    indices: Tensor
    scores: Tensor


class SVRLayer(nn.Module):
    """One pair of attentions, over one axis and then over the other."""

    def __init__(self, config: LinVTConfig) -> None:
        super().__init__()
        self.spatial_attention = PackedAttention(config.width, config.heads)
        self.temporal_attention = PackedAttention(config.width, config.heads)
        self.axes = config.axes
        self.residual = config.residual

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, N, D) -> (B, T, N, D)."""
        first, second = (over_frames, over_positions) if self.axes == "released" else (over_positions, over_frames)
        tokens = self.join(tokens, first(self.spatial_attention, tokens))
        return self.join(tokens, second(self.temporal_attention, tokens))

    def join(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """Put the attended tokens in place of the tokens, or add them."""
        return tokens + attended if self.residual == "add" else attended


def over_positions(layer: PackedAttention, tokens: Tensor) -> Tensor:
    """Attend among the N positions of each frame."""
    batch, frames = tokens.shape[:2]
    attended: Tensor = layer(tokens.flatten(0, 1)).unflatten(0, (batch, frames))
    return attended


def over_frames(layer: PackedAttention, tokens: Tensor) -> Tensor:
    """Attend among the T frames at each position."""
    return over_positions(layer, tokens.transpose(1, 2)).transpose(1, 2)


class AttentionNetwork(nn.Module):
    """All layers, one after the other."""

    def __init__(self, config: LinVTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SVRLayer(config) for _ in range(config.layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, N, D) -> (B, T, N, D)."""
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens


class TokenSelection(nn.Module):
    """The significance of every token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score_net = nn.Linear(width, 1)

    def forward(self, refined: Tensor) -> Tensor:
        """(B, T, N, D) -> (B, T * N)."""
        scores: Tensor = self.score_net(refined)
        return scores.flatten(1)


class SVR(nn.Module):
    """Spatio-temporal visual token refiner, under the released names."""

    def __init__(self, config: LinVTConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_network = AttentionNetwork(config)
        self.token_selection = TokenSelection(config.width)
        if config.positions == "absolute":
            self.frame_positions = nn.Parameter(torch.randn(config.max_frames, config.width) * 0.02)
            self.token_positions = nn.Parameter(torch.randn(config.tokens_per_frame, config.width) * 0.02)

    def forward(self, tokens: Tensor) -> Selection:
        """(B, T, N, D) frame tokens -> the selection; T * N must be at least ``top_k``."""
        tokens = self.place(tokens)
        refined = self.attend(tokens)
        scores = self.score(refined)
        chosen = refined if self.config.select_from == "refined" else tokens
        indices = self.select(scores)
        return Selection(self.pool(chosen.flatten(1, 2), indices), indices, scores)

    def place(self, tokens: Tensor) -> Tensor:
        """Add the learned frame and token positions, where the form has them."""
        if self.config.positions == "none":
            return tokens
        frames = self.frame_positions[: tokens.shape[1], None]  # (T, 1, D)
        return tokens + frames + self.token_positions

    def attend(self, tokens: Tensor) -> Tensor:
        """(B, T, N, D) -> (B, T, N, D) through all attention layers."""
        attended: Tensor = self.attention_network(tokens)
        return attended

    def score(self, refined: Tensor) -> Tensor:
        """(B, T, N, D) -> (B, T * N)."""
        scores: Tensor = self.token_selection(refined)
        return scores

    def select(self, scores: Tensor) -> Tensor:
        """(B, T * N) -> (B, k) int64."""
        indices = scores.topk(self.config.top_k, dim=1).indices
        if self.config.order == "position":
            # As floats, exact to 2**24: a sorting TopK of integers is not in every engine.
            indices = (-(-indices.float()).topk(self.config.top_k, dim=1).values).long()
        return indices

    def pool(self, tokens: Tensor, indices: Tensor) -> Tensor:
        """Gather (B, T * N, D) at (B, k) and average windows of every scale: (B, M, D)."""
        return gather_pool(tokens, indices, self.config.pool_scales)
