"""Small stages on disk to make plans of, and scales for them made up by hand."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.scales import TensorScale
from calibration.stage_file import write_stage_file
from runtime.manifest import Compute, StageSpec
from tests.text_graphs import normal, typed


def entry(threshold: float, smooth: Collection[int] = ()) -> TensorScale:
    return TensorScale(
        threshold=threshold, method="by hand", largest=threshold, error=0.0, layers=(), smooth=tuple(map(int, smooth))
    )


def stage_file(text: str, weights: Mapping[str, NDArray[Any]], folder: Path, compute: Compute = "float32") -> StageSpec:
    """A float stage on disk."""
    return write_stage_file(typed(text, dict(weights), 24), folder, "stage", compute=compute, storage="float32")


GATED = """
net (float[1, rows, WIDTH] x) => (float[1, rows, 32] y) {
    a = MatMul (x, gate)
    g = Sigmoid (a)
    u = MatMul (x, up)
    p = Mul (g, u)
    y = MatMul (p, down)
}
"""


def gated(folder: Path, random: np.random.Generator, width: int) -> tuple[StageSpec, dict[str, NDArray[np.float32]]]:
    shapes = {"gate": (width, 64), "up": (width, 64), "down": (64, 32)}
    weights = {name: normal(random, *shape) for name, shape in shapes.items()}
    return stage_file(GATED.replace("WIDTH", str(width)), weights, folder), weights
