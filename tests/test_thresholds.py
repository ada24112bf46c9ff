"""Clipping thresholds are those of slow obvious searches on the values themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.histogram import Histogram
from calibration.thresholds import METHODS, mean_squared_error, threshold, thresholds
from runtime.errors import OptionError

Floats = NDArray[np.float32]


def histogram_of(values: NDArray[Any], bins: int = 2048) -> Histogram:
    histogram = Histogram(bins)
    histogram.add(values)
    return histogram


def error_of(values: NDArray[Any], clip: float) -> float:
    """Mean squared error of quantising the values themselves."""
    scale = clip / 127
    exact = values.astype(np.float64)
    return float(np.mean((exact - np.clip(np.rint(exact / scale), -127, 127) * scale) ** 2))


def obvious_divergence(counts: list[int], kept: int) -> float:
    """KL(P || Q) of the kept bins, term by term."""
    reference = [*counts[: kept - 1], sum(counts[kept - 1 :])]
    seen = sum(counts[:kept])
    divergence = 0.0
    for level in range(128):
        members = [k for k in range(kept) if k * 128 // kept == level]
        filled = [k for k in members if reference[k]]
        inside = sum(counts[k] for k in members)
        for k in filled:
            p, q = reference[k] / sum(reference), max(inside / len(filled), 1e-4) / seen if seen else 0.0
            divergence += p * math.log(p / q) if q else math.inf
    return divergence


def samples(random: np.random.Generator, name: str, size: int = 100_000) -> Floats:
    draw: dict[str, Callable[[], NDArray[np.float64]]] = {
        "normal": lambda: random.standard_normal(size),
        "laplace": lambda: random.laplace(size=size),
        "student": lambda: random.standard_t(4, size),
        "uniform": lambda: random.uniform(-3, 3, size),
        "relu": lambda: np.maximum(random.standard_normal(size), 0),
    }
    return draw[name]().astype(np.float32)


EVERY_SHAPE = pytest.mark.parametrize("name", ["normal", "laplace", "student", "uniform", "relu"])


@EVERY_SHAPE
def test_every_threshold_is_above_zero_and_at_most_the_largest_value(random: np.random.Generator, name: str) -> None:
    for size in (1, 3, 100, 10_000):
        histogram = histogram_of(np.append(samples(random, name, size), np.float32(0.01)))
        assert all(0 < found <= histogram.largest for found in thresholds(histogram).values())


@EVERY_SHAPE
def test_mse_is_as_good_as_trying_everything(random: np.random.Generator, name: str) -> None:
    values = samples(random, name)
    histogram = histogram_of(values)
    found = threshold(histogram, "mse")
    best = min(error_of(values, clip) for clip in np.geomspace(histogram.largest / 30, histogram.largest, 250))
    error = error_of(values, found)
    print(f"{name}: threshold {found:.4g}, error {error:.4g}, brute force {best:.4g}, ratio {error / best:.4f}")
    assert error < 1.01 * best


@EVERY_SHAPE
def test_the_error_told_from_bins_is_that_of_the_values(random: np.random.Generator, name: str) -> None:
    values = samples(random, name)
    histogram = histogram_of(values)
    for share in (0.05, 0.3, 0.7, 1.0):
        told, error = (
            mean_squared_error(histogram, share * histogram.largest),
            error_of(values, share * histogram.largest),
        )
        assert told == pytest.approx(error, rel=0.03)


def test_the_error_told_from_bins_takes_their_values_as_spread_evenly(random: np.random.Generator) -> None:
    values = random.laplace(size=40).astype(np.float32)
    histogram = histogram_of(values, 64)
    bins = np.flatnonzero(histogram.counts)
    low, high = bins * histogram.width, np.minimum((bins + 1) * histogram.width, histogram.largest)
    places = (np.arange(20_000) + 0.5) / 20_000
    for clip in random.uniform(0.05, 1.0, 8) * histogram.largest:
        errors = [error_of(a + (b - a) * places, clip) for a, b in zip(low, high, strict=True)]
        expected = float(histogram.counts[bins] @ errors) / values.size
        assert mean_squared_error(histogram, clip) == pytest.approx(expected, rel=1e-4)


@EVERY_SHAPE
def test_mse_is_the_least_of_what_the_bins_tell(random: np.random.Generator, name: str) -> None:
    histogram = histogram_of(samples(random, name))
    least = min(mean_squared_error(histogram, clip) for clip in np.linspace(0.1, 1, 1000) * histogram.largest)
    # Near its least the error of bins goes up and down by some 1e-4 of itself: 4e-4 is the most that 30 seeds showed.
    assert mean_squared_error(histogram, threshold(histogram, "mse")) <= least * (1 + 2e-3)


def test_mse_clips_a_normal_distribution_near_four_sigma(random: np.random.Generator) -> None:
    values = random.standard_normal(1_000_000).astype(np.float32)
    candidates = np.linspace(3, 5, 101)
    brute_force = candidates[np.argmin([error_of(values[:200_000], clip) for clip in candidates])]
    found = threshold(histogram_of(values), "mse")
    print(f"threshold {found:.3f}, brute force {brute_force:.3f}")
    assert 3.7 < found < 4.1
    assert found == pytest.approx(brute_force, rel=0.08)


@EVERY_SHAPE
@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.99, 100.0])
def test_percentile_is_the_next_bin_edge(random: np.random.Generator, name: str, percentile: float) -> None:
    values = samples(random, name, 12_347)
    histogram = histogram_of(values)
    exact = float(np.quantile(np.abs(values), percentile / 100, method="inverted_cdf"))
    found = threshold(histogram, "percentile", percentile=percentile)
    assert exact <= found <= exact + histogram.width


@pytest.mark.parametrize("bins", [256, 512])
@pytest.mark.parametrize("tail", [2, 30])
def test_entropy_is_that_of_plain_loops(random: np.random.Generator, bins: int, tail: int) -> None:
    values = random.standard_t(tail, 3000).astype(np.float32)
    values[:1000] = 0
    histogram = histogram_of(values, bins)
    size = math.ceil(histogram.largest / histogram.width)
    counts = histogram.counts[:size].tolist()
    counts[0] -= 1000
    kept = range(min(128, size), size + 1)
    divergences = [obvious_divergence(counts, bins_kept) for bins_kept in kept]
    chosen = threshold(histogram, "entropy") / histogram.width
    found = divergences[min(math.ceil(chosen), size) - kept[0]]
    print(f"{chosen:.0f} of {size} bins kept, divergence {found:.4g}, least {min(divergences):.4g}")
    # 512 bins are tried two at a time
    tried = [*divergences[: -1 : max(1, size // 256)], divergences[-1]]
    assert found == pytest.approx(min(tried), rel=1e-9, abs=1e-12)


def test_zeros_change_neither_entropy_nor_mse_but_percentiles(random: np.random.Generator) -> None:
    values = samples(random, "laplace")
    padded = np.concatenate([values, np.zeros(9 * values.size, np.float32)])
    found, without = thresholds(histogram_of(padded)), thresholds(histogram_of(values))
    assert (found["entropy"], found["mse"]) == (without["entropy"], without["mse"])
    assert found["percentile"] < without["percentile"]


@pytest.mark.parametrize("degrees", [2.5, 4])
def test_heavy_tails_are_clipped_by_all_but_minmax(random: np.random.Generator, degrees: float) -> None:
    values = random.standard_t(degrees, 1_000_000).clip(-100, 100).astype(np.float32)
    values[0] = 1.5 * np.abs(values).max()
    histogram = histogram_of(values)
    found = thresholds(histogram)
    print(found)
    assert found["minmax"] == histogram.largest
    assert all(found[method] < 0.8 * histogram.largest for method in ("percentile", "entropy", "mse"))


def test_one_outlier_is_clipped_by_all_but_minmax(random: np.random.Generator) -> None:
    values = random.standard_normal(1_000_000).astype(np.float32)
    values[1234] = -1000
    found = thresholds(histogram_of(values))
    print(found, {method: error_of(values, clip) for method, clip in found.items()})
    assert found["minmax"] == 1000
    assert found["percentile"] < 6 and found["entropy"] < 80 and found["mse"] < 250
    best = min(error_of(values, clip) for clip in np.geomspace(3, 1000, 120))
    assert error_of(values, found["mse"]) < 1.01 * best < 0.9 * error_of(values, 1000)


def test_finer_bins_let_entropy_clip_an_outlier_closer(random: np.random.Generator) -> None:
    values = random.standard_normal(200_000).astype(np.float32)
    values[1234] = 1000
    coarse, fine = (threshold(histogram_of(values, bins), "entropy") for bins in (2048, 16_384))
    assert fine < coarse / 4


@pytest.mark.parametrize("value", [1.0, 0.3, -7.1, 1e-30, 1e30])
def test_values_that_are_all_equal_are_kept(value: float) -> None:
    histogram = histogram_of(np.full(1000, value, np.float32))
    found = thresholds(histogram)
    assert all(clip == pytest.approx(histogram.largest, rel=1 / 2048) for clip in found.values())
    assert found["minmax"] == found["percentile"] == found["entropy"] == abs(float(np.float32(value)))


@EVERY_SHAPE
@pytest.mark.parametrize("exponent", [-90, -1, 3, 100])
def test_a_power_of_two_scales_every_threshold_exactly(random: np.random.Generator, name: str, exponent: int) -> None:
    values = samples(random, name, 5000)
    scaled = thresholds(histogram_of(values * np.float32(2.0**exponent)))
    assert scaled == {method: clip * 2.0**exponent for method, clip in thresholds(histogram_of(values)).items()}


def test_other_scales_scale_mse_and_minmax_nearly(random: np.random.Generator) -> None:
    values = samples(random, "normal")
    found, scaled = thresholds(histogram_of(values)), thresholds(histogram_of(values * np.float32(1.37e20)))
    for method in ("minmax", "percentile", "mse"):
        assert scaled[method] == pytest.approx(1.37e20 * found[method], rel=0.02)


def test_constant_zeros_have_the_threshold_zero() -> None:
    for histogram in (histogram_of(np.zeros(10, np.float32)), Histogram()):
        assert thresholds(histogram) == dict.fromkeys(METHODS, 0.0)
        assert mean_squared_error(histogram, 1.0) == 0.0


def test_unknown_methods_and_percentiles_are_refused(random: np.random.Generator) -> None:
    histogram = histogram_of(samples(random, "normal", 100))
    with pytest.raises(OptionError, match="'maxmin'; expected one of minmax, percentile, entropy, mse"):
        threshold(histogram, "maxmin")
    for percentile in (0.0, 100.5, math.nan):
        with pytest.raises(OptionError, match="above 0 and at most 100"):
            threshold(histogram, "percentile", percentile=percentile)
