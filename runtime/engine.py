"""``VideoQA``: a bundle that answers questions about videos.

The video's way: frames -> pixel values -> vision -> SVR, kept in a ``Video``; pictures go as far as vision and are kept
in ``Images``. The question's way: tokens -> LinVT's aggregation -> rows in the prompt -> prefill -> one token after the
other. A second question about the same takes the second way only.

Knows no inference library (``backend``), no container format (``video``) and no command line (``run``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from runtime.answer import Answer, FinishReason, Progress, Stopwatch, Stream
from runtime.backend import Array, Backend, BackendName, open_backend
from runtime.bundle import Bundle
from runtime.detokenize import Detokenizer
from runtime.embedding import EmbeddingTable, prompt_rows
from runtime.errors import BackendError, BundleError, OptionError, QuestionError
from runtime.options import GenerationOptions, Sampling
from runtime.positions import next_positions
from runtime.preprocess import vision_feeds
from runtime.sample import Sampler
from runtime.seen import Images, Seen, Video, visuals_of
from runtime.text import Prompt, PromptBuilder, Turn, Visuals
from runtime.video import FrameChoice, choose, open_source
from runtime.video.images import picture
from runtime.video.source import ImageLike, VideoLike

__all__ = ["Images", "Video", "VideoQA"]

FRAME_BATCH = 4  # frames decoded, resized and sent through vision together


class VideoQA:
    """An opened bundle. Use it as a context manager, or call ``close``.

    Several answers may be streamed in turns, each has its own KV cache. Calls from several threads at a time are not
    supported: open the bundle once per thread, or lock.
    """

    def __init__(self, bundle: Bundle, backend: Backend, prompts: PromptBuilder, table: EmbeddingTable) -> None:
        self.bundle = bundle
        self.backend = backend
        self.prompts = prompts
        self.table = table
        self.closed = False

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str],
        *,
        backend: BackendName = "auto",
        threads: int | None = None,
        verify: bool = False,
    ) -> VideoQA:
        """Open the bundle at a path; "demo" names the one that ships with the package.

        Args:
            bundle: the bundle's folder.
            backend: "cpu", "cuda", or "auto" for the best one present.
            threads: compute threads on the CPU; None takes one per core.
            verify: hash all files again even if they were found good before.

        Raises:
            BundleError: not a bundle, or a damaged one.
            BackendError: the backend is not available.
            OptionError: ``threads`` is out of range.
        """
        checked = Bundle.open(bundle, verify=verify)
        return cls.over(checked, open_backend(checked, backend, threads=threads))

    @classmethod
    def over(cls, checked: Bundle, backend: Backend) -> VideoQA:
        """A checked bundle that answers through a backend over it.

        Raises:
            BundleError: its tokenizer, template or embedding table is damaged.
        """
        template = read_text(checked.path("chat_template.jinja"))
        manifest = checked.manifest
        prompts = PromptBuilder(checked.path("tokenizer.json"), template, manifest.prompt, manifest.positions)
        table = EmbeddingTable.open(checked.path("embedding.safetensors"))
        check_table(table, checked)
        return cls(checked, backend, prompts, table)

    def __enter__(self) -> VideoQA:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the graphs; the object cannot be used afterwards. A second call does nothing."""
        self.closed = True
        self.backend.close()

    def check_open(self) -> None:
        """Refuse what comes after ``close``."""
        if self.closed:
            raise BackendError("this VideoQA is closed; open the bundle again")

    def video(
        self,
        source: VideoLike,
        *,
        frames: int | None = None,
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
    ) -> Video:
        """Read a video once, for any number of questions.

        Args:
            source: a file that PyAV opens, its bytes, a folder of images, or frames (T, H, W, 3) uint8 RGB,
                which are all used unless a choice is given.
            frames: how many frames to take, from the middle of as many equal segments.
            fps: take this many frames a second instead.
            start: seconds into the video at which to begin.
            end: seconds into the video at which to end.

        Raises:
            VideoError: the source cannot be read.
            OptionError: a number outside what the bundle or the video allows.
        """
        self.check_open()
        watch = Stopwatch()
        choice = FrameChoice(frames=frames, fps=fps, start=start, end=end)
        with watch("decode_video"), open_source(source) as opened:
            indices = self.choose_frames(source, opened.timestamps, choice)
            timestamps = opened.timestamps[indices]
            tokens = self.frame_tokens(opened.frames(indices), len(indices), watch)
        return Video(
            timestamps=timestamps,
            features=self.refine(tokens, watch),
            milliseconds=watch.milliseconds,
            bundle=self.bundle.identity,
        )

    def images(self, images: ImageLike | Sequence[ImageLike]) -> Images:
        """Look at one picture or several, for any number of questions; LinVT is not asked.

        Each picture goes through the vision encoder once, at the size it has for a frame.

        Args:
            images: files, their bytes, or (H, W, 3) uint8 RGB arrays.

        Raises:
            VideoError: a picture cannot be read.
            OptionError: no picture at all.
        """
        self.check_open()
        watch = Stopwatch()
        single = isinstance(images, str | os.PathLike | bytes | np.ndarray)
        pictures: Sequence[ImageLike] = [images] if single else list(images)  # type: ignore[list-item, arg-type]
        if not pictures:
            raise OptionError("no picture was given; give at least one")
        group = self.bundle.manifest.frames.group
        with watch("decode_images"):
            frames = (frame for image in pictures for frame in [picture(image)] * group)
            tokens = self.frame_tokens(frames, len(pictures) * group, watch)
        return Images(
            count=len(pictures),
            features=tokens.reshape(1, -1, tokens.shape[-1]),
            milliseconds=watch.milliseconds,
            bundle=self.bundle.identity,
        )

    def choose_frames(
        self, source: VideoLike, timestamps: NDArray[np.float64], choice: FrameChoice
    ) -> NDArray[np.int64]:
        """Indices of the frames to take; an array that fits is taken whole: its owner chose the frames."""
        spec, count = self.bundle.manifest.frames, len(timestamps)
        fits = spec.minimum <= count and (count <= spec.maximum or self.bundle.manifest.linvt is None)
        if isinstance(source, np.ndarray) and choice == FrameChoice() and fits:
            return np.arange(count)
        return choose(timestamps, choice, minimum=spec.minimum, default=spec.default, maximum=spec.maximum)

    def frame_tokens(self, frames: Iterable[NDArray[np.uint8]], count: int, watch: Stopwatch) -> NDArray[np.float32]:
        """Frames, one batch in memory at a time -> tokens (1, T, N, D), a set for every group of frames."""
        manifest = self.bundle.manifest
        spec = manifest.frames
        tokens = np.empty((1, spec.sets(count), spec.tokens, manifest.width), np.float32)
        for start, batch in batches(frames, spec.group):
            with watch("preprocess"):
                feeds = vision_feeds(batch, manifest.preprocess)
            outputs = self.run("vision", feeds, watch)
            tokens[0, start : start + len(batch) // spec.group] = outputs["tokens"]
        return tokens

    def refine(self, tokens: NDArray[np.float32], watch: Stopwatch) -> NDArray[np.float32]:
        """Frame tokens (1, T, N, D) -> the features a ``Video`` keeps."""
        if self.bundle.manifest.linvt is None:
            return tokens.reshape(1, -1, tokens.shape[-1])
        visual: NDArray[np.float32] = self.run("refine", {"tokens": tokens}, watch)["visual"]
        return visual

    def run(self, stage: str, feeds: dict[str, Array], watch: Stopwatch) -> dict[str, Array]:
        """Run one graph; loading it, the first time, counts for itself."""
        with watch("load"):
            graph = self.backend.graph(stage)
        with watch(stage):
            return graph.run(feeds)

    def ask(
        self,
        seen: Seen | VideoLike,
        question: str,
        options: GenerationOptions | None = None,
        *,
        system: str | None = None,
        history: Sequence[Turn] = (),
    ) -> Answer:
        """Answer a question; arguments and errors are those of ``video`` and ``stream``."""
        return self.stream(seen, question, options, system=system, history=history).answer

    def stream(
        self,
        seen: Seen | VideoLike,
        question: str,
        options: GenerationOptions | None = None,
        *,
        system: str | None = None,
        history: Sequence[Turn] = (),
    ) -> Stream:
        """Answer a question piece by piece.

        Args:
            seen: from ``video`` or ``images``, or what ``video`` takes as its source.
            question: plain text.
            options: how to generate; the bundle's defaults hold for what is None.
            system: in place of the model's own system text.
            history: earlier questions about the same and their answers, oldest first.

        Returns:
            An iterator of text pieces that never cut a character; its ``answer`` is whole after the last piece.

        Raises:
            QuestionError: empty, too long for the context, or holding control tokens.
            OptionError: an option out of range, or a ``Video`` of another bundle.
        """
        self.check_open()
        sampling = (options or GenerationOptions()).resolve(self.bundle.manifest.generation)
        self.prompts.check(question, system=system, history=history)
        watch = Stopwatch()
        if not isinstance(seen, Seen):
            seen = self.video(seen)
            watch = Stopwatch(dict(seen.milliseconds))
        if seen.bundle != self.bundle.identity:
            raise OptionError("this Video was made with another bundle; make it again with this one's video()")
        with watch("prompt"):
            prompt = self.prompt(question, visuals_of(seen, self.bundle.manifest), system=system, history=history)
        progress = Progress([])
        pieces = self.generate(prompt, seen, sampling, watch, progress)
        return Stream(pieces, progress, lambda text, done: finished(text, done, prompt, seen, watch))

    def prompt(
        self, question: str, visuals: Visuals, *, system: str | None = None, history: Sequence[Turn] = ()
    ) -> Prompt:
        """Tokenise a question about what was seen; it must leave room for an answer in the context."""
        context = self.bundle.manifest.context
        prompt = self.prompts.build(question, visuals, system=system, history=history)
        length = len(prompt.input_ids)
        if length >= context:
            fewer = {"image": " or take fewer pictures", "video": " or take fewer frames"}[visuals.kind]
            raise QuestionError(
                f"question and {visuals.kind} make {length} tokens, the model's context holds {context} with the "
                f"answer; shorten the question{fewer if visuals.on_grid else ''}"
            )
        return prompt

    def generate(
        self, prompt: Prompt, seen: Seen, sampling: Sampling, watch: Stopwatch, progress: Progress
    ) -> Iterator[str]:
        """Prefill, then one token after the other until a stop token, the limit or the context's end."""
        length = len(prompt.input_ids)
        limit = min(sampling.max_new_tokens, self.bundle.manifest.context - length)
        stops = () if sampling.ignore_eos else self.bundle.manifest.prompt.stop_ids
        sampler, text = Sampler(sampling), Detokenizer(self.prompts.tokenizer)
        with watch("prompt"):
            visual = self.visual_rows(prompt, seen, watch)
            embeds = prompt_rows(self.table.rows, prompt, self.bundle.manifest.prompt, visual)
        with watch("load"):
            decoder = self.backend.decoder(length + limit)
        with watch("prefill"):
            token = sampler.next(decoder.step(embeds, prompt.position_ids))
        position = next_positions(prompt.position_ids)
        progress.first_token_ms = sum(watch.milliseconds.values())
        reason: FinishReason = "length"
        while True:
            if token in stops:
                reason = "stop"
                break
            progress.token_ids.append(token)
            if piece := text.push(token):
                yield piece
            if len(progress.token_ids) == limit:
                break
            self.check_open()
            with watch("decode"):
                token = sampler.next(decoder.step(self.table.rows(np.array([token])), position))
            position += 1
        if piece := text.flush():
            yield piece
        progress.finish_reason = reason

    def visual_rows(self, prompt: Prompt, seen: Seen, watch: Stopwatch) -> NDArray[np.float32]:
        """What the LLM sees: (Q, D) of a video with LinVT, (sets * N, D) otherwise."""
        if isinstance(seen, Images) or self.bundle.manifest.linvt is None:
            kept: NDArray[np.float32] = seen.features[0]
            return kept
        feeds = {"visual": seen.features, "text": self.table.rows(prompt.text_ids)[None]}
        tokens: NDArray[np.float32] = self.run("aggregate", feeds, watch)["tokens"][0]
        return tokens


def batches(frames: Iterable[NDArray[np.uint8]], group: int) -> Iterator[tuple[int, list[NDArray[np.uint8]]]]:
    """Whole groups of frames, about ``FRAME_BATCH`` frames at a time, each with the number of its first group.

    The last frame is repeated where it ends an incomplete group.
    """
    size = group * max(1, FRAME_BATCH // group)
    rest = iter(frames)
    start = 0
    while batch := list(islice(rest, size)):
        batch += [batch[-1]] * (-len(batch) % group)
        yield start, batch
        start += len(batch) // group


def finished(text: str, progress: Progress, prompt: Prompt, seen: Seen, watch: Stopwatch) -> Answer:
    """Put an answer together."""
    assert progress.finish_reason is not None
    after_first = len(progress.token_ids) - 1 + (progress.finish_reason == "stop")
    seconds = watch.milliseconds.get("decode", 0.0) / 1000
    return Answer(
        text=text.strip(),
        token_ids=tuple(progress.token_ids),
        finish_reason=progress.finish_reason,
        prompt_tokens=len(prompt.input_ids),
        frame_timestamps=tuple(seen.timestamps.tolist()) if isinstance(seen, Video) else (),
        milliseconds=dict(watch.milliseconds),
        first_token_ms=progress.first_token_ms,
        tokens_per_second=after_first / seconds if seconds else 0.0,
    )


def check_table(table: EmbeddingTable, bundle: Bundle) -> None:
    """Every token the LLM can produce has a row, of the LLM's width."""
    manifest = bundle.manifest
    logits = next(spec for spec in manifest.stages["decode"].outputs if spec.name == "logits")
    vocabulary = logits.shape[-1]
    if table.width != manifest.width or (isinstance(vocabulary, int) and table.vocabulary < vocabulary):
        raise BundleError(
            f"{bundle.folder}: embedding.safetensors is ({table.vocabulary}, {table.width}), bundle.json says "
            f"({vocabulary}, {manifest.width}); the files do not belong together, export the bundle again"
        )


def read_text(path: Path) -> str:
    """A text file of the bundle."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not readable as text: {error}; export the bundle again") from error
