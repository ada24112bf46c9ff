"""A tower and a connector as one stage."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["VisionStage"]


class VisionStage(nn.Module):
    """Frames in, the LLM's visual tokens out; parameters are below "tower." and "connector."."""

    def __init__(self, tower: nn.Module, connector: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.connector = connector

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        """(F, 3, H, W), and (F, patches) where the connector takes a mask -> (F / group, N, D)."""
        features = self.tower(pixel_values)
        tokens: Tensor = self.connector(features) if pixel_mask is None else self.connector(features, pixel_mask)
        return tokens
