"""Qwen2-VL's vision tower for frames of one size: no class token, no final norm, rotary positions of rows and columns.

Patches stand in merge order: those of the square that becomes one token follow one another, square by square in rows.
Tensor names are those below ``visual.`` in published checkpoints, but for the patch embedding: its kernel over time,
height and width becomes one over height and width. Facts from transformers' ``modeling_qwen2_vl``.

Every frame, or every group of frames that share a kernel, is a sequence of its own. Frames of several sizes at once
and Qwen2.5-VL's windows are not covered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from export.fields import LARGEST, MOST_LAYERS, divided, field, one_of, positive, size
from export.load import Rearranged, Rule, prefixed
from export.vision.block import Activation, Block, BlockConfig
from runtime.errors import CheckpointError
from runtime.preprocess import MAX_SIDE

__all__ = ["PeerVision", "Qwen2VLTower", "Qwen2VLTowerConfig", "merge_order", "tower_config", "tower_rules"]

ACTIVATIONS: dict[str, Activation] = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
CHANNELS = 3
THETA = 1e4  # hard-coded in the original, as is the norms' epsilon
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Qwen2VLTowerConfig:
    """Sizes of the tower and of its input.

    Attributes:
        merge: side, in patches, of the square that becomes one token.
        rows, columns: patches of a frame; multiples of ``merge``.
        frames: frames that the stored kernel covers.
        group: different frames among them; 1 where one frame stands in the place of all.
        theta: base of the positions' wave lengths.
    """

    width: int
    heads: int
    layers: int
    mlp_width: int
    patch_size: int
    merge: int
    rows: int
    columns: int
    frames: int = 2
    group: int = 1
    activation: Activation = "quick_gelu"
    theta: float = THETA

    @property
    def block(self) -> BlockConfig:
        """Sizes of one block."""
        return BlockConfig(self.width, self.heads, self.mlp_width, NORM_EPS, activation=self.activation)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a frame's tokens."""
        return self.rows // self.merge, self.columns // self.merge


def merge_order(grid: Tensor, merge: int) -> Tensor:
    """(F, E, rows, columns) -> (F, rows * columns, E), the patches of a ``merge`` x ``merge`` square in succession."""
    rows, columns = grid.shape[2] // merge, grid.shape[3] // merge
    squares: Tensor = grid.flatten(2).unflatten(2, (rows, merge, columns, merge))  # (F, E, R, r, C, c)
    return squares.permute(0, 2, 4, 3, 5, 1).flatten(1, 4)


def grid_angles(config: Qwen2VLTowerConfig) -> Tensor:
    """(1, patches, head_dim / 2): a quarter of the channels' pairs turn by the row, then a quarter by the column."""
    dims = config.width // config.heads // 2  # of each axis
    rows, columns = (torch.arange(count, device="cpu", dtype=torch.float32) for count in (config.rows, config.columns))
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]  # (1, 2, rows, columns)
    exponents = torch.arange(0, dims, 2, device="cpu", dtype=torch.float32) / dims
    return (merge_order(places, config.merge)[..., None] / config.theta**exponents).flatten(2)


