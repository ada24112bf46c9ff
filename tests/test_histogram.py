"""Magnitudes are counted in exact bins, in fixed memory, however the data comes."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.histogram import BINS, Histogram

Floats = NDArray[np.float32]


def floats(*values: float) -> Floats:
    return np.array(values, np.float32)


def histogram_of(*pieces: NDArray[Any], bins: int = BINS) -> Histogram:
    histogram = Histogram(bins)
    for piece in pieces:
        histogram.add(piece)
    return histogram


def obvious_counts(values: NDArray[Any], bins: int) -> tuple[float, list[int]]:
    """Width and counts, value by value, of finite ones."""
    magnitudes = [abs(float(value)) for value in values.ravel()]
    reach = 2.0**-200
    while reach < max(magnitudes):
        reach *= 2
    counts = [0] * bins
    for magnitude in magnitudes:
        counts[max(math.ceil(magnitude / (reach / bins)) - 1, 0)] += 1
    return reach / bins, counts


def spread(random: np.random.Generator, size: int, decades: float) -> Floats:
    """Both signs, magnitudes over so many decades around 1, some of them powers of two or zero."""
    magnitudes = 10.0 ** random.uniform(-decades, decades, size)
    values: Floats = (magnitudes * random.choice([-1, 1], size)).astype(np.float32)
    some = random.permutation(size)
    values[some[: size // 8]] = 2.0 ** random.integers(-int(decades), int(decades), size // 8, endpoint=True)
    values[some[size // 8 : size // 4]] *= 0
    return values


def same(first: Histogram, second: Histogram) -> bool:
    scalars = [{name: value for name, value in vars(each).items() if name != "counts"} for each in (first, second)]
    return scalars[0] == scalars[1] and np.array_equal(first.counts, second.counts)


@pytest.mark.parametrize("decades", [0.5, 3, 30])
@pytest.mark.parametrize("bins", [2, 64, BINS])
def test_counts_are_those_of_a_loop_over_values(random: np.random.Generator, decades: float, bins: int) -> None:
    values = spread(random, 3000, decades)
    found = histogram_of(values.reshape(30, 4, 25), bins=bins)
    width, counts = obvious_counts(values, bins)
    assert found.width == width and found.counts.tolist() == counts and found.counts.dtype == np.int64
    assert found.largest == float(np.abs(values).max()) and found.total == 3000
    assert found.zeros == int((values == 0).sum()) and found.not_finite == 0


@pytest.mark.parametrize("decades", [1, 30])
def test_neither_order_nor_pieces_change_anything(random: np.random.Generator, decades: float) -> None:
    values = spread(random, 20_000, decades)
    whole = histogram_of(values)
    ascending = values[np.abs(values).argsort()]
    for order in (ascending, ascending[::-1], random.permutation(values)):
        cuts = np.sort(random.integers(0, values.size, 40))  # equal cuts make empty pieces
        assert same(histogram_of(*np.split(order, cuts)), whole)


def test_an_array_of_many_internal_pieces_is_the_same_as_its_parts(random: np.random.Generator) -> None:
    values = random.standard_normal((3, 700, 311)).astype(np.float32)
    values *= floats(1.0, 30.0, 0.01)[:, None, None]
    assert same(histogram_of(values), histogram_of(*values[::-1]))
    assert same(histogram_of(values), histogram_of(values.transpose(2, 0, 1)))


def test_a_power_of_two_is_in_the_last_bin_and_what_exceeds_it_doubles_the_range() -> None:
    histogram = histogram_of(floats(-4.0, 1.0), bins=8)
    assert (histogram.width, histogram.counts.tolist()) == (0.5, [0, 1, 0, 0, 0, 0, 0, 1])
    histogram.add(np.nextafter(floats(4.0), np.float32(5.0)))
    assert (histogram.width, histogram.counts.tolist()) == (1.0, [1, 0, 0, 1, 1, 0, 0, 0])


@pytest.mark.parametrize("scale", [2.0**-126, 1e-30, 1e30, 2.0**120])
def test_tiny_and_huge_magnitudes_have_bins_of_their_own(random: np.random.Generator, scale: float) -> None:
    values = (random.uniform(0.1, 1.0, 500) * scale).astype(np.float32)
    found = histogram_of(values)
    assert (found.width, found.counts.tolist()) == obvious_counts(values, BINS)
    assert np.count_nonzero(found.counts) > 300


def test_the_smallest_and_largest_of_float32_share_a_histogram() -> None:
    limits = np.finfo(np.float32)
    values = np.array([limits.smallest_subnormal, 0.0, limits.max], np.float32)
    for order in (values, values[::-1]):
        found = histogram_of(*order)
        assert found.counts[[0, -1]].tolist() == [2, 1] and found.zeros == 1
        assert found.largest == float(limits.max) and found.width == 2.0**128 / BINS


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_values_count_as_their_float32(random: np.random.Generator, dtype: Any) -> None:
    values = (random.standard_normal(5000) * 20).astype(dtype)
    assert same(histogram_of(values), histogram_of(values.astype(np.float32)))


def test_zeros_alone_leave_the_range_open(random: np.random.Generator) -> None:
    zeros = np.array([0.0, -0.0, 0.0], np.float32)
    histogram = histogram_of(zeros)
    assert (histogram.largest, histogram.width, histogram.total, histogram.zeros) == (0.0, 0.0, 3, 3)
    values = random.standard_normal(100).astype(np.float32)
    histogram.add(values)
    assert same(histogram, histogram_of(values, zeros)) and histogram.counts.sum() == 103


def test_nan_and_infinity_are_counted_apart(random: np.random.Generator) -> None:
    values = random.standard_normal(1000).astype(np.float32)
    broken = np.concatenate([values, floats(np.nan, np.inf, -np.inf)])
    found, expected = histogram_of(random.permutation(broken)), histogram_of(values)
    assert found.not_finite == 3 and expected.not_finite == 0
    expected.not_finite = 3
    assert same(found, expected)
    alone = histogram_of(floats(np.nan, np.inf))
    assert (alone.total, alone.not_finite, alone.largest, alone.counts.sum()) == (0, 2, 0.0, 0)


def test_nothing_may_be_added() -> None:
    assert same(histogram_of(np.ones((0, 4), np.float32)), Histogram())


def test_what_is_added_is_left_as_it_was(random: np.random.Generator) -> None:
    values = random.standard_normal(1000).astype(np.float32)
    before = values.copy()
    values.flags.writeable = False
    histogram_of(values)
    assert np.array_equal(values, before)


def test_memory_is_that_of_a_piece(random: np.random.Generator) -> None:
    values = random.standard_normal(2**22, np.float32)
    histogram = Histogram()
    tracemalloc.start()
    try:
        histogram.add(values)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(f"peak {peak / 2**20:.1f} MiB for {values.nbytes / 2**20:.0f} MiB")
    assert peak < 12 * 2**20
