"""Qwen2-VL's connector: norm every patch, join the patches of one square, then a two-layer MLP.

Expects the patches of a square one after another, as ``export.vision.qwen2vl`` leaves them. Names are those below
``visual.merger.`` in published checkpoints.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["PatchMerger"]

NORM_EPS = 1e-6  # hard-coded in transformers' modeling_qwen2_vl


class PatchMerger(nn.Module):
    """LayerNorm, ``merge``^2 patches side by side, Linear, exact GELU, Linear."""

    def __init__(self, vision_width: int, width: int, *, merge: int) -> None:
        super().__init__()
        joined = vision_width * merge**2
        self.patches = merge**2
        self.ln_q = nn.LayerNorm(vision_width, NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(joined, joined), nn.GELU(), nn.Linear(joined, width))

    def forward(self, features: Tensor) -> Tensor:
        """Patch features (F, P, E) -> tokens (F, P / merge^2, D)."""
        squares: Tensor = self.ln_q(features).unflatten(1, (-1, self.patches))
        tokens: Tensor = self.mlp(squares.flatten(2))
        return tokens
