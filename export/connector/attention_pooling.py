"""Molmo's connector: mark letterbox patches, pool 2 x 2 patches by attention, then a gated MLP.

Facts from ``modeling_molmo.py`` of allenai/Molmo-7B-D-0924: padding embedding "pad_and_partial_pad", pooling
"attention-meanq", projector "mlp". Tensor names are those below ``vision_backbone.``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.ops import attention, merge_heads, split_heads

__all__ = ["AttentionPoolingMLP", "PoolingConfig", "windows"]

POOL = 2  # patches along one side of a window


@dataclass(frozen=True)
class PoolingConfig:
    """Sizes of the connector.

    Attributes:
        grid: patches along one side of a frame.
        features: channels of a patch.
        pooled: channels of a token between pooling and MLP.
    """

    grid: int
    features: int
    pooled: int
    heads: int
    mlp_width: int
    width: int

    @property
    def side(self) -> int:
        """Tokens along one side of a frame; an odd grid is filled up."""
        return -(-self.grid // POOL)


def windows(features: Tensor, grid: int) -> Tensor:
    """(F, grid * grid, C) -> (F * tokens, 4, C): 2 x 2 patches, row by row; zeros right of and below an odd grid."""
    square: Tensor = features.unflatten(1, (grid, grid))
    if grid % POOL:
        square = functional.pad(square.float(), (0, 0, 0, 1, 0, 1)).to(features.dtype)  # ONNX Runtime pads no bfloat16
    split: Tensor = square.unflatten(2, (-1, POOL)).unflatten(1, (-1, POOL))  # (F, R, r, C, c, channels)
    return split.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(0, 2)


class MeanQueryAttention(nn.Module):
    """A window's mean looks at its patches."""

    def __init__(self, config: PoolingConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.wq = nn.Linear(config.features, config.pooled)
        self.wk = nn.Linear(config.features, config.pooled)
        self.wv = nn.Linear(config.features, config.pooled)
        self.wo = nn.Linear(config.pooled, config.pooled)

    def forward(self, patches: Tensor) -> Tensor:
        """(W, 4, C) -> (W, 1, E)."""
        mean = patches.float().mean(1, keepdim=True).to(patches.dtype)  # ... averages none
        query, key, value = self.wq(mean), self.wk(patches), self.wv(patches)
        attended = attention(*(split_heads(part, self.heads) for part in (query, key, value)))
        pooled: Tensor = self.wo(merge_heads(attended))
        return pooled


class SwiGLU(nn.Module):
    """Gated MLP without biases."""

    def __init__(self, config: PoolingConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.pooled, config.mlp_width, bias=False)
        self.w2 = nn.Linear(config.mlp_width, config.width, bias=False)
        self.w3 = nn.Linear(config.pooled, config.mlp_width, bias=False)

    def forward(self, pooled: Tensor) -> Tensor:
        """(..., E) -> (..., D)."""
        projected: Tensor = self.w2(functional.silu(self.w1(pooled)) * self.w3(pooled))
        return projected


class AttentionPoolingMLP(nn.Module):
    """Padding embeddings, attention pooling, SwiGLU."""

    def __init__(self, config: PoolingConfig) -> None:
        super().__init__()
        self.config = config
        self.pad_embed = nn.Parameter(torch.randn(2, config.features) * 0.02)
        self.image_pooling_2d = MeanQueryAttention(config)
        self.image_projector = SwiGLU(config)

    def forward(self, features: Tensor, pixel_mask: Tensor) -> Tensor:
        """Patch features (F, P, C) and their share of real pixels (F, P) -> tokens (F, N, D)."""
        pooled = self.image_pooling_2d(windows(self.marked(features, pixel_mask), self.config.grid))
        tokens: Tensor = self.image_projector(pooled.view(-1, self.config.side**2, self.config.pooled))
        return tokens

    def marked(self, features: Tensor, pixel_mask: Tensor) -> Tensor:
        """Add row 0 of the table to patches without a real pixel and row 1 to those with too few: (F, P, C)."""
        share = pixel_mask[..., None]
        nothing = torch.zeros_like(self.pad_embed[0])
        partly = torch.where(share < 1, self.pad_embed[1], nothing)
        return features + torch.where(share == 0, self.pad_embed[0], partly)
