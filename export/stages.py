"""The stages of a model as flat modules: tensors in, tensors out, named as in the bundle's contract.

    vision     pixel_values (F, 3, H, W)                -> tokens (T, N, D), T sets of tokens, usually one a frame;
               [pixel_mask (F, patches)]                   Molmo's second input: share of real pixels
    refine     tokens (1, T, N, D)                      -> visual (1, M, D), indices (1, k), scores (1, T * N)
    aggregate  visual (1, M, D), text (1, S, D)         -> tokens (1, Q, D)
    decode     inputs_embeds (1, S, D), position_ids (1, S) or (3, 1, S), write_index (1,), KV cache
                                                        -> logits (1, V) of the last row, KV cache

Example inputs are random; nothing here traces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim

from export.decoder import Decoder, DecoderConfig, KVCache
from export.linvt import LinVT
from export.linvt.attend import LoneAttention
from runtime.manifest import FrameSpec
from runtime.preprocess import Preprocess

__all__ = ["Stage", "aggregate_stage", "decode_stage", "refine_stage", "vision_stage"]

Axis: TypeAlias = Any  # a torch.export Dim, or a multiple of one
Axes: TypeAlias = dict[int, Axis]

EXAMPLE_ROWS = 5  # any number that is neither 1 nor another axis' size


@dataclass(frozen=True)
class Stage:
    """One graph to be.

    Attributes:
        axes: the free axes of every input, by index.
        named_inputs: inputs that are arguments of their own; the module takes those behind them as ``*rest``.
    """

    name: str
    module: nn.Module
    example: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: tuple[Axes, ...]
    named_inputs: int = 3


class Refine(nn.Module):
    """SVR."""

    def __init__(self, linvt: LinVT) -> None:
        super().__init__()
        self.svr = linvt.svr

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1, T, N, D) -> (1, M, D), (1, k), (1, T * N)."""
        selection = self.svr(tokens)
        return selection.visual, selection.indices, selection.scores


class Aggregate(nn.Module):
    """TTA with its learned queries; takes the dead weights out of ``linvt``."""

    def __init__(self, linvt: LinVT) -> None:
        super().__init__()
        self.query_tokens = linvt.query_tokens
        self.tta = linvt.tta
        for module in self.tta.modules():
            if isinstance(module, LoneAttention):
                module.drop_dead_weights()

    def forward(self, visual: Tensor, text: Tensor) -> Tensor:
        """(1, M, D), (1, S, D) -> (1, Q, D)."""
        tokens: Tensor = self.tta(self.query_tokens, visual, text)
        return tokens


class Decode(nn.Module):
    """The LLM over a KV cache, for prefill and for single tokens."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, write_index: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """(1, S, D), (1, S), (1,) and alternating past keys and values -> logits (1, V), present ones."""
        caches = [KVCache(key, value, write_index) for key, value in zip(past[::2], past[1::2], strict=True)]
        logits, present = self.decoder.step(inputs_embeds, position_ids, caches)
        return (logits, *present)


def vision_stage(backbone: nn.Module, preprocess: Preprocess, frames: FrameSpec) -> Stage:
    """Frames are a free axis, in whole groups: the runtime sends batches."""
    sets = Dim(sets_axis(frames), min=1, max=max(frames.sets(frames.maximum), EXAMPLE_ROWS))
    count = EXAMPLE_ROWS * frames.group
    example = [torch.randn(count, 3, *preprocess.size)]
    inputs = ["pixel_values"]
    if preprocess.mask_patch:
        example.append(torch.rand(count, preprocess.mask_patches))
        inputs.append("pixel_mask")
    axis: Axis = sets if frames.group == 1 else frames.group * sets
    axes: tuple[Axes, ...] = tuple({0: axis} for _ in inputs)
    return Stage("vision", backbone, tuple(example), tuple(inputs), ("tokens",), axes)


def sets_axis(frames: FrameSpec) -> str:
    """What the axis T is called: a set of tokens is a frame's, unless frames are grouped."""
    return "frames" if frames.group == 1 else "sets"


def refine_stage(linvt: LinVT, frames: FrameSpec) -> Stage:
    """Sets of tokens are a free axis from the fewest that hold ``top_k`` tokens, unless only one number is possible."""
    least, most = frames.sets(frames.minimum), frames.sets(frames.maximum)
    free = most > least
    example = torch.randn(1, least + free, frames.tokens, linvt.config.width)
    axes = {1: Dim(sets_axis(frames), min=least, max=most)} if free else {}
    outputs = ("visual", "indices", "scores")
    return Stage("refine", Refine(linvt), (example,), ("tokens",), outputs, (axes,))


def aggregate_stage(linvt: LinVT, context: int) -> Stage:
    """The question's length is a free axis."""
    config = linvt.config
    example = (torch.randn(1, config.pooled_tokens, config.width), torch.randn(1, EXAMPLE_ROWS, config.width))
    axes: tuple[Axes, ...] = ({}, {1: Dim("text", min=1, max=context)})
    return Stage("aggregate", Aggregate(linvt), example, ("visual", "text"), ("tokens",), axes)


def decode_stage(decoder: Decoder) -> Stage:
    """New rows and cache capacity are free axes."""
    config = decoder.config
    caches = range(config.layers)
    positions = torch.arange(EXAMPLE_ROWS)[None]
    three_axes = config.rotary.axes == 3
    example = (
        torch.randn(1, EXAMPLE_ROWS, config.width),
        positions.expand(3, 1, -1) if three_axes else positions,
        torch.zeros(1, dtype=torch.int64),
        *example_cache(config),
    )
    rows = Dim("sequence", min=1, max=config.context)
    capacity = Dim("capacity", min=1, max=config.context)
    return Stage(
        "decode",
        Decode(decoder),
        example,
        ("inputs_embeds", "position_ids", "write_index", *cache_names("past", caches)),
        ("logits", *cache_names("present", caches)),
        ({1: rows}, {2 if three_axes else 1: rows}, {}, *({2: capacity} for _ in example_cache(config))),
    )


def example_cache(config: DecoderConfig) -> list[Tensor]:
    """A key and a value for every layer, room for eight times the example rows."""
    shape = (1, config.heads_kv, 8 * EXAMPLE_ROWS, config.head_dim)
    return [torch.randn(shape) for _ in range(2 * config.layers)]


def cache_names(side: str, layers: range) -> list[str]:
    """past_key.0, past_value.0, past_key.1, ... or the same with "present"."""
    return [f"{side}_{part}.{layer}" for layer in layers for part in ("key", "value")]
