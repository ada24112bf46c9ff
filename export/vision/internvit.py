"""InternViT, the vision tower of InternVL2 (300M form: layer norm, no query and key norm).

Tensor names are those below ``vision_model.`` in published checkpoints. The 6B form (RMS norm, normed queries
and keys) is not covered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.vision.block import Block, BlockConfig

__all__ = ["InternViT", "InternViTConfig"]


@dataclass(frozen=True)
class InternViTConfig:
    """Sizes of the tower; ``image_size`` is the size its position table was made for.

    ``select_layer`` counts as in the published config: -1 is the last block's output, -2 the one before.
    """

    width: int
    heads: int
    layers: int
    mlp_width: int
    patch_size: int
    image_size: int
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    channels: int = 3
    select_layer: int = -1

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def block(self) -> BlockConfig:
        """Sizes of one block."""
        return BlockConfig(
            self.width, self.heads, self.mlp_width, self.norm_eps, qkv_bias=self.qkv_bias, layer_scale=True
        )

    @property
    def used_layers(self) -> int:
        """Blocks that have to run for ``select_layer``."""
        return self.layers + 1 + self.select_layer


class Embeddings(nn.Module):
    """Patches and a class token, each with a learned position."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.class_embedding = nn.Parameter(torch.randn(1, 1, config.width) * 0.02)
        self.patch_embedding = nn.Conv2d(config.channels, config.width, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Parameter(torch.randn(1, config.grid**2 + 1, config.width) * 0.02)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(F, 3, H, W) -> (F, 1 + patches, E), class token first."""
        patches = self.patch_embedding(pixel_values)
        positions = self.positions(patches.shape[-2], patches.shape[-1])
        classes = self.class_embedding.expand(pixel_values.shape[0], -1, -1)
        return torch.cat((classes, patches.flatten(2).transpose(1, 2)), dim=1) + positions

    def positions(self, rows: int, columns: int) -> Tensor:
        """(1, 1 + rows * columns, E): the table, stretched bicubically to another grid, in float32."""
        if (rows, columns) == (self.grid, self.grid):
            return self.position_embedding
        table: Tensor = self.position_embedding[:, 1:].unflatten(1, (self.grid, self.grid))
        table = table.permute(0, 3, 1, 2)
        table = functional.interpolate(table.float(), (rows, columns), mode="bicubic", align_corners=False)
        stretched = table.flatten(2).transpose(1, 2).to(self.position_embedding.dtype)
        return torch.cat((self.position_embedding[:, :1], stretched), dim=1)


class Encoder(nn.Module):
    """The blocks that have to run."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config.block) for _ in range(config.used_layers))

    def forward(self, states: Tensor) -> Tensor:
        """(F, S, E) -> (F, S, E)."""
        for block in self.layers:
            states = block(states)
        return states


class InternViT(nn.Module):
    """Vision tower; no norm follows the blocks, the class token is dropped."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised frames (F, 3, H, W) -> patch features (F, patches, E)."""
        states: Tensor = self.encoder(self.embeddings(pixel_values))
        return states[:, 1:]
