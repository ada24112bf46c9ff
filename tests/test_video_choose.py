"""Which frames: the released rule, frames per second by the clock, ranges, and refusals."""

import math
import re

import numpy as np
import pytest

from runtime.errors import OptionError
from runtime.video import FrameChoice, choose, uniform_indices

TEN_SECONDS = np.arange(300) / 30.0


def picked(timestamps=TEN_SECONDS, *, minimum=4, default=16, maximum=64, **choice):
    return choose(timestamps, FrameChoice(**choice), minimum=minimum, default=default, maximum=maximum)


def released_rule(first: int, last: int, count: int) -> list[int]:
    seg = float(last - first) / count
    return [int(first + (seg / 2) + np.round(seg * i)) for i in range(count)]


def test_uniform_indices_are_the_released_ones() -> None:
    rng = np.random.default_rng()
    for _ in range(500):
        first, length, count = (int(rng.integers(0, top)) for top in (1000, 5000, 200))
        indices = uniform_indices(first, first + length, count + 1)
        assert indices.tolist() == released_rule(first, first + length, count + 1)
        assert first <= indices.min() and indices.max() <= first + length
        assert (np.diff(indices) >= 0).all()


def test_eight_of_a_hundred_and_one_frames_by_hand_with_halves_to_even() -> None:
    assert uniform_indices(0, 100, 8).tolist() == [6, 18, 31, 44, 56, 68, 81, 94]


def test_a_short_clip_repeats_frames() -> None:
    assert uniform_indices(0, 0, 5).tolist() == [0] * 5
    indices = picked(np.arange(3) / 10, minimum=8, default=8)
    assert indices.size == 8 and set(indices.tolist()) <= {0, 1, 2}


def test_the_default_number_holds_where_nothing_is_asked() -> None:
    assert picked().tolist() == released_rule(0, 299, 16)
    assert picked(frames=32).tolist() == released_rule(0, 299, 32)


def test_a_range_takes_frames_from_start_up_to_but_not_at_end() -> None:
    indices = picked(frames=64, start=2.0, end=3.0)
    assert indices.tolist() == released_rule(60, 89, 64)


def test_the_end_of_the_last_frame_is_a_good_end() -> None:
    assert picked(end=10.0).tolist() == picked().tolist()


def test_a_range_between_two_frames_takes_the_one_on_display() -> None:
    slow = np.array([0.0, 1.0, 2.0, 3.0])
    assert picked(slow, start=1.2, end=1.6).tolist() == [1] * 16
    assert picked(slow, end=1e-9).tolist() == [0] * 16


def test_fps_takes_a_frame_at_every_tick() -> None:
    assert picked(fps=1.0).tolist() == [30 * second for second in range(10)]
    assert picked(fps=2.0, start=1.0, end=4.0).tolist() == [30 + 15 * tick for tick in range(6)]


def test_fps_of_the_video_itself_takes_every_frame_once() -> None:
    for rate in (10, 24, 25, 30, 60, 30000 / 1001):
        times = np.arange(200) / rate
        assert picked(times, fps=rate, maximum=200).tolist() == list(range(200))


def test_fps_follows_the_clock_when_the_frame_rate_varies() -> None:
    rng = np.random.default_rng()
    times = np.concatenate([[0.0], np.cumsum(rng.uniform(0.01, 0.9, 60))])
    indices = picked(times, fps=3.0, minimum=1, maximum=1000)
    for tick, index in enumerate(indices):
        on_display = max(i for i, time in enumerate(times) if time <= tick / 3 + 1e-9)
        assert index == on_display


def test_fps_that_gives_too_few_frames_falls_back_to_the_fewest() -> None:
    assert picked(fps=0.1).tolist() == released_rule(0, 299, 4)


@pytest.mark.parametrize("fps", [10.0, 1e6, 1e300])
def test_fps_that_gives_too_many_frames_says_how_many_and_what_to_do(fps: float) -> None:
    with pytest.raises(OptionError, match=r"gives \d+ frames, the bundle takes at most 64; lower --fps") as caught:
        picked(fps=fps)
    assert "100" in str(caught.value) or fps > 10


@pytest.mark.parametrize("frames", [-1, 0, 3, 65, 10**9])
def test_frames_outside_the_bundles_bounds_name_both(frames: int) -> None:
    with pytest.raises(OptionError, match="takes 4 to 64"):
        picked(frames=frames)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"frames": 8, "fps": 1.0}, "both"),
        ({"fps": 0.0}, "fps is 0"),
        ({"fps": -2.0}, "fps is -2"),
        ({"fps": math.nan}, "fps is nan"),
        ({"fps": math.inf}, "fps is inf"),
        ({"start": -0.5}, "start is -0.5"),
        ({"start": math.nan}, "start is nan"),
        ({"end": math.nan}, "end is nan"),
        ({"end": math.inf}, "end is inf"),
        ({"end": 0.0}, "not before end"),
        ({"start": 5.0, "end": 5.0}, "not before end"),
        ({"start": 6.0, "end": 5.0}, "not before end"),
        ({"start": 11.0}, "last frame is at 9.967 s"),
        ({"end": 10.5}, "last frame is at 9.967 s"),
        ({"start": 1.0, "end": 99.0}, "lower end"),
    ],
)
def test_choices_that_cannot_be_met_are_refused_in_one_line(choice: dict, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)) as caught:
        picked(**choice)
    assert "\n" not in str(caught.value)
