"""LLaVA's connector: linear layers with exact GELU between them, one token per patch.

Pooling of a frame's tokens, which LLaVA-NeXT does behind the projector for videos, is ``pooled``. Names and forms as in
LLaVA-VL/LLaVA-NeXT, ``multimodal_projector/builder.py`` and ``llava_arch.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional

from export.fields import field, shortened
from runtime.errors import CheckpointError

__all__ = ["MLPConnector", "Pool", "pooled", "pooled_side", "projector_depth"]

Pool = Literal["bilinear", "average", "max"]

STRIDE = 2  # of the pooling; the original reads no other from config.json
MOST_DEPTH = 16  # linear layers; published connectors have two


class MLPConnector(nn.Sequential):
    """Linear, then GELU and Linear as often as the depth asks for: (F, P, E) -> (F, P, D)."""

    def __init__(self, vision_width: int, width: int, *, depth: int = 2) -> None:
        layers: list[nn.Module] = [nn.Linear(vision_width, width)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(width, width)]
        super().__init__(*layers)


def projector_depth(config: Mapping[str, Any], path: str) -> int:
    """Linear layers that a projector type such as "mlp2x_gelu" means; other types are refused by name."""
    kind = field(config, path, str)
    found = re.fullmatch(r"mlp(\d{1,3})x_gelu", kind)
    if not found or not 1 <= int(found[1]) <= MOST_DEPTH:
        raise CheckpointError(f"config.json field {path} is {shortened(kind)}; supported: 'mlp2x_gelu' and its kind")
    return int(found[1])


def pooled_side(side: int, mode: Pool) -> int:
    """Tokens along one side after ``pooled``; a rest of one row is kept by "bilinear" only."""
    return math.ceil(side / STRIDE) if mode == "bilinear" else side // STRIDE


def pooled(tokens: Tensor, mode: Pool) -> Tensor:
    """Tokens of a square grid (F, side^2, D) -> (F, pooled_side^2, D); in float32, which every engine can pool."""
    side = math.isqrt(tokens.shape[1])
    grid = tokens.float().transpose(1, 2).unflatten(2, (side, side))  # (F, D, side, side)
    if mode == "average":
        grid = functional.avg_pool2d(grid, STRIDE)
    elif mode == "max":
        grid = functional.max_pool2d(grid, STRIDE)
    else:
        small = pooled_side(side, mode)
        grid = functional.interpolate(grid, (small, small), mode="bilinear", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(tokens.dtype)
