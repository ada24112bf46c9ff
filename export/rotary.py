"""Rotary positions: from position ids to the angles that ``export.ops.rotary`` turns heads by.

Covers the plain form, a part of the head's channels (Phi-2), three axes (M-RoPE of Qwen2-VL) and two factor lists
(longrope of Phi-3, called "su" in older files). Formulas as in transformers' ``modeling_rope_utils``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Angles", "RotaryConfig"]


@dataclass(frozen=True)
class RotaryConfig:
    """How positions become angles.

    Attributes:
        theta: base of the wave lengths.
        dims: channels of a head that turn, the first ones; even.
        sections: M-RoPE: how many of the dims / 2 angles follow each of the three axes (time, row, column).
        short_factors, long_factors: longrope: (dims / 2,) divisors; the long ones hold for a call that reaches
            a position of ``short_context`` or above. Keys that are in the cache already stay as they are.
        magnitude: factor of cosine and sine.
    """

    theta: float
    dims: int
    sections: tuple[int, ...] = ()
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    short_context: int = 0
    magnitude: float = 1.0

    @property
    def axes(self) -> int:
        """Numbers that a position has."""
        return len(self.sections) or 1


class Angles(nn.Module):
    """Position ids -> cosines and sines."""

    short: Tensor
    long: Tensor
    axis: Tensor

    def __init__(self, config: RotaryConfig) -> None:
        super().__init__()
        self.config = config
        exponents = torch.arange(0, config.dims, 2, device="cpu", dtype=torch.float32) / config.dims
        lengths = config.theta**exponents
        for name, factors in (("short", config.short_factors), ("long", config.long_factors)):
            scaled = lengths * torch.tensor(factors, device="cpu") if factors else lengths
            self.register_buffer(name, 1.0 / scaled, persistent=False)
        owners = [axis for axis, count in enumerate(config.sections) for _ in range(count)]
        self.register_buffer("axis", torch.tensor(owners, device="cpu", dtype=torch.int64), persistent=False)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B, S) int64, or (3, B, S) with sections -> cosines and sines, each (B, S, dims / 2)."""
        inverse = self.short
        if self.config.long_factors:
            inverse = torch.where(position_ids.amax(dim=(-2, -1)) < self.config.short_context, self.short, self.long)
        by_angle = position_ids[self.axis].permute(1, 2, 0) if self.config.sections else position_ids[..., None]
        angles = by_angle.to(torch.float32) * inverse
        if self.config.magnitude == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * self.config.magnitude, angles.sin() * self.config.magnitude
