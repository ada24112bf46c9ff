"""One pass of the clips through the float bundle: the runtime answers, observers and a recorder look on.

Clips are decoded, sampled, resized and answered by the runtime itself. Memory does not grow with their number: of the
clips that calibrate only statistics are kept, of the few that measure their stages' inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from calibration.clips import Clip
from calibration.linears import grouped
from calibration.measure import Examples
from calibration.observe import Observer
from calibration.plan import float_graph
from calibration.questions import Questions
from calibration.scales import ClipRecord
from calibration.watch import WatchingBackend
from runtime.backend import Array
from runtime.bundle import Bundle
from runtime.engine import VideoQA
from runtime.errors import CalibrationError, QuestionError, VideoError
from runtime.options import GenerationOptions

__all__ = ["Collected", "collected", "split"]

Progress = Callable[[str], None]

QUESTIONS = 2  # asked about every clip
ANSWER = GenerationOptions(max_new_tokens=16, do_sample=False)
MEASURED_SHARE, MOST_MEASURED = 4, 4  # one clip in so many is held out for measuring, and no more than this
EXAMPLES = 8  # kept of every stage


@dataclass
class Collected:
    """What a pass leaves.

    Attributes:
        observers: by stage and activation.
        clips: those that calibrated.
        measured: names of those the examples are of.
        skipped: names of those that could not be read, with the reason; of a clip that is damaged half-way, the frames
            before count among what vision has seen.
    """

    observers: dict[str, dict[str, Observer]]
    examples: Examples = field(default_factory=lambda: Examples(EXAMPLES))
    clips: list[ClipRecord] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    asked: dict[str, None] = field(default_factory=dict)  # questions, in order

    @property
    def held_out(self) -> bool:
        """Whether no clip of the examples calibrated."""
        return not {clip.name for clip in self.clips} & set(self.measured)

    def told(self, clip: Clip, frames: int, *, record: bool) -> None:
        """A clip was played, to be measured by or to calibrate."""
        if record:
            self.measured.append(clip.name)
        else:
            self.clips.append(ClipRecord(clip.name, clip.sha256(), frames))


def split(clips: Sequence[Clip]) -> tuple[list[Clip], list[Clip]]:
    """Clips that calibrate and, evenly spread among them, clips that measure; few clips do both."""
    count = min(len(clips) // MEASURED_SHARE, MOST_MEASURED)
    if not count:
        return list(clips), list(clips[:MOST_MEASURED])
    step = len(clips) / count
    held = {int(step * (index + 0.5)) for index in range(count)}
    return (
        [clip for index, clip in enumerate(clips) if index not in held],
        [clip for index, clip in enumerate(clips) if index in held],
    )


def collected(
    bundle: Bundle,
    clips: Sequence[Clip],
    questions: Questions,
    stages: Sequence[str],
    *,
    frames: int | None,
    threads: int | None,
    progress: Progress,
    note: Progress,
) -> Collected:
    """Run all clips.

    Args:
        bundle: the float bundle.
        clips: at least one.
        questions: what is asked about them.
        stages: whose activations are observed.
        frames: taken of every clip; None for the bundle's default.
        threads: compute threads.
        progress: told which clip is on.
        note: told which clips are skipped.

    Raises:
        CalibrationError: no clip could be read, or an activation is not a finite number.
    """
    result = Collected({stage: observers_of(bundle, stage) for stage in stages})
    watcher = Watcher(result)
    taps = {stage: list(observers) for stage, observers in result.observers.items()}
    backend = WatchingBackend(bundle, taps, watcher.look, threads, watcher.done)
    with VideoQA.over(bundle, backend) as qa:

        def play(part: Sequence[Clip], *, record: bool) -> list[Clip]:
            step = "clips held out" if record else "clips"
            readable = []
            for number, clip in enumerate(part):
                progress(f"{step}: {number + 1}/{len(part)} {clip.name}")
                watcher.begin(clip, record=record)
                if seen := watcher.played(qa, clip, questions.for_clip(clip.name, number, QUESTIONS), frames, note):
                    readable.append(clip)
                    result.told(clip, seen, record=record)
            return readable

        calibrating, measuring = split(clips)
        calibrated = play(calibrating, record=False)
        held_out = play(measuring, record=True)
        if not held_out:  # what was held out could not be read
            play(calibrated[:MOST_MEASURED], record=True)
        if not calibrated:
            play(held_out, record=False)
    if not result.clips:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in [*result.skipped.items()][:1])
        raise CalibrationError(f"none of the {len(clips)} clips could be used ({reasons:.300}); give readable videos")
    return result


def observers_of(bundle: Bundle, stage: str) -> dict[str, Observer]:
    """An observer for every activation that layers of a stage read."""
    model, layers = float_graph(bundle.path(bundle.manifest.stages[stage].file))
    del model
    return {name: Observer(f"{stage}/{name}") for name in grouped(layers.values())}


class Watcher:
    """Hands what a stage computed to observers, or to the recorder."""

    def __init__(self, result: Collected) -> None:
        self.result = result
        self.clip = ""
        self.record = False

    def begin(self, clip: Clip, *, record: bool) -> None:
        """What comes next is of this clip."""
        self.clip, self.record = clip.name, record

    def look(self, stage: str, feeds: Mapping[str, Array], values: Mapping[str, Array]) -> None:
        """Activations of one run of a stage, or of a part of it."""
        if self.record:
            return
        for name, observer in self.result.observers.get(stage, {}).items():
            observer.add(feeds[name] if name in feeds else values[name])
            if observer.histogram.not_finite:
                raise CalibrationError(
                    f"{stage}: {observer.histogram.not_finite} values of {name} are not finite numbers on clip "
                    f"{self.clip}; the float bundle is damaged or leaves its range, export it again in float32"
                )

    def done(self, stage: str, feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """What one run of a stage took and gave."""
        if self.record:
            self.result.examples.look(stage, feeds, outputs)

    def played(self, qa: VideoQA, clip: Clip, questions: Sequence[str], frames: int | None, note: Progress) -> int:
        """Show a clip to the model and ask; how many frames were taken, 0 where it cannot be read."""
        try:
            video = qa.video(clip.path, frames=frames)
        except VideoError as error:
            if clip.name not in self.result.skipped:
                note(f"skipped {clip.name}: {error}")
            self.result.skipped[clip.name] = str(error)
            return 0
        for question in questions[:QUESTIONS]:
            self.result.asked[question] = None
            try:
                qa.ask(video, question, ANSWER)
            except QuestionError as error:
                raise CalibrationError(f"question {question!r:.60} about {clip.name}: {error}") from error
        return len(video.timestamps)
