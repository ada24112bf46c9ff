"""CLIP's vision tower as Molmo stores it: no last block, no final norm, outputs of several blocks side by side.

Blocks that no selected output needs are not built. Another grid than the position table's is not covered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.vision.block import Activation, Block, BlockConfig

__all__ = ["CLIP", "CLIPConfig"]


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of the tower.

    Attributes:
        image_size: side of the square it was made for, in pixels.
        stored: blocks that the checkpoint holds; 0 for as many as are used.
        layers: blocks whose outputs are joined, counted from 0, in the order in which they are joined.
    """

    width: int
    heads: int
    mlp_width: int
    patch_size: int
    image_size: int
    layers: tuple[int, ...]
    norm_eps: float = 1e-5
    activation: Activation = "quick_gelu"
    stored: int = 0

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def joined_width(self) -> int:
        """Channels of the joined outputs."""
        return len(self.layers) * self.width


class Embeddings(nn.Module):
    """Patches and a class token, each with a learned position, and a norm over them."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(config.width) * 0.02)
        self.positional_embedding = nn.Parameter(torch.randn(config.grid**2 + 1, config.width) * 0.02)
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.pre_ln = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(F, 3, H, W) -> (F, 1 + patches, E), class token first."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        classes = self.class_embedding.expand(pixel_values.shape[0], 1, -1)
        embedded: Tensor = self.pre_ln(torch.cat((classes, patches), dim=1) + self.positional_embedding)
        return embedded


class CLIP(nn.Module):
    """Vision tower; the class token is dropped."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        block = BlockConfig(config.width, config.heads, config.mlp_width, config.norm_eps, config.activation)
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(Block(block) for _ in range(max(config.layers) + 1))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised frames (F, 3, H, W) -> patch features (F, patches, layers * E)."""
        states: Tensor = self.embeddings(pixel_values)
        outputs = []
        for block in self.blocks:
            states = block(states)
            outputs.append(states)
        return torch.cat([outputs[layer][:, 1:] for layer in self.config.layers], dim=-1)
