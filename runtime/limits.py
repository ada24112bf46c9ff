"""What an opened bundle can take: the manifest's sizes, or less where engines were built for less.

Refuses early, before anything is decoded or computed, in words that say how to get more. Looks into no graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.batches import FRAME_BATCH, whole_groups
from runtime.engines import EngineRecord, ShapeRange
from runtime.errors import OptionError, QuestionError
from runtime.manifest import Manifest

__all__ = ["REBUILD", "Limits", "check_frames", "check_text", "limits_of", "limits_of_engines"]

REBUILD = "build the engines again with"


@dataclass(frozen=True)
class Limits:
    """Sizes of one run.

    Attributes:
        batch: most frames that go through vision together, a whole number of groups.
        frames: most of a video with LinVT.
        tokens: most of prompt and answer together.
        text: most tokens of a question that LinVT reads.
        least_batch: fewest frames that go through vision together; fewer are filled up.
        least_frames: fewest of a video with LinVT; a shorter one repeats frames.
    """

    batch: int
    frames: int
    tokens: int
    text: int
    least_batch: int = 1
    least_frames: int = 1


def limits_of(manifest: Manifest) -> Limits:
    """What graphs take that were built for no size in particular."""
    return Limits(
        batch=whole_groups(FRAME_BATCH, manifest.frames.group),
        frames=manifest.frames.maximum,
        tokens=manifest.context,
        text=manifest.context,
    )


def limits_of_engines(manifest: Manifest, records: Mapping[str, EngineRecord]) -> Limits:
    """What engines take, by the shapes in their records; never more than the manifest allows."""
    full = limits_of(manifest)
    group = manifest.frames.group
    frames, text, least_frames = full.frames, full.text, 1
    if manifest.linvt:
        frames = min(frames, group * most(records["refine"], "tokens", 1))
        least_frames = group * (records["refine"].profiles[0]["tokens"].least[1] - 1) + 1
        text = min(text, most(records["aggregate"], "text", 1))
    return Limits(
        batch=whole_groups(most(records["vision"], "pixel_values", 0), group),
        frames=frames,
        tokens=min(full.tokens, *(most(records["decode"], "past_key.0", 2, profile) for profile in (0, 1))),
        text=text,
        least_batch=records["vision"].profiles[0]["pixel_values"].least[0],
        least_frames=least_frames,
    )


def most(record: EngineRecord, tensor: str, axis: int, profile: int = 0) -> int:
    """The largest size of an axis in one of the profiles."""
    shapes: ShapeRange = record.profiles[profile][tensor]
    return shapes.most[axis]


def check_frames(count: int, limits: Limits, manifest: Manifest) -> None:
    """Refuse more frames than engines take; what the bundle itself refuses is not looked at.

    Raises:
        OptionError: too many.
    """
    if limits.frames < count <= manifest.frames.maximum:
        raise OptionError(
            f"{count} frames asked for, the engines here take at most {limits.frames}; ask for fewer, or {REBUILD} "
            f"--max frames={count}"
        )


def check_text(count: int, limits: Limits, manifest: Manifest) -> None:
    """Refuse a question of more tokens than LinVT's engine takes.

    Raises:
        QuestionError: too many.
    """
    if manifest.linvt and limits.text < manifest.context and count > limits.text:
        raise QuestionError(
            f"the question has {count} tokens, the engines here take at most {limits.text}; shorten the question, or "
            f"{REBUILD} --max text={count}"
        )
