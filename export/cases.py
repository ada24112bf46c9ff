"""One question about a video, or about pictures, through the bundle and through PyTorch, stage by stage.

Every stage runs twice: fed by the reference's values (its own error), and in a chain from the frames on (the error that
accumulates). Frames, preprocessing, tokenizer and prompt are the runtime's for both sides. Tokens whose scores are
closer than the noise may be selected otherwise in the chain; from there on it is held against the reference on the
same selection.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.parity import CHAIN, REFERENCE, Row, Tolerance, greedy_row, selection_row, tolerance_of, value_row
from export.evidence import Case
from export.reference import Reference
from runtime.answer import Stopwatch
from runtime.backend import Array
from runtime.batches import whole_groups
from runtime.embedding import prompt_rows
from runtime.engine import VideoQA
from runtime.errors import OptionError
from runtime.positions import next_positions
from runtime.preprocess import vision_feeds
from runtime.seen import visuals_of_frames, visuals_of_images
from runtime.text import Prompt, Visuals
from runtime.video import FrameChoice, open_source
from runtime.video.images import picture
from runtime.video.source import Frame, VideoLike

__all__ = ["Comparer", "moving_shapes"]

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
Feeds = dict[str, Floats]


@dataclass(frozen=True)
class Subject:
    """What a question is about.

    Attributes:
        count: frames or pictures.
        feeds: inputs of the vision stage, in whole groups of frames.
    """

    name: str
    count: int
    feeds: Feeds
    visuals: Visuals


@dataclass(frozen=True)
class Sides:
    """One value on its way.

    Attributes:
        expected: the reference's.
        chain: the bundle's.
        twin: the reference's on the bundle's selection; ``expected`` itself where both selected the same.
    """

    expected: Floats
    chain: Floats
    twin: Floats


@dataclass(frozen=True)
class Comparer:
    """A bundle, its reference, and how close they have to be: ``tolerance``, or what each stage's dtype allows."""

    qa: VideoQA
    reference: Reference
    tolerance: Tolerance | None
    count: int

    def case(self, video: VideoLike, question: str, frames: int | None) -> Case:
        """Run one question about a video on both sides.

        Raises:
            VideoError, QuestionError, OptionError: as for asking.
        """
        self.qa.prompts.check(question)
        with open_source(video) as opened:
            indices = self.qa.choose_frames(video, opened.timestamps, FrameChoice(frames=frames))
            feeds = self.feeds(opened.frames(indices))
        manifest, count = self.qa.bundle.manifest, len(indices)
        name = Path(video).name if isinstance(video, str) else "moving shapes"
        feeds = filled_up(feeds, manifest.frames.group)
        return self.compared(Subject(name, count, feeds, visuals_of_frames(count, manifest)), question)

    def pictures(self, images: Sequence[str], question: str) -> Case:
        """Run one question about all of ``images``, which LinVT does not see; errors as for a video."""
        self.qa.prompts.check(question)
        manifest, count = self.qa.bundle.manifest, len(images)
        feeds = self.feeds(frame for image in images for frame in [picture(image)] * manifest.frames.group)
        name = ", ".join(Path(image).name for image in images)
        return self.compared(Subject(name, count, feeds, visuals_of_images(count, manifest)), question)

    def feeds(self, frames: Iterable[Frame]) -> Feeds:
        """Frames as the bundle would take them, as inputs of the vision stage."""
        single = [vision_feeds([frame], self.qa.bundle.manifest.preprocess) for frame in frames]
        return {name: np.concatenate([feeds[name] for feeds in single]) for name in single[0]}

    def compared(self, subject: Subject, question: str) -> Case:
        """All rows of one question."""
        prompt = self.qa.prompt(question, subject.visuals)
        if len(prompt.input_ids) + self.count > self.qa.backend.limits.tokens:
            raise OptionError(
                f"--tokens {self.count} after a prompt of {len(prompt.input_ids)} tokens do not fit into the context "
                f"of {self.qa.backend.limits.tokens}; compare fewer"
            )
        rows: list[Row] = []
        visual = self.seen(subject.feeds, rows)
        condensed = self.reference.linvt is not None and subject.visuals.kind == "video"
        if condensed:
            visual = self.refined(visual, rows)
        else:
            expected, chain = (tokens.reshape(1, -1, tokens.shape[-1]) for tokens in (visual.expected, visual.chain))
            visual = Sides(expected, chain, expected)
        self.look_up(prompt, rows)
        if condensed:
            visual = self.aggregated(visual, prompt.text_ids, rows)
        answers = self.answered(self.spliced(visual, prompt, rows), prompt.position_ids, rows)
        return Case(subject.name, subject.visuals.kind, question, subject.count, *answers, tuple(rows))

    def row(self, stage: str, value: str, scope: str, found: Floats, reference: Floats) -> Row:
        """A value held against the reference's."""
        return value_row(stage, value, scope, found, reference, self.allowed(stage, scope))

    def allowed(self, stage: str, scope: str) -> Tolerance:
        """How far a stage may be away."""
        if self.tolerance:
            return self.tolerance
        return tolerance_of(self.qa.bundle.manifest.stages, stage, scope)

    def seen(self, feeds: Feeds, rows: list[Row]) -> Sides:
        """Frame tokens (1, T, N, D)."""
        expected, found = self.reference.vision(feeds), self.vision(feeds)
        rows.append(self.row("vision", "tokens", REFERENCE, found, expected))
        return Sides(expected, found, expected)

    def refined(self, tokens: Sides, rows: list[Row]) -> Sides:
        """SVR: scores, what was selected, and the pooled values (1, M, D) for the bundle's own selection."""
        reference = self.reference.refine(tokens.expected)
        assert self.reference.linvt
        ordered = self.reference.linvt.config.order == "position"
        for scope, fed in ((REFERENCE, tokens.expected), (CHAIN, tokens.chain)):
            found = self.graph("refine", tokens=fed)
            allowed = self.allowed("refine", scope)
            chosen, best, scores = found["indices"][0], reference.indices[0], reference.scores[0]
            twin = reference.visual
            if not np.array_equal(chosen, best):
                twin = self.reference.pool_at(tokens.expected, found["indices"])
            rows += [
                self.row("refine", "scores", scope, found["scores"], reference.scores),
                selection_row(scope, chosen, best, scores, allowed, in_video_order=ordered),
                self.row("refine", "visual", scope, found["visual"], twin),
            ]
        return Sides(reference.visual, found["visual"], twin)

    def look_up(self, prompt: Prompt, rows: list[Row]) -> None:
        """The text's rows of the embedding table."""
        ids = np.delete(prompt.table_rows, prompt.visual_positions)
        rows.append(self.row("embedding", "rows", REFERENCE, self.qa.table.rows(ids), self.reference.embed(ids)))

    def aggregated(self, visual: Sides, text_ids: Ids, rows: list[Row]) -> Sides:
        """TTA: (1, M, D) of each side -> (1, Q, D)."""
        text = self.reference.embed(text_ids)[None]
        expected = twin = self.reference.aggregate(visual.expected, text)
        if visual.twin is not visual.expected:
            twin = self.reference.aggregate(visual.twin, text)
        own = self.graph("aggregate", visual=visual.expected, text=text)["tokens"]
        chain = self.graph("aggregate", visual=visual.chain, text=self.qa.table.rows(text_ids)[None])["tokens"]
        rows.append(self.row("aggregate", "tokens", REFERENCE, own, expected))
        rows.append(self.row("aggregate", "tokens", CHAIN, chain, twin))
        return Sides(expected, chain, twin)

    def spliced(self, visual: Sides, prompt: Prompt, rows: list[Row]) -> Sides:
        """The prompt's rows (S, D) with visual ones (1, Q, D) in their places."""
        spec = self.qa.bundle.manifest.prompt
        expected = twin = prompt_rows(self.reference.embed, prompt, spec, visual.expected[0])
        if visual.twin is not visual.expected:
            twin = prompt_rows(self.reference.embed, prompt, spec, visual.twin[0])
        chain = prompt_rows(self.qa.table.rows, prompt, spec, visual.chain[0])
        rows.append(self.row("decode", "inputs_embeds", CHAIN, chain, twin))
        return Sides(expected, chain, twin)

    def answered(self, embeds: Sides, position_ids: Ids, rows: list[Row]) -> tuple[str, str]:
        """The LLM: logits after the prompt, and greedy answers; returns the bundle's answer and the reference's."""
        first = wanted, steps = self.reference.greedy(embeds.expected, position_ids, self.count)
        for scope, fed in ((REFERENCE, embeds.expected), (CHAIN, embeds.chain)):
            if scope == CHAIN and embeds.twin is not embeds.expected:
                wanted, steps = self.reference.greedy(embeds.twin, position_ids, self.count)
            logits, found = self.greedy(fed, position_ids)
            limit = 2 * self.allowed("decode", scope).limit(steps[0])
            rows.append(self.row("decode", "logits", scope, logits, steps[0]))
            rows.append(greedy_row(scope, found, wanted, steps, limit))
        decode = self.qa.prompts.tokenizer.decode
        return decode(found), decode(first[0])

    def greedy(self, embeds: Floats, position_ids: Ids) -> tuple[Floats, list[int]]:
        """The bundle's logits after the prompt, and its greedy tokens."""
        decoder = self.qa.backend.decoder(len(embeds) + self.count)
        first = logits = decoder.step(embeds, position_ids)
        position = next_positions(position_ids)
        ids = [int(logits.argmax())]
        while len(ids) < self.count:
            logits = decoder.step(self.qa.table.rows(np.array(ids[-1:])), position)
            ids.append(int(logits.argmax()))
            position += 1
        return first, ids

    def vision(self, feeds: Feeds) -> Floats:
        """The bundle's frame tokens (1, T, N, D), in the runtime's batches."""
        group = self.qa.bundle.manifest.frames.group
        size = whole_groups(self.qa.backend.limits.batch, group)
        starts = range(0, len(feeds["pixel_values"]), size)
        batches = [{name: value[at : at + size] for name, value in feeds.items()} for at in starts]
        return np.concatenate([self.graph("vision", **batch)["tokens"] for batch in batches])[None]

    def graph(self, stage: str, **feeds: Array) -> dict[str, Array]:
        """Run one of the bundle's graphs."""
        return {name: np.asarray(value) for name, value in self.qa.run(stage, feeds, Stopwatch()).items()}


def filled_up(feeds: Feeds, group: int) -> Feeds:
    """Whole groups of frames: the last one is repeated."""
    missing = -len(feeds["pixel_values"]) % group
    return {name: np.concatenate([value, *[value[-1:]] * missing]) for name, value in feeds.items()}


def moving_shapes(frames: int, seed: int) -> NDArray[np.uint8]:
    """A seeded clip (T, 96, 128, 3): coloured discs over a gradient, each with its own speed, and noise."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:96, 0:128]
    clip = np.stack([np.stack([rows, columns, rows + columns], -1)] * frames).astype(np.float64)
    centre, speed = random.uniform(20, 76, (4, 2)), random.uniform(-6, 6, (4, 2))
    colours = random.uniform(0, 255, (4, 3))
    for index, frame in enumerate(clip):
        for (row, column), colour in zip(centre + index * speed, colours, strict=True):
            frame[(rows - row % 96) ** 2 + (columns - column % 128) ** 2 < 150] = colour
    return (clip + random.normal(0, 8, clip.shape)).clip(0, 255).astype(np.uint8)
