"""What is kept of an activation: an even sample in fixed memory, and extremes, however it comes in pieces."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.observe import LOUD, SAMPLE, Observer

Floats = NDArray[np.float32]


def pieces(rows: Floats, random: np.random.Generator) -> list[Floats]:
    """Rows (R, K) cut at random places, some pieces empty."""
    return np.split(rows, np.sort(random.integers(0, len(rows) + 1, random.integers(1, 12))))


def observed(rows: list[Floats], name: str = "x", sample: int = SAMPLE) -> Observer:
    observer = Observer(name, sample)
    for piece in rows:
        observer.add(piece)
    return observer


def test_every_row_is_as_likely_in_the_sample(random: np.random.Generator) -> None:
    """The chi-square statistic of how often each of 100 rows is drawn; names are fixed, so the draws are too."""
    rows, size, times = np.arange(100, dtype=np.float32)[:, None], 20, 500
    counts = np.zeros(100)
    for number in range(times):
        counts[observed(pieces(rows, random), f"row {number}", size).sample[:, 0].astype(int)] += 1
    chance = size / 100
    statistic = float((np.square(counts - times * chance) / (times * chance * (1 - chance))).sum())
    print(f"chi-square of 99 degrees of freedom: {statistic:.0f}")
    assert counts.sum() == size * times  # nor is a row drawn twice
    assert 45 < statistic < 185  # 99 +- 6 standard deviations


def test_where_the_rows_are_cut_does_not_matter(random: np.random.Generator) -> None:
    rows = random.standard_normal((3000, 5)).astype(np.float32)
    whole, cut = observed([rows]), observed(pieces(rows, random))
    one_by_one = observed(list(rows))
    for other in (cut, one_by_one):
        np.testing.assert_array_equal(other.sample, whole.sample)
        np.testing.assert_array_equal(other.channels, whole.channels)
        np.testing.assert_array_equal(other.histogram.counts, whole.histogram.counts)
        assert other.rows == whole.rows == 3000


def test_observers_of_other_names_draw_other_rows_and_of_the_same_name_the_same(random: np.random.Generator) -> None:
    rows = random.standard_normal((2000, 3)).astype(np.float32)
    first, again, other = (observed([rows], name).sample for name in ("a", "a", "b"))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("count", [1, 255, 256, 257])
def test_the_sample_is_all_rows_until_there_are_too_many(count: int, random: np.random.Generator) -> None:
    rows = random.standard_normal((count, 4)).astype(np.float32)
    sample = observed(pieces(rows, random)).sample
    assert sample.shape == (min(count, SAMPLE), 4) and sample.dtype == np.float32
    known = {row.tobytes() for row in rows}
    drawn = {row.tobytes() for row in sample}
    assert drawn <= known and len(drawn) == len(sample)


def test_memory_stays_as_it_is_however_much_is_shown(random: np.random.Generator) -> None:
    width = 512
    observer, piece = Observer("x"), random.standard_normal((2000, width)).astype(np.float32)
    observer.add(piece)
    tracemalloc.start()
    try:
        for _ in range(60):
            observer.add(piece)
        grown, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(f"grown by {grown} bytes, {peak} at most in between")
    assert observer.rows == 61 * 2000
    assert grown < 3 * SAMPLE * width * 4  # the sample anew, and what it is a part of
    assert peak < 4 * piece.nbytes


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_channels_hold_the_largest_magnitude_of_each(dtype: type, random: np.random.Generator) -> None:
    values: Floats = (random.standard_normal((4, 50, 7)) * random.lognormal(0, 2, 7)).astype(dtype)
    observer = observed(list(values))
    assert observer.channels.dtype == np.float32
    np.testing.assert_array_equal(observer.channels, np.abs(values).max(axis=(0, 1)))
    assert observer.histogram.largest == np.abs(values).max()
    assert observer.rows == 200


def test_a_piece_without_rows_changes_nothing(random: np.random.Generator) -> None:
    observer = Observer("x")
    observer.add(np.empty((1, 0, 6), np.float32))
    assert observer.rows == 0 and observer.sample.size == 0
    rows = random.standard_normal((5, 6)).astype(np.float32)
    observer.add(rows)
    assert len(observer.sample) == 5


def test_the_sample_is_the_observers_own(random: np.random.Generator) -> None:
    rows = random.standard_normal((10, 6)).astype(np.float32)
    observer = observed([rows])
    before = observer.sample.copy()
    rows[:] = 7
    np.testing.assert_array_equal(observer.sample, before)


def test_the_loudest_rows_are_kept_whatever_the_pieces(random: np.random.Generator) -> None:
    rows = random.standard_t(2, (3000, 24)).astype(np.float32)
    whole, pieces = Observer("x"), Observer("x")
    whole.add(rows)
    for piece in np.split(rows, [7, 8, 1000, 2500]):
        pieces.add(piece)
    loudest = rows[np.argsort(-np.abs(rows).max(axis=1), kind="stable")[:LOUD]]
    assert np.array_equal(whole.loud, loudest)
    assert np.array_equal(pieces.loud, loudest)
