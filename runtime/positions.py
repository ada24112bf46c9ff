"""Position ids of a prompt: one counter, or three axes (time, row, column) where the LLM has M-RoPE.

On three axes text counts the same on all of them; visual tokens that lie on a grid take their place in it, and the text
behind them goes on above the largest number used. What LinVT makes of a video has no grid and counts like text.
Formula as in transformers' ``get_rope_index`` of Qwen2-VL.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from runtime.errors import BundleError

__all__ = ["PositionSpec", "next_positions", "prompt_positions"]

Ids = NDArray[np.int64]


class PositionSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Axes of a position, and with three of them rows and columns of the tokens of a picture."""

    axes: Literal[1, 3] = 1
    grid: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if self.axes not in (1, 3) or min(self.grid) < 1:
            raise ValueError("positions have 1 axis, or 3 and a grid of at least one row and column")


def prompt_positions(length: int, visual: Ids, spec: PositionSpec, *, on_grid: bool) -> Ids:
    """Positions (axes, S) of a prompt of ``length`` tokens.

    Args:
        length: S, tokens of the prompt.
        visual: (rows,) ascending: which of them are visual tokens.
        spec: axes and grid.
        on_grid: whether the visual tokens lie on the grid; then every unbroken run of them is one or more grids.

    Raises:
        BundleError: a run is not a whole number of grids.
    """
    counted: Ids = np.broadcast_to(np.arange(length), (spec.axes, length)).copy()
    if spec.axes == 1 or not on_grid or not visual.size:
        return counted
    for run in np.split(visual, np.flatnonzero(np.diff(visual) != 1) + 1):
        sets, rest = divmod(run.size, math.prod(spec.grid))
        if rest:
            raise BundleError(
                f"the prompt holds {run.size} visual tokens in a row, expected grids of {spec.grid}; template and "
                "stages do not belong together, export the bundle again"
            )
        shape = (sets, *spec.grid)
        start, end = run[0], run[-1] + 1
        counter = counted[0, start]
        counted[:, run] = counter + np.stack(np.unravel_index(np.arange(run.size), shape))
        counted[:, end:] = counter + max(shape) + np.arange(length - end)
    return counted


def next_positions(position_ids: Ids) -> Ids:
    """Positions (axes, 1) of the token after a prompt at ``position_ids`` (axes, S)."""
    following: Ids = np.full((len(position_ids), 1), position_ids.max() + 1)
    return following
