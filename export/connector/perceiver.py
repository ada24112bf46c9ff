"""The perceiver of xGen-MM v1.5: learned latents look at a frame's features and at themselves, layer by layer.

Facts from ``PerceiverResampler`` in Salesforce/xgen-mm-phi3-mini-base-r-v1.5 (``modeling_xgenmm.py``): everything is
pre-norm with a residual on the latents, projections inside the layers have no bias, 16 heads of whatever width.
Parameter names are the original's. Time and media embeddings, which no published checkpoint has, are not covered.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.checkpoint import TensorFiles
from export.ops import attention, merge_heads, split_heads
from runtime.errors import CheckpointError

__all__ = ["HEADS", "Perceiver", "PerceiverConfig", "perceiver_config"]

HEADS = 16  # in the original's code, whatever the widths
KNOWN = re.compile(
    r"latents|(norm|projection)\.(weight|bias)|layers\.(?P<layer>\d{1,3})\."
    r"(0\.(norm_media|norm_latents)\.(weight|bias)|0\.(to_q|to_kv|to_out)\.weight|1\.0\.(weight|bias)|1\.[13]\.weight)"
)


@dataclass(frozen=True)
class PerceiverConfig:
    """Sizes of the perceiver.

    Attributes:
        latents: Q, tokens it makes of one frame.
        width: E, channels of latents and features.
        inner: channels of queries, keys and values, all heads together.
        mlp_width: channels between the two layers of an MLP.
        layers: pairs of attention and MLP.
        heads: of the attention.
    """

    latents: int
    width: int
    inner: int
    mlp_width: int
    layers: int
    heads: int = HEADS


class PerceiverAttention(nn.Module):
    """Latents look at features and latents."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_media = nn.LayerNorm(config.width)
        self.norm_latents = nn.LayerNorm(config.width)
        self.to_q = nn.Linear(config.width, config.inner, bias=False)
        self.to_kv = nn.Linear(config.width, 2 * config.inner, bias=False)
        self.to_out = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """(F, P, E) and (F, Q, E) -> (F, Q, E)."""
        latents = self.norm_latents(latents)
        seen = torch.cat((self.norm_media(features), latents), dim=1)  # (F, P + Q, E)
        key, value = self.to_kv(seen).chunk(2, dim=-1)
        query, key, value = (split_heads(part, self.heads) for part in (self.to_q(latents), key, value))
        projected: Tensor = self.to_out(merge_heads(attention(query, key, value)))
        return projected


def feed_forward(config: PerceiverConfig) -> nn.Sequential:
    """LayerNorm and a two-layer MLP with exact GELU."""
    return nn.Sequential(
        nn.LayerNorm(config.width),
        nn.Linear(config.width, config.mlp_width, bias=False),
        nn.GELU(),
        nn.Linear(config.mlp_width, config.width, bias=False),
    )


class PerceiverLayer(nn.ModuleList):
    """Attention and MLP, numbered 0 and 1 as in the original's names."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__((PerceiverAttention(config), feed_forward(config)))

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """(F, P, E) and (F, Q, E) -> (F, Q, E)."""
        latents = self[0](features, latents) + latents
        mixed: Tensor = self[1](latents) + latents
        return mixed


class Perceiver(nn.Module):
    """Features of a frame -> its visual tokens, Q of them, ``llm_width`` wide."""

    def __init__(self, config: PerceiverConfig, llm_width: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.latents, config.width))
        self.layers = nn.ModuleList(PerceiverLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, llm_width)

    def forward(self, features: Tensor) -> Tensor:
        """Patch features (F, P, E) -> tokens (F, Q, D)."""
        tokens: Tensor = self.projection(self.norm(self.resample(features)))
        return tokens

    def resample(self, features: Tensor) -> Tensor:
        """All layers: (F, P, E) -> (F, Q, E)."""
        latents = self.latents.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(features, latents)
        return latents


def perceiver_config(tensors: TensorFiles, prefix: str) -> PerceiverConfig:
    """Read the sizes off the tensors whose names begin with ``prefix``; the published files say little about them.

    Raises:
        CheckpointError: a tensor is missing, unknown, or has a shape that no perceiver has.
    """
    layers = 0
    for name in tensors.files:
        if name.startswith(prefix):
            found = KNOWN.fullmatch(name.removeprefix(prefix))
            if found is None:
                raise CheckpointError(
                    f"tensor {name} is not part of xGen-MM v1.5's perceiver, which has latents, layers, norm and "
                    "projection; the checkpoint is of a variant that is not supported"
                )
            layers = max(layers, int(found["layer"] or -1) + 1)
    latents, width = matrix(tensors, f"{prefix}latents")
    inner, _ = matrix(tensors, f"{prefix}layers.0.0.to_q.weight")
    mlp_width, _ = matrix(tensors, f"{prefix}layers.0.1.1.weight")
    if inner % HEADS:
        raise CheckpointError(
            f"tensor {prefix}layers.0.0.to_q.weight has {inner} rows, expected a multiple of the {HEADS} heads; "
            "the weights are another model's"
        )
    return PerceiverConfig(latents, width, inner, mlp_width, layers)


def matrix(tensors: TensorFiles, name: str) -> tuple[int, int]:
    """Rows and columns of a tensor that has to be a matrix."""
    shape = tensors.shape(name)
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"tensor {name} has shape {list(shape)}, expected (rows, columns) of 1 or more")
    return shape[0], shape[1]
