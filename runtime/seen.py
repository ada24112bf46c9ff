"""What the engine keeps of a video or of pictures: everything that does not depend on a question."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.backend import Tensor
from runtime.manifest import Manifest
from runtime.text import Visuals

__all__ = ["Images", "Seen", "Video", "visuals_of", "visuals_of_frames", "visuals_of_images"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Seen:
    """Features that questions can be asked about.

    Attributes:
        features: (1, M, D) f32 of a video with LinVT, (1, sets * N, D) f32 otherwise, where the backend computes:
            a NumPy array on the CPU, otherwise what ``np.asarray`` copies to one.
        milliseconds: time spent per stage.
        bundle: identity of the bundle that made the features.
    """

    features: Tensor
    milliseconds: dict[str, float]
    bundle: str = field(repr=False)


@dataclass(frozen=True, eq=False, kw_only=True)
class Video(Seen):
    """A video.

    Attributes:
        timestamps: (T,) float64, seconds of the frames that were used.
    """

    timestamps: NDArray[np.float64]

    @property
    def frames(self) -> int:
        """T, the number of frames that were used."""
        return len(self.timestamps)


@dataclass(frozen=True, eq=False, kw_only=True)
class Images(Seen):
    """Pictures, which reach the LLM without LinVT.

    Attributes:
        count: how many.
    """

    count: int


def visuals_of(seen: Seen, manifest: Manifest) -> Visuals:
    """The places a prompt needs for what was seen."""
    if isinstance(seen, Video):
        return visuals_of_frames(seen.frames, manifest)
    assert isinstance(seen, Images)
    return visuals_of_images(seen.count, manifest)


def visuals_of_images(count: int, manifest: Manifest) -> Visuals:
    """The places a prompt needs for so many pictures."""
    tokens = manifest.frames.tokens
    return Visuals("image", count, tokens, count * tokens, on_grid=True)


def visuals_of_frames(frames: int, manifest: Manifest) -> Visuals:
    """The places a prompt needs for a video of so many frames."""
    sets = manifest.frames.sets(frames)
    if manifest.linvt:
        return Visuals("video", sets, manifest.linvt.queries, manifest.linvt.queries, on_grid=False)
    tokens = manifest.frames.tokens
    return Visuals("video", sets, tokens, sets * tokens, on_grid=True)
