"""InternViT, the vision tower of InternVL2 (300M form: layer norm, no query and key norm).

Tensor names are those below ``vision_model.`` in published checkpoints. The 6B form (RMS norm, normed queries
and keys) is not covered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.linvt.attend import merge_heads, split_heads
from export.ops import attention

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
        """(1, 1 + rows * columns, E): the table, stretched bicubically to another grid."""
        if (rows, columns) == (self.grid, self.grid):
            return self.position_embedding
        table: Tensor = self.position_embedding[:, 1:].unflatten(1, (self.grid, self.grid))
        table = table.permute(0, 3, 1, 2)
        table = functional.interpolate(table, (rows, columns), mode="bicubic", align_corners=False)
        return torch.cat((self.position_embedding[:, :1], table.flatten(2).transpose(1, 2)), dim=1)


class Attention(nn.Module):
    """Self attention with fused query, key and value projection."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, states: Tensor) -> Tensor:
        """(F, S, E) -> (F, S, E)."""
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(states).chunk(3, dim=-1))
        projected: Tensor = self.proj(merge_heads(attention(query, key, value)))
        return projected


class MLP(nn.Module):
    """Two layers with exact GELU."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, states: Tensor) -> Tensor:
        """(F, S, E) -> (F, S, E)."""
        projected: Tensor = self.fc2(functional.gelu(self.fc1(states)))
        return projected


class Block(nn.Module):
    """Pre-norm block with layer scale."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.ls1 = nn.Parameter(torch.ones(config.width))
        self.ls2 = nn.Parameter(torch.ones(config.width))

    def forward(self, states: Tensor) -> Tensor:
        """(F, S, E) -> (F, S, E)."""
        states = states + self.ls1 * self.attn(self.norm1(states))
        mixed: Tensor = states + self.ls2 * self.mlp(self.norm2(states))
        return mixed


class Encoder(nn.Module):
    """The blocks that have to run."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.used_layers))

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
