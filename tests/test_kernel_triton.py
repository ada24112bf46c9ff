"""The Triton kernel, in Triton's interpreter, computes what the oracle computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from msgspec import structs
from numpy.typing import NDArray

from kernels.ptx import layout_of
from kernels.spec import gather_pool, pooled_length
from tests.kernel_interpreter import Launch, as_bits, interpreted, run, triton_spec

pytestmark = pytest.mark.skipif(triton_spec() is None, reason="Triton is not installed")

Array = NDArray[Any]
CASES = [  # scales, (batch, rows, k, width)
    ((1, 2, 4), (1, 40, 24, 80)),
    ((1, 2, 4), (2, 33, 27, 7)),
    ((1, 2, 4), (3, 20, 10, 16)),
    ((1, 2, 4), (1, 9, 1, 5)),
    ((1,), (2, 8, 6, 16)),
    ((4,), (1, 8, 11, 33)),
    ((2, 3), (2, 30, 13, 48)),
    ((4, 4, 2), (1, 12, 9, 16)),
    ((7,), (1, 12, 22, 32)),
    ((1, 3, 5, 8), (1, 50, 71, 16)),
    ((1, 2, 40), (2, 30, 24, 16)),
]
BLOCK = 64  # columns of a program, so that small widths take several


def launch_of(tokens: Array, indices: Array, scales: tuple[int, ...]) -> Launch:
    """As a device launches it."""
    batch, length, width = tokens.shape
    top_k = indices.shape[1]
    layout = structs.replace(layout_of(scales, str(tokens.dtype)), block=BLOCK)
    return Launch(
        grid=layout.grid(batch, top_k, width),
        scalars=(length, top_k, width),
        constants={"SCALES": scales, "ROWS": layout.rows, "ONE_PASS": layout.one_pass, "BLOCK": layout.block},
        pooled=(batch, pooled_length(top_k, scales), width),
    )


def odd_tokens(random: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Array:
    """Normal numbers with -0.0, infinities, NaN, subnormal and the largest among them."""
    tokens = random.normal(size=shape).astype(np.float32)
    largest, least = float(ml_dtypes.finfo(dtype).max), float(ml_dtypes.finfo(dtype).smallest_subnormal)
    if dtype is ml_dtypes.bfloat16:
        least = 0.0  # the interpreter's own conversion loses bfloat16's subnormals
    for value in (-0.0, np.inf, -np.inf, np.nan, largest, -largest, least):
        tokens[random.random(shape) < 0.02] = value
    tokens[:, random.integers(0, shape[1], 3)] = -0.0  # whole windows of it
    return tokens.astype(dtype)


def truncated(tokens: Array, indices: Array, scales: tuple[int, ...]) -> Array:
    """The oracle's float32 means, cut to bfloat16 as Triton's interpreter does; a GPU rounds (``cvt.rn.bf16``)."""
    means = gather_pool(tokens.astype(np.float32), indices, scales)
    return (means.view(np.uint32) >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)


def assert_same_bits(found: Array, expected: Array, name: str) -> None:
    """Equal bit for bit, -0.0 included; a NaN may be any NaN."""
    is_nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), is_nan, name)
    np.testing.assert_array_equal(as_bits(found)[~is_nan], as_bits(expected)[~is_nan], name)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["f32", "f16", "bf16"])
def test_the_kernel_is_the_oracle_bit_for_bit(dtype: Any, random: np.random.Generator, tmp_path: Path) -> None:
    inputs = []
    for _, (batch, rows, k, width) in CASES:
        tokens = odd_tokens(random, (batch, rows, width), dtype)
        inputs.append((tokens, random.integers(0, rows, (batch, k))))  # rows repeat
    launches = [launch_of(*pair, scales) for pair, (scales, _) in zip(inputs, CASES, strict=True)]
    oracle = truncated if dtype is ml_dtypes.bfloat16 else gather_pool
    for found, pair, (scales, shape) in zip(interpreted(launches, inputs, tmp_path), inputs, CASES, strict=True):
        assert_same_bits(found, oracle(*pair, scales), f"scales {scales}, shape {shape}")


def test_an_index_outside_reads_the_nearest_row(random: np.random.Generator, tmp_path: Path) -> None:
    tokens = random.normal(size=(2, 9, 16)).astype(np.float32)
    indices = random.integers(-(2**40), 2**40, (2, 12))
    (found,) = interpreted([launch_of(tokens, indices, (1, 2))], [(tokens, indices)], tmp_path)
    np.testing.assert_array_equal(found, gather_pool(tokens, indices.clip(0, 8), (1, 2)))


def test_rows_beyond_two_to_the_31_elements_are_found() -> None:
    run()


def test_every_layout_covers_all_windows_once(random: np.random.Generator) -> None:
    for _ in range(50):
        scales = tuple(int(scale) for scale in random.integers(1, 12, random.integers(1, 5)))
        layout = layout_of(scales, "float16")
        assert layout.one_pass == all(layout.rows % scale == 0 for scale in scales) or not layout.one_pass
        top_k, width = (int(extent) for extent in random.integers(1, 5000, 2))
        x, y, z = layout.grid(3, top_k, width)
        assert (x - 1) * layout.rows < top_k <= x * layout.rows
        assert (y - 1) * layout.block < width <= y * layout.block
        assert z == 3
