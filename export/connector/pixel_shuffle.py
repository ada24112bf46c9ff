"""InternVL2's connector: join 2 x 2 patches into one token of four times the channels, then a two-layer MLP.

The order of joined channels is (row in block, column in block, channel) and the grid stays row-major: the
published ``ps_version`` "v2". "v1" leaves the grid transposed.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

__all__ = ["PixelShuffleMLP", "pixel_shuffle"]


def pixel_shuffle(features: Tensor, block: int, version: str = "v2") -> Tensor:
    """(F, rows * columns, E) of a square grid -> (F, rows * columns / block^2, E * block^2)."""
    side = math.isqrt(features.shape[1])
    blocks = (side // block, block, side // block, block)
    grid: Tensor = features.unflatten(1, blocks)  # (F, R, r, C, c, E)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return grid.permute(order).flatten(3).flatten(1, 2)


class PixelShuffleMLP(nn.Module):
    """Pixel shuffle, LayerNorm, Linear, exact GELU, Linear; the MLP's names are those of ``mlp1``."""

    def __init__(self, vision_width: int, width: int, *, block: int = 2, version: str = "v2") -> None:
        super().__init__()
        joined = vision_width * block**2
        self.block = block
        self.version = version
        self.mlp1 = nn.Sequential(nn.LayerNorm(joined), nn.Linear(joined, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, features: Tensor) -> Tensor:
        """Patch features (F, P, E) -> tokens (F, P / block^2, D)."""
        projected: Tensor = self.mlp1(pixel_shuffle(features, self.block, self.version))
        return projected
