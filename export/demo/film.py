"""Held-out scenes as videos, with questions about them; needs no torch.

Does not answer and does not encode.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from export.demo.glyphs import Glyphs, Split, glyphs
from export.demo.questions import KINDS, Question, ask
from export.demo.scenes import Scene, middle_times, random_scene, render

__all__ = ["FPS", "cases", "film"]

SECONDS, FPS, SIZE = 4, 20, 256
SEED = 4051


def film(scene: Scene, source: Glyphs) -> NDArray[np.uint8]:
    """A scene as a video of 4 s, 20 fps, 256 x 256: (80, 256, 256, 3)."""
    return render(scene, source, middle_times(SECONDS * FPS), SIZE)


def cases(split: Split, questions: int) -> Iterator[tuple[Scene, list[Question]]]:
    """Scenes with one question of every kind that still wants some."""
    left = dict.fromkeys(KINDS, questions)
    index = 0
    while any(left.values()):
        rng = np.random.default_rng([SEED, index])
        scene = random_scene(rng, glyphs(split))
        found = [question for kind in KINDS if left[kind] and (question := ask(scene, kind, rng))]
        for question in found:
            left[question.kind] -= 1
        index += 1
        yield scene, found