class PatchEmbed(nn.Module):
    """One convolution whose kernel is its stride; the frames of a group are its channels, frame by frame."""

    def __init__(self, config: Qwen2VLTowerConfig) -> None:
        super().__init__()
        self.group, self.merge = config.group, config.merge
        side = config.patch_size
        self.proj = nn.Conv2d(config.group * CHANNELS, config.width, side, stride=side, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(F, 3, H, W) -> (F / group, patches, E)."""
        if self.group > 1:
            pixel_values = pixel_values.unflatten(0, (-1, self.group)).flatten(1, 2)
        return merge_order(self.proj(pixel_values), self.merge)


class Qwen2VLTower(nn.Module):
    """Patches and blocks."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Qwen2VLTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config.block) for _ in range(config.layers))
        angles = grid_angles(config)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised frames (F, 3, H, W) -> patch features (F / group, patches, E) in merge order."""
        states = self.patch_embed(pixel_values)
        angles = self.angles(states.shape[0])
        for block in self.blocks:
            states = block(states, angles)
        features: Tensor = states
        return features

    def angles(self, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines for ``count`` sequences, each (count, patches, head_dim / 2)."""
        return self.cos.expand(count, -1, -1), self.sin.expand(count, -1, -1)


class PeerVision(nn.Module):
    """Transformers' tower and merger, which take patches, in the form of the vision stage, which takes frames."""

    def __init__(self, model: nn.Module, config: Qwen2VLTowerConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(F, 3, H, W) -> (F / group, N, D)."""
        patches = flat_patches(pixel_values, self.config)
        grid = torch.tensor([[1, self.config.rows, self.config.columns]] * len(patches))
        found: Tensor = self.model(patches.flatten(0, 1), grid_thw=grid).pooler_output
        tokens: Tensor = found.unflatten(0, (len(patches), -1))
        return tokens


def flat_patches(pixel_values: Tensor, config: Qwen2VLTowerConfig) -> Tensor:
    """Frames (F, 3, H, W) -> (F / group, patches, 3 * frames * p^2) in merge order, as the published processor cuts.

    The values of a patch stand by channel, frame, row and column.
    """
    rows, columns, merge, side = *config.grid, config.merge, config.patch_size
    sets = pixel_values.unflatten(0, (-1, config.group)).repeat_interleave(config.frames // config.group, 1)
    squares: Tensor = sets.unflatten(4, (columns, merge, side)).unflatten(
        3, (rows, merge, side)
    )  # (S, f, 3, R, r, p, C, c, p)
    return squares.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5).flatten(1, 4)


def tower_config(config: Mapping[str, Any], frame: tuple[int, int], *, pairs: bool) -> Qwen2VLTowerConfig:
    """The tower's sizes from ``config.json``.

    Args:
        config: ``config.json``.
        frame: (height, width) in pixels.
        pairs: encode frames as a video's, as many together as a kernel covers.
    """
    for channels in ("in_chans", "in_channels"):  # as published; as the code calls it
        one_of(config, f"vision_config.{channels}", CHANNELS)
    one_of(config, "vision_config.rope_parameters.rope_type", "axial")
    newer = field(config, "vision_config", dict).get("rope_parameters")
    width = size(config, "vision_config.embed_dim")
    if divided(config, "vision_config.embed_dim", "vision_config.num_heads") % 4:
        raise CheckpointError(
            f"config.json field vision_config.embed_dim is {width}, expected heads whose channels are a multiple of 4: "
            "half of them turn by the row and half by the column"
        )
    mlp_width = width * positive(config, "vision_config.mlp_ratio")
    if not 1 <= mlp_width <= LARGEST:
        raise CheckpointError(
            f"config.json field vision_config.mlp_ratio gives an MLP of {mlp_width:g} channels, expected 1 to {LARGEST}"
        )
    patch = size(config, "vision_config.patch_size", most=MAX_SIDE)
    frames = size(config, "vision_config.temporal_patch_size", most=MAX_SIDE)
    return Qwen2VLTowerConfig(
        width=width,
        heads=size(config, "vision_config.num_heads"),
        layers=size(config, "vision_config.depth", most=MOST_LAYERS),
        mlp_width=int(mlp_width),
        patch_size=patch,
        merge=size(config, "vision_config.spatial_merge_size", most=MAX_SIDE),
        rows=frame[0] // patch,
        columns=frame[1] // patch,
        frames=frames,
        group=frames if pairs else 1,
        activation=ACTIVATIONS[one_of(config, "vision_config.hidden_act", *ACTIVATIONS)],
        theta=positive(config, "vision_config.rope_parameters.rope_theta") if newer else THETA,
    )


def tower_rules(ours: str, theirs: str, config: Qwen2VLTowerConfig) -> tuple[Rule, ...]:
    """From the tower's parameters below ``ours`` to the tensors below ``theirs``."""
    embed = "patch_embed.proj.weight"
    stored = (config.width, CHANNELS, config.frames, config.patch_size, config.patch_size)
    arrange: Callable[[Tensor], Tensor] = repeated if config.group == 1 else side_by_side
    return (
        (re.escape(ours + embed), lambda _: Rearranged(theirs + embed, stored, arrange)),
        prefixed(ours, theirs),
    )


def repeated(kernel: Tensor) -> Tensor:
    """(E, 3, frames, p, p) -> (E, 3, p, p), for one frame in the place of all: a sum, whose float32 is rounded."""
    return kernel.to(torch.float32).sum(2)


def side_by_side(kernel: Tensor) -> Tensor:
    """(E, 3, frames, p, p) -> (E, frames * 3, p, p)."""
    return kernel.transpose(1, 2).flatten(1, 2)
