"""Positions on one axis and on three, as the original code counts them."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.errors import BundleError
from runtime.positions import PositionSpec, next_positions, prompt_positions
from tests.conftest import GOLDEN

GRID = PositionSpec(3, (2, 3))


@pytest.mark.parametrize(("prefix", "token"), [("", "image_token_id"), ("video.", "video_token_id")])
def test_the_original_codes_positions(prefix: str, token: str) -> None:
    import json

    arrays = np.load(GOLDEN / "qwen2vl-a" / "expected.npz")
    config = json.loads((GOLDEN / "qwen2vl-a" / "config.json").read_text())
    ids = arrays[f"{prefix}input_ids"][0]
    found = prompt_positions(len(ids), np.flatnonzero(ids == config[token]), GRID, on_grid=True)
    np.testing.assert_array_equal(found, arrays[f"{prefix}position_ids"][:, 0])
    after = len(ids) + int(arrays[f"{prefix}rope_deltas"][0, 0])
    np.testing.assert_array_equal(next_positions(found), np.full((3, 1), after))


def slow_positions(visual: np.ndarray, length: int, grid: tuple[int, int]) -> list[tuple[int, int, int]]:  # type: ignore[type-arg]
    """Token by token: text counts up, a grid starts at the counter, text goes on above the largest number."""
    places = set(visual.tolist())
    positions: list[tuple[int, int, int]] = []
    counter, inside = 0, 0
    for token in range(length):
        if token in places:
            sheet, rest = divmod(inside, grid[0] * grid[1])
            positions.append((counter + sheet, counter + rest // grid[1], counter + rest % grid[1]))
            inside += 1
            if token + 1 not in places:
                counter = max(map(max, positions)) + 1
                inside = 0
        else:
            positions.append((counter,) * 3)
            counter += 1
    return positions


def test_any_mixture_of_text_and_grids_is_counted_token_by_token(random: np.random.Generator) -> None:
    for _ in range(50):
        rows, columns = (int(side) for side in random.integers(1, 5, 2))
        marks: list[bool] = []
        for _ in range(int(random.integers(1, 4))):
            marks += [False] * int(random.integers(1, 6)) + [True] * rows * columns * int(random.integers(1, 4))
        marks += [False] * int(random.integers(0, 5))
        visual = np.flatnonzero(marks)
        found = prompt_positions(len(marks), visual, PositionSpec(3, (rows, columns)), on_grid=True)
        assert found.T.tolist() == [list(p) for p in slow_positions(visual, len(marks), (rows, columns))]
        assert next_positions(found).tolist() == [[found.max() + 1]] * 3


@pytest.mark.parametrize(("spec", "on_grid"), [(PositionSpec(), True), (PositionSpec(), False), (GRID, False)])
def test_without_a_grid_everything_counts_like_text(spec: PositionSpec, on_grid: bool) -> None:
    found = prompt_positions(20, np.arange(3, 15), spec, on_grid=on_grid)
    assert found.tolist() == [list(range(20))] * spec.axes
    assert next_positions(found).tolist() == [[20]] * spec.axes


def test_a_run_that_is_no_whole_grid_is_refused() -> None:
    with pytest.raises(BundleError, match=r"7 visual tokens in a row, expected grids of \(2, 3\)"):
        prompt_positions(20, np.arange(3, 10), GRID, on_grid=True)
