"""One video and one question through the bundle and through PyTorch, stage by stage.

Every stage runs twice: fed by the reference's values (its own error), and in a chain from the frames on (the error that
accumulates). Frames, preprocessing, tokenizer and prompt are the runtime's for both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.evidence import Case
from export.parity import Row, Tolerance, greedy_row, selection_row, value_row
from export.reference import Reference
from runtime.answer import Stopwatch
from runtime.backend import Array
from runtime.engine import FRAME_BATCH, VideoQA
from runtime.errors import OptionError
from runtime.preprocess import pixel_values_from_frames
from runtime.text import Prompt
from runtime.video import FrameChoice, open_source
from runtime.video.source import VideoLike

__all__ = ["Comparer", "moving_shapes"]

Floats = NDArray[np.float32]

REFERENCE, CHAIN = "reference", "chain"


@dataclass(frozen=True)
class Seen:
    """Frame tokens (1, T, N, D) and what is kept of them (1, M, D), on one side."""

    tokens: Floats
    features: Floats


@dataclass(frozen=True)
class Comparer:
    """A bundle, its reference, and how close they have to be."""

    qa: VideoQA
    reference: Reference
    tolerance: Tolerance
    count: int

    def case(self, video: VideoLike, question: str, frames: int | None) -> Case:
        """Run one video and one question on both sides.

        Raises:
            VideoError, QuestionError, OptionError: as for asking.
        """
        self.qa.prompts.check(question)
        pixel_values = self.pixel_values(video, frames)
        prompt = self.qa.prompt(question, len(pixel_values))
        if len(prompt.input_ids) + self.count > self.qa.bundle.manifest.context:
            raise OptionError(
                f"--tokens {self.count} after a prompt of {len(prompt.input_ids)} tokens do not fit into the context "
                f"of {self.qa.bundle.manifest.context}; compare fewer"
            )
        expected, rows = self.see(pixel_values)
        chain = Seen(found := self.vision(pixel_values), self.features(found))
        if self.reference.linvt:
            rows += self.refine_rows(expected, chain)
        embeds = self.embed(prompt, expected, rows, chain)
        answers = self.answer_rows(embeds, rows)
        name = Path(video).name if isinstance(video, str) else "moving shapes"
        return Case(name, question, len(pixel_values), *answers, tuple(rows))

    def pixel_values(self, video: VideoLike, frames: int | None) -> Floats:
        """The frames the bundle would take of ``video`` -> (T, 3, H, W)."""
        with open_source(video) as opened:
            indices = self.qa.choose_frames(video, opened.timestamps, FrameChoice(frames=frames))
            preprocess = self.qa.bundle.manifest.preprocess
            batches = [pixel_values_from_frames([frame], preprocess) for frame in opened.frames(indices)]
        return np.concatenate(batches)

    def see(self, pixel_values: Floats) -> tuple[Seen, list[Row]]:
        """The reference's view of the frames, and how far the bundle's vision is from it."""
        tokens = self.reference.vision(pixel_values)
        features = (
            self.reference.refine(tokens).visual if self.reference.linvt else tokens.reshape(1, -1, tokens.shape[-1])
        )
        rows = [value_row("vision", "tokens", REFERENCE, self.vision(pixel_values), tokens, self.tolerance)]
        return Seen(tokens, features), rows

    def refine_rows(self, expected: Seen, chain: Seen) -> list[Row]:
        """SVR: scores, what was selected, and the pooled values for the bundle's own selection."""
        reference = self.reference.refine(expected.tokens)
        rows: list[Row] = []
        assert self.reference.linvt
        for scope, tokens in ((REFERENCE, expected.tokens), (CHAIN, chain.tokens)):
            found = self.graph("refine", tokens=tokens)
            pooled = self.reference.pool_at(expected.tokens, found["indices"])
            rows += [
                value_row("refine", "scores", scope, found["scores"], reference.scores, self.tolerance),
                selection_row(
                    scope,
                    found["indices"][0],
                    reference.indices[0],
                    reference.scores[0],
                    self.tolerance,
                    in_video_order=self.reference.linvt.config.order == "position",
                ),
                value_row("refine", "visual", scope, found["visual"], pooled, self.tolerance),
            ]
        return rows

    def embed(self, prompt: Prompt, expected: Seen, rows: list[Row], chain: Seen) -> tuple[Floats, Floats]:
        """The prompt's rows (S, D) as the reference and as the bundle's chain make them."""
        ids = prompt.input_ids.copy()
        ids[prompt.visual_positions] = 0
        embeds = self.reference.embed(ids), self.qa.table.rows(ids)
        rows.append(value_row("embedding", "rows", REFERENCE, embeds[1], embeds[0], self.tolerance))
        sides = [expected.features[0], chain.features[0]]
        if self.reference.linvt:
            text = self.reference.embed(prompt.text_ids)
            wanted = self.reference.aggregate(expected.features, text[None])
            own = self.graph("aggregate", visual=expected.features, text=text[None])["tokens"]
            rows.append(value_row("aggregate", "tokens", REFERENCE, own, wanted, self.tolerance))
            chained = self.graph("aggregate", visual=chain.features, text=self.qa.table.rows(prompt.text_ids)[None])[
                "tokens"
            ]
            rows.append(value_row("aggregate", "tokens", CHAIN, chained, wanted, self.tolerance))
            sides = [wanted[0], chained[0]]
        for rows_of_side, visual in zip(embeds, sides, strict=True):
            rows_of_side[prompt.visual_positions] = visual
        rows.append(value_row("decode", "inputs_embeds", CHAIN, embeds[1], embeds[0], self.tolerance))
        return embeds

    def answer_rows(self, embeds: tuple[Floats, Floats], rows: list[Row]) -> tuple[str, str]:
        """The LLM: logits after the prompt, and greedy answers; returns the bundle's answer and the reference's."""
        logits = self.reference.logits(embeds[0])
        wanted, steps = self.reference.greedy(embeds[0], self.count)
        for scope, side in zip((REFERENCE, CHAIN), embeds, strict=True):
            first, found = self.greedy(side)
            rows.append(value_row("decode", "logits", scope, first, logits, self.tolerance))
            rows.append(greedy_row(scope, found, wanted, steps, 2 * self.tolerance.limit(logits)))
        decode = self.qa.prompts.tokenizer.decode
        return decode(found), decode(wanted)

    def greedy(self, embeds: Floats) -> tuple[Floats, list[int]]:
        """The bundle's logits after the prompt, and its greedy tokens."""
        decoder = self.qa.backend.decoder(len(embeds) + self.count)
        first = logits = decoder.step(embeds)
        ids = [int(logits.argmax())]
        while len(ids) < self.count:
            logits = decoder.step(self.qa.table.rows(np.array(ids[-1:])))
            ids.append(int(logits.argmax()))
        return first, ids

    def vision(self, pixel_values: Floats) -> Floats:
        """The bundle's frame tokens (1, T, N, D), in the runtime's batches."""
        batches = range(0, len(pixel_values), FRAME_BATCH)
        tokens = [self.graph("vision", pixel_values=pixel_values[at : at + FRAME_BATCH])["tokens"] for at in batches]
        return np.concatenate(tokens)[None]

    def features(self, tokens: Floats) -> Floats:
        """What the bundle keeps of its frame tokens."""
        return self.qa.refine(tokens, Stopwatch())

    def graph(self, stage: str, **feeds: Array) -> dict[str, Array]:
        """Run one of the bundle's graphs."""
        return self.qa.run(stage, feeds, Stopwatch())


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
