"""The transformer block that every vision tower is made of: pre-norm attention and MLP.

InternViT, SigLIP, CLIP and Qwen2-VL's tower differ in activation, layer scale and rotary positions only. Query, key and
value are one projection here; where they are stored apart, ``Names`` stacks them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.load import Rule, Stacked, Whole
from export.ops import attention, merge_heads, rotary, split_heads

__all__ = ["Block", "BlockConfig", "stacked_qkv"]

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


@dataclass(frozen=True)
class BlockConfig:
    """Sizes and choices of a block.

    Attributes:
        activation: "gelu" is the exact one, "gelu_tanh" its tanh form, "quick_gelu" x * sigmoid(1.702 x).
        layer_scale: attention and MLP are each scaled per channel before they are added.
    """

    width: int
    heads: int
    mlp_width: int
    norm_eps: float
    activation: Activation = "gelu"
    qkv_bias: bool = True
    layer_scale: bool = False


def activate(states: Tensor, activation: Activation) -> Tensor:
    """The activation of that name."""
    if activation == "quick_gelu":
        return states * torch.sigmoid(1.702 * states)
    return functional.gelu(states, approximate="tanh" if activation == "gelu_tanh" else "none")


class Attention(nn.Module):
    """Self attention with fused query, key and value projection."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, states: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """(F, S, E) -> (F, S, E); ``angles``, each (F, S, head_dim / 2), turn queries and keys."""
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(states).chunk(3, dim=-1))
        if angles is not None:
            query, key = rotary(query, *angles), rotary(key, *angles)
        projected: Tensor = self.proj(merge_heads(attention(query, key, value)))
        return projected


class MLP(nn.Module):
    """Two layers with the tower's activation between them."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, states: Tensor) -> Tensor:
        """(F, S, E) -> (F, S, E)."""
        projected: Tensor = self.fc2(activate(self.fc1(states), self.activation))
        return projected


class Block(nn.Module):
    """Pre-norm attention, then pre-norm MLP."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.layer_scale = config.layer_scale
        if config.layer_scale:
            self.ls1 = nn.Parameter(torch.ones(config.width))
            self.ls2 = nn.Parameter(torch.ones(config.width))

    def forward(self, states: Tensor, angles: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(F, S, E) -> (F, S, E)."""
        attended = self.attn(self.norm1(states), angles)
        states = states + (self.ls1 * attended if self.layer_scale else attended)
        mixed: Tensor = self.mlp(self.norm2(states))
        return states + (self.ls2 * mixed if self.layer_scale else mixed)


def stacked_qkv(ours: str, theirs: str, query: str, key: str, value: str) -> Rule:
    r"""``attn.qkv`` of the blocks below ``ours`` from three tensors; ``theirs`` may use ``\1``, the block's number."""

    def source(found: re.Match[str]) -> Stacked:
        return Stacked(tuple(Whole(f"{found.expand(theirs)}.{part}.{found['leaf']}") for part in (query, key, value)))

    return ours + r"\.(\d+)\.attn\.qkv\.(?P<leaf>weight|bias)", source
