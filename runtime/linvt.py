"""What can be chosen about a LinVT, as one frozen record with two presets.

``released`` reproduces the published code (arXiv 2412.05185, repository gls0425/LinVT) in structure and tensor
names. ``paper`` is the form the paper describes: spatial before temporal attention, absolute frame and token
positions, tokens selected from the input so that the result is linear in the visual tokens, and queries that attend
to each other.

The record travels in the bundle's manifest; the modules it describes are in ``export.linvt``. No tensors here.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from kernels.spec import pooled_length

__all__ = ["LinVTConfig", "paper", "released"]

Axes = Literal["released", "paper"]
SelectFrom = Literal["refined", "input"]
Positions = Literal["none", "absolute"]
QuerySelfAttention = Literal["released", "full"]
Residual = Literal["none", "add"]
Order = Literal["score", "position"]


class LinVTConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes and choices of one LinVT.

    Attributes:
        width: D, the hidden size of the backbone LLM.
        heads: attention heads everywhere in LinVT; the released code fixes 4.
        layers: layers of the SVR and of the TTA each; the released code fixes 8.
        top_k: tokens the SVR keeps; the released code fixes 1024.
        queries: Q, tokens handed to the LLM.
        pool_scales: window lengths of the multi-scale pooling.
        norm_eps: epsilon of the TTA's layer norms.
        axes: "released": a layer attends over frames, then over positions; "paper": the other way round.
        select_from: gather the attended tokens ("refined") or the tokens that entered the SVR ("input").
        positions: "absolute" adds a learned row per frame and one per token position to the visual tokens.
        query_self_attention: "released" attends within a sequence of one; "full" among the Q queries.
        residual: "add" puts x + f(x) around every SVR attention; the released form has none.
        order: selected tokens stand by falling score, or by their position in the video.
        tokens_per_frame: N; needed for ``positions="absolute"`` only.
        max_frames: rows of the frame position table; needed for ``positions="absolute"`` only.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    width: int
    heads: int = 4
    layers: int = 8
    top_k: int = 1024
    queries: int = 32
    pool_scales: tuple[int, ...] = (1, 2, 4)
    norm_eps: float = 1e-5
    axes: Axes = "released"
    select_from: SelectFrom = "refined"
    positions: Positions = "none"
    query_self_attention: QuerySelfAttention = "released"
    residual: Residual = "none"
    order: Order = "score"
    tokens_per_frame: int = 0
    max_frames: int = 0

    def __post_init__(self) -> None:
        sizes = (self.width, self.heads, self.layers, self.top_k, self.queries, *self.pool_scales)
        if min(sizes) < 1:
            raise ValueError("LinVT sizes must all be at least 1")
        if self.width % self.heads:
            raise ValueError(f"LinVT width {self.width} does not divide into {self.heads} heads")
        if self.pooled_tokens < 1:
            raise ValueError(f"no pooling scale of {self.pool_scales} fits into top_k {self.top_k}")
        if not 0 <= self.norm_eps < 1:
            raise ValueError(f"LinVT norm_eps is {self.norm_eps}, expected at least 0 and below 1")
        if self.positions == "absolute" and min(self.tokens_per_frame, self.max_frames) < 1:
            raise ValueError("absolute positions need tokens_per_frame and max_frames")

    @property
    def pooled_tokens(self) -> int:
        """M, the number of tokens that leave the SVR."""
        return pooled_length(self.top_k, self.pool_scales)

    def min_frames(self, tokens_per_frame: int) -> int:
        """Fewest frames, or groups of them, that hold ``top_k`` tokens of ``tokens_per_frame`` each."""
        return math.ceil(self.top_k / tokens_per_frame)


def released(width: int, **sizes: Any) -> LinVTConfig:
    """The released form; ``sizes`` overrides heads, layers, top_k, queries or pool_scales."""
    return LinVTConfig(width, **sizes)


def paper(width: int, *, tokens_per_frame: int, max_frames: int, **sizes: Any) -> LinVTConfig:
    """The paper's strictly linear form with frame and token positions."""
    return LinVTConfig(
        width,
        axes="paper",
        select_from="input",
        positions="absolute",
        query_self_attention="full",
        tokens_per_frame=tokens_per_frame,
        max_frames=max_frames,
        **sizes,
    )
