"""``python -m tests.benchmarks.int4 [K N]``: which way of making 4-bit weights loses least, and what does it cost?

Layers of Qwen2-0.5B's shapes, or one of (K, N), with heavy-tailed weights and made-up activations that look like those
of LLMs: correlated, with a spectrum that decays, and a handful of channels far above the others. Errors are relative,
of the output, on rows that no method saw. Real checkpoints differ; only ratios between methods are meant.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from calibration.awq import awq_scales
from calibration.blocks import Floats, clipped, output_error, round_to_nearest
from calibration.gptq import gptq

SHAPES = ((896, 896), (896, 4864), (4864, 896))  # (K, N)
BLOCKS = (32, 128)
ROWS = 512  # to calibrate with, and as many held out
RANK = 2048  # most directions in which activations vary beside their noise; more than there are rows
OUTLIERS = 6  # channels

Quantise = Callable[[Floats, Floats, int], Floats]  # weight (K, N), rows (R, K), block to the dense approximation


def main() -> None:
    shapes = [(int(sys.argv[1]), int(sys.argv[2]))] if len(sys.argv) > 2 else SHAPES
    results = [row for channels, outputs in shapes for row in compared(channels, outputs)]
    print(json.dumps({"rows": ROWS, "bits": 4, "results": results}))


def compared(channels: int, outputs: int) -> list[dict[str, object]]:
    """Every method on one layer."""
    random = np.random.default_rng(channels + outputs)
    weight, (rows, held_out) = layer(random, channels, outputs), activations(random, channels)
    results: list[dict[str, object]] = []
    for block in BLOCKS:
        for name, quantise in METHODS.items():
            begin = time.perf_counter()
            approximation = quantise(weight, rows, block)
            seconds = time.perf_counter() - begin
            error = output_error(weight, approximation, held_out)
            print(f"{channels:6} x {outputs:5}  block {block:3}  {name:13} {error:8.4%}  {seconds:7.2f} s", flush=True)
            figures = {"error": round(error, 6), "seconds": round(seconds, 2)}
            results.append({"shape": [channels, outputs], "block": block, "method": name, **figures})
    return results


def layer(random: np.random.Generator, channels: int, outputs: int) -> Floats:
    """Weights (K, N) f32 of Student's t with 4 degrees of freedom (variance 2) and a deviation of 0.02."""
    weight: Floats = (random.standard_t(4, (channels, outputs)) * (0.02 / np.sqrt(2))).astype(np.float32)
    return weight


def activations(random: np.random.Generator, channels: int) -> tuple[Floats, Floats]:
    """Rows to calibrate with and held-out rows, (ROWS, K) f32 each."""
    rank = min(channels, RANK)
    directions = random.standard_normal((rank, channels), np.float32) / (1 + np.arange(rank))[:, None] ** 0.7
    gains = random.lognormal(0, 0.5, channels)
    gains[random.choice(channels, OUTLIERS, replace=False)] *= random.uniform(20, 100, OUTLIERS)
    rows = random.standard_normal((2 * ROWS, rank)) @ directions + 0.1 * random.standard_normal((2 * ROWS, channels))
    calibrated, held_out = np.split((rows * gains).astype(np.float32), 2)
    return calibrated, held_out


def by_rounding(weight: Floats, rows: Floats, block: int) -> Floats:
    return round_to_nearest(weight, block).dense()


def by_clipping(weight: Floats, rows: Floats, block: int) -> Floats:
    return clipped(weight, block, np.square(rows).mean(0)).dense()


def by_gptq(weight: Floats, rows: Floats, block: int) -> Floats:
    return gptq(weight, block, rows).dense()


def by_gptq_in_order(weight: Floats, rows: Floats, block: int) -> Floats:
    return gptq(weight, block, rows, act_order=False).dense()


def scaled(inner: Quantise, weight: Floats, rows: Floats, block: int) -> Floats:
    """``inner`` on AWQ's weights and rows, its result scaled back."""
    scales = awq_scales([weight], rows, block)
    approximation = inner(weight * scales[:, None], rows / scales, block)
    approximation /= scales[:, None]
    return approximation


METHODS: dict[str, Quantise] = {
    "rtn": by_rounding,
    "clipped": by_clipping,
    "gptq in order": by_gptq_in_order,
    "gptq": by_gptq,
    "awq + clipped": partial(scaled, by_clipping),
    "awq + gptq": partial(scaled, by_gptq),
}


if __name__ == "__main__":
    main()
