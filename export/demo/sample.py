"""The sample video that ships with the demo: ``python -m export.demo.sample OUT.mp4``.

Three digits drawn by hands that training never saw: a red 3 moves right, a blue 8 stays, and a green 5 appears late
and moves left. Written with PyAV, 256 x 256, 4 s; the same bytes for the same encoder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from export.demo.film import FPS, film
from export.demo.glyphs import glyphs
from export.demo.scenes import COLOURS, Digit, Scene
from export.demo.video import write
from runtime.cli import guarded

__all__ = ["QUESTIONS", "main", "sample_scene"]

QUESTIONS = {
    "Which way does the red digit move?": "right",
    "What colour is the 8?": "blue",
    "Which digit appears last?": "5",
    "What happens in the video?": "a red 3 moves right, a green 5 moves left, a blue 8 stays still",
}


def sample_scene() -> Scene:
    """The scene, of test drawings."""
    digits = (
        digit(3, "red", "right", (0.22, 0.24), (0.76, 0.24)),
        digit(8, "blue", "still", (0.21, 0.7), (0.21, 0.7)),
        digit(5, "green", "left", (0.8, 0.7), (0.5, 0.7), appears=0.35),
    )
    return Scene(digits, ((14.0, 16.0, 26.0), (38.0, 40.0, 52.0)), vertical=True, noise=0.0, seed=0)


def digit(
    value: int,
    colour: str,
    direction: str,
    start: tuple[float, float],
    end: tuple[float, float],
    appears: float = 0.0,
) -> Digit:
    """A digit of the sample, the clearest of its test drawings."""
    return Digit(value, colour, direction, clearest(value), COLOURS[colour], 0.32, start, end, appears)


def clearest(value: int) -> int:
    """The test drawing closest to the mean training drawing of a digit."""
    train, test = glyphs("train"), glyphs("test")
    mean = train.masks[train.values == value].mean(0)
    candidates = np.flatnonzero(test.values == value)
    return int(candidates[((test.masks[candidates] - mean) ** 2).sum((1, 2)).argmin()])


def main(arguments: list[str] | None = None) -> int:
    """Write the video and say what to ask about it."""
    parser = argparse.ArgumentParser(prog="python -m export.demo.sample", description="Write the sample video.")
    parser.add_argument("out", type=Path)
    given = parser.parse_args(arguments)
    write(given.out, film(sample_scene(), glyphs("test")), fps=FPS)
    for question, answer in QUESTIONS.items():
        sys.stdout.write(f"{question} {answer}\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded("linvt-demo-sample", main))
