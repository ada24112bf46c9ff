"""Optimisation profiles of a bundle's stages: the smallest, best and largest shapes of their inputs.

    vision      frames of a run: a group .. ``batch`` .. ``batch``
    refine      sets of tokens: those of the fewest, the usual and the most frames
    aggregate   tokens of the question: 1 .. ``TEXT`` .. ``text``
    decode      profile 0, prefill: 1 .. a prompt .. ``tokens`` rows; profile 1: one row;
                a cache of 1 .. prompt and answer .. ``tokens`` rows; always ``tokens`` where it is written in place

Unless asked otherwise, the usual video, a question and an answer fit, however many rows they are.

Knows the manifest only; opens no graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from export.engine.options import KEYS, BuildOptions
from runtime.batches import FRAME_BATCH, whole_groups
from runtime.engines import ShapeRange
from runtime.errors import OptionError
from runtime.kv_cache import ANSWER_ROOM, CACHE_BLOCK, rounded
from runtime.manifest import STAGES, Manifest, TensorSpec

__all__ = ["TEXT", "Profiles", "Range", "Ranges", "chosen_stages", "profiles_of", "ranges_of"]

TEXT = 32  # tokens of a usual question
MOST_TEXT = 512  # tokens, unless asked otherwise
MOST_TOKENS = 2048  # rows of prompt and answer, unless the usual video takes more: bounds the KV cache
CHAT = 128  # rows of a prompt around what is seen: system text, question, template

Profiles = tuple[dict[str, ShapeRange], ...]


@dataclass(frozen=True)
class Range:
    """Sizes of one key."""

    least: int
    best: int
    most: int

    def __post_init__(self) -> None:
        assert 1 <= self.least <= self.best <= self.most


ONE = Range(1, 1, 1)


@dataclass(frozen=True)
class Ranges:
    """Sizes of every key; None where no stage of the bundle has it."""

    batch: Range
    tokens: Range
    frames: Range | None
    text: Range | None


def chosen_stages(manifest: Manifest, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The stages to build, in the order in which a video meets them.

    Raises:
        OptionError: the bundle has no such stage.
    """
    have = [stage for stage in STAGES if stage in manifest.stages]
    if unknown := [stage for stage in asked if stage not in have]:
        raise OptionError(f"--stages names {unknown[0]!r:.40}, expected some of {', '.join(have)}")
    return tuple(stage for stage in have if not asked or stage in asked)


def ranges_of(manifest: Manifest, options: BuildOptions) -> Ranges:
    """Sizes of every key, where not asked for the bundle's own.

    Raises:
        OptionError: a number outside what the bundle can take, or out of order.
    """
    frames, linvt = manifest.frames, manifest.linvt
    if linvt is None:
        for key in ("frames", "text"):
            if any(key in sizes for sizes in (options.least, options.best, options.most)):
                raise OptionError(f"{key} is set, but this bundle has no LinVT, whose stages take {KEYS[key]}")
    group = frames.group
    run = whole_groups(FRAME_BATCH, group)
    seen = linvt.queries if linvt else frames.sets(frames.default) * frames.tokens
    tokens = usual(1, seen + CHAT, manifest.context, max(MOST_TOKENS, seen + CHAT + ANSWER_ROOM))
    return Ranges(
        batch=asked_range("batch", options, Range(group, run, run), (group, max(run, frames.maximum)), step=group),
        tokens=asked_range("tokens", options, tokens, (2, manifest.context)),
        frames=asked_range(
            "frames", options, Range(frames.minimum, frames.default, frames.maximum), (frames.minimum, frames.maximum)
        )
        if linvt
        else None,
        text=asked_range("text", options, usual(1, TEXT, manifest.context, MOST_TEXT), (1, manifest.context))
        if linvt
        else None,
    )


def usual(least: int, best: int, limit: int, most: int) -> Range:
    """A range up to ``most``, or up to the limit where that is less."""
    most = min(most, limit)
    return Range(least, min(best, most), most)


def asked_range(key: str, options: BuildOptions, default: Range, limits: tuple[int, int], step: int = 1) -> Range:
    """The default with what was asked for in its place; the best size moves into a narrower range."""
    lowest, highest = limits
    for option, sizes in (("min", options.least), ("opt", options.best), ("max", options.most)):
        size = sizes.get(key, highest)
        if not lowest <= size <= highest or (key in sizes and size % step):
            whole = f" in whole groups of {step}" if step > 1 else ""
            raise OptionError(f"--{option} has {key}={size}, expected {lowest} to {highest}{whole} ({KEYS[key]})")
    least = options.least.get(key, min(default.least, options.most.get(key, default.least)))
    most = options.most.get(key, max(default.most, least, options.best.get(key, least)))
    best = options.best.get(key, min(max(default.best, least), most))
    if not least <= best <= most:
        raise OptionError(f"{key} has min {least}, opt {best} and max {most}, expected them in this order")
    return Range(least, best, most)


def profiles_of(manifest: Manifest, stage: str, ranges: Ranges, *, in_place: bool = False) -> Profiles:
    """The optimisation profiles of a stage, with every input, fixed ones too.

    Args:
        manifest: of the bundle.
        stage: its name.
        ranges: from ``ranges_of``.
        in_place: the engine writes the KV cache in place, which asks for a cache of one size.
    """
    inputs = manifest.stages[stage].inputs
    rows = [ranges.tokens, ONE] if stage == "decode" else [ONE]
    return tuple(
        {spec.name: shape_range(spec, *free_axis(manifest, stage, spec.name, ranges, new, in_place)) for spec in inputs}
        for new in rows
    )


def free_axis(
    manifest: Manifest, stage: str, name: str, ranges: Ranges, rows: Range, in_place: bool
) -> tuple[int, Range | None]:
    """Which axis of an input is free, and how far; ``rows`` are the new ones of a decode profile."""
    if stage == "vision":
        return 0, ranges.batch
    if stage == "refine" and ranges.frames:
        return 1, sets(manifest, ranges.frames)
    if name.startswith("past_"):
        return 2, cache_range(ranges.tokens, in_place)
    return {"text": (1, ranges.text), "inputs_embeds": (1, rows), "position_ids": (-1, rows)}.get(name, (0, None))


def shape_range(spec: TensorSpec, axis: int, free: Range | None) -> ShapeRange:
    """Shapes of one input; an axis that the manifest fixes stays as it is."""

    def sized(size: int) -> tuple[int, ...]:
        named = [index for index, length in enumerate(spec.shape) if isinstance(length, str)]
        assert all(free and index == axis % len(spec.shape) for index in named), f"{spec.name} has another free axis"
        return tuple(size if isinstance(length, str) else length for length in spec.shape)

    chosen = free or ONE
    return ShapeRange(sized(chosen.least), sized(chosen.best), sized(chosen.most))


def cache_range(rows: Range, in_place: bool) -> Range:
    """Rows of the KV cache: of one that grows with what it has to hold, or always as many."""
    if in_place:
        return Range(rows.most, rows.most, rows.most)
    return Range(rows.least, rounded(rows.best + ANSWER_ROOM, CACHE_BLOCK, rows.most), rows.most)


def sets(manifest: Manifest, frames: Range) -> Range:
    """Frames of a video -> sets of tokens."""
    count = manifest.frames.sets
    return Range(count(frames.least), count(frames.best), count(frames.most))
