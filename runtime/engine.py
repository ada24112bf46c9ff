"""``VideoQA``: a bundle that answers questions about videos.

The video's way: frames -> pixel values -> vision -> SVR, kept in a ``Video``; pictures go as far as vision and are kept
in ``Images``. The question's way: tokens -> LinVT's aggregation -> rows in the prompt -> prefill -> one token after the
other. A second question about the same takes the second way only.

Knows no inference library (``backend``), no container format (``video``) and no command line (``run``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from runtime.answer import Answer, FinishReason, Progress, Stopwatch, Stream
from runtime.backend import Backend, Tensor, open_backend
from runtime.backend_names import BackendName
from runtime.batches import FRAME_BATCH, batches
from runtime.bundle import Bundle
from runtime.detokenize import Detokenizer
from runtime.embedding import EmbeddingTable, prompt_rows
from runtime.errors import BackendError, OptionError, QuestionError
from runtime.limits import REBUILD, check_frames, check_text
from runtime.options import GenerationOptions, Sampling
from runtime.positions import next_positions
from runtime.preprocess import vision_feeds
from runtime.sample import Sampler
from runtime.seen import Images, Seen, Video, visuals_of
from runtime.text import Prompt, PromptBuilder, Turn, Visuals
from runtime.video import FrameChoice, choose, open_source
from runtime.video.images import picture
from runtime.video.source import ImageLike, VideoLike
from runtime.words import open_words

__all__ = ["FRAME_BATCH", "Images", "Video", "VideoQA"]


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
        low_memory: bool = False,
        cuda_graph: bool = False,
    ) -> VideoQA:
        """Open the bundle at a path; "demo" names the one that ships with the package.

        Args:
            bundle: the bundle's folder.
            backend: "cpu", "cuda", "tensorrt", or "auto" for the best one present.
            threads: compute threads on the CPU; None takes one per core.
            verify: hash all files again even if they were found good before.
            low_memory: hold one TensorRT engine at a time.
            cuda_graph: decode as a CUDA graph; TensorRT does so anyway.

        Raises:
            BundleError: not a bundle, or a damaged one.
            BackendError: the backend is not available.
            DependencyError: TensorRT was asked for and is not installed.
            OptionError: ``threads`` is out of range, or an option means nothing to the backend.
        """
        checked = Bundle.open(bundle, verify=verify)
        opened = open_backend(
            checked, backend, threads=threads, low_memory=low_memory, cuda_graph=cuda_graph, verify=verify
        )
        return cls.over(checked, opened)

    @classmethod
    def over(cls, checked: Bundle, backend: Backend) -> VideoQA:
        """A checked bundle that answers through a backend over it.

        Raises:
            BundleError: its tokenizer, template or embedding table is damaged.
        """
        return cls(checked, backend, *open_words(checked))

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
        manifest, limits, count = self.bundle.manifest, self.backend.limits, len(timestamps)
        spec = manifest.frames
        minimum = max(spec.minimum, min(limits.least_frames, spec.maximum))
        fits = minimum <= count and (count <= spec.maximum or manifest.linvt is None)
        if isinstance(source, np.ndarray) and choice == FrameChoice() and fits:
            indices = np.arange(count)
        else:
            default = max(minimum, min(spec.default, limits.frames))
            indices = choose(timestamps, choice, minimum=minimum, default=default, maximum=spec.maximum)
        check_frames(len(indices), limits, manifest)
        return indices

    def frame_tokens(self, frames: Iterable[NDArray[np.uint8]], count: int, watch: Stopwatch) -> Tensor:
        """Frames, one batch in memory at a time -> tokens (1, T, N, D) f32, a set for every group of frames.

        A device encodes a batch while the next one is decoded; what it takes longer counts for vision.
        """
        manifest, limits = self.bundle.manifest, self.backend.limits
        spec = manifest.frames
        sets, filled = spec.sets(count), max(0, limits.least_batch // spec.group - 1)
        tokens = self.backend.empty((sets + filled, spec.tokens, manifest.width))
        for start, batch in batches(frames, spec.group, limits.batch, limits.least_batch):
            with watch("preprocess"):
                feeds = vision_feeds(batch, manifest.preprocess)
            self.run("vision", feeds, watch, {"tokens": tokens[start : start + len(batch) // spec.group]})
        with watch("vision"):
            self.backend.finish()
        return tokens[:sets].reshape(1, sets, spec.tokens, manifest.width)

    def refine(self, tokens: Tensor, watch: Stopwatch) -> Tensor:
        """Frame tokens (1, T, N, D) -> the features a ``Video`` keeps."""
        if self.bundle.manifest.linvt is None:
            return tokens.reshape(1, -1, tokens.shape[-1])
        visual = self.run("refine", {"tokens": tokens}, watch)["visual"]
        with watch("refine"):
            self.backend.finish()
        return visual

    def run(
        self, stage: str, feeds: Mapping[str, Tensor], watch: Stopwatch, outputs: Mapping[str, Tensor] | None = None
    ) -> Mapping[str, Tensor]:
        """Run one graph; loading it, the first time, counts for itself."""
        with watch("load"):
            graph = self.backend.graph(stage)
        with watch(stage):
            return graph.run(feeds, outputs)

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
            self.check_text(question)
            seen = self.video(seen)
            watch = Stopwatch(dict(seen.milliseconds))
        if seen.bundle != self.bundle.identity:
            raise OptionError("this Video was made with another bundle; make it again with this one's video()")
        with watch("prompt"):
            prompt = self.prompt(question, visuals_of(seen, self.bundle.manifest), system=system, history=history)
        progress = Progress([])
        pieces = self.generate(prompt, seen, sampling, watch, progress)
        return Stream(pieces, progress, lambda text, done: finished(text, done, prompt, seen, watch))

    def check_text(self, question: str) -> None:
        """Refuse a question that LinVT's engine would not take, before its video is looked at.

        Raises:
            QuestionError: it is too long.
        """
        if self.bundle.manifest.prompt.text_input == "question":
            tokens = self.prompts.tokenizer.encode(question, add_special_tokens=False).ids
            check_text(len(tokens), self.backend.limits, self.bundle.manifest)

    def prompt(
        self, question: str, visuals: Visuals, *, system: str | None = None, history: Sequence[Turn] = ()
    ) -> Prompt:
        """Tokenise a question about what was seen; it must leave room for an answer in the context."""
        context, limits = self.bundle.manifest.context, self.backend.limits
        prompt = self.prompts.build(question, visuals, system=system, history=history)
        length = len(prompt.input_ids)
        if length >= limits.tokens:
            fewer = {"image": " or take fewer pictures", "video": " or take fewer frames"}[visuals.kind]
            holder = "the model's context holds" if limits.tokens == context else "the engines here hold"
            more = "" if limits.tokens == context else f", or {REBUILD} --max tokens={min(2 * length, context)}"
            raise QuestionError(
                f"question and {visuals.kind} make {length} tokens, {holder} {limits.tokens} with the answer; "
                f"shorten the question{fewer if visuals.on_grid else ''}{more}"
            )
        if visuals.kind == "video":
            check_text(len(prompt.text_ids), limits, self.bundle.manifest)
        return prompt

    def generate(
        self, prompt: Prompt, seen: Seen, sampling: Sampling, watch: Stopwatch, progress: Progress
    ) -> Iterator[str]:
        """Prefill, then one token after the other until a stop token, the limit or the context's end."""
        length = len(prompt.input_ids)
        limit = min(sampling.max_new_tokens, self.backend.limits.tokens - length)
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
            kept: NDArray[np.float32] = np.asarray(seen.features)[0]
            return kept
        feeds: dict[str, Tensor] = {"visual": seen.features, "text": self.table.rows(prompt.text_ids)[None]}
        found = self.run("aggregate", feeds, watch)["tokens"]
        with watch("aggregate"):
            tokens: NDArray[np.float32] = np.asarray(found)[0]
        return tokens


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
