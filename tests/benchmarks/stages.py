"""``python -m tests.benchmarks.stages [BUNDLE ...]``: milliseconds per stage, and what a second question costs.

Opens every bundle once and answers about the video a few times in turns after a warm-up; prints medians. The ratio of a
first to a second question about the same ``Video``, and that of one bundle to another, come from the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import ExitStack
from dataclasses import dataclass, field

from runtime import VideoQA
from runtime.run import SAMPLE

ROUNDS = 15
QUESTIONS = ("What is happening in this video?", "How many digits are there?")


@dataclass
class Times:
    """What was measured of one bundle, in milliseconds; ``tokens`` is the first answer's length."""

    stages: dict[str, list[float]] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)
    frames: int = 0
    tokens: int = 0

    def measure(self, qa: VideoQA, video: str) -> None:
        """One round."""
        seen = qa.video(video)
        answers = [qa.ask(seen, question) for question in QUESTIONS]
        for stage, took in (seen.milliseconds | answers[0].milliseconds).items():
            self.stages.setdefault(stage, []).append(took)
        self.first.append(sum(seen.milliseconds.values()) + answers[0].first_token_ms)
        self.second.append(answers[1].first_token_ms)
        self.frames, self.tokens = len(answers[0].frame_timestamps), len(answers[0].token_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", nargs="*", default=["demo"])
    parser.add_argument("--video", default=str(SAMPLE))
    given = parser.parse_args()
    with ExitStack() as stack:
        opened = {bundle: stack.enter_context(VideoQA.open(bundle)) for bundle in given.bundles}
        for _ in range(3):
            for qa in opened.values():
                Times().measure(qa, given.video)
        times = {bundle: Times() for bundle in opened}
        for _ in range(ROUNDS):
            for bundle, qa in opened.items():
                times[bundle].measure(qa, given.video)
    for bundle, own in times.items():
        report(bundle, own)


def report(bundle: str, times: Times) -> None:
    """Print the medians and one JSON line."""
    medians = {stage: round(statistics.median(took), 2) for stage, took in times.stages.items() if stage != "load"}
    print(bundle)
    for stage, took in medians.items():
        print(f"{stage:>14} {took:8.2f} ms")
    first, second = statistics.median(times.first), statistics.median(times.second)
    print(f"{'first_token_ms':>31} {first:8.2f} ms\n{'second_question_first_token_ms':>31} {second:8.2f} ms")
    result = {"stages_ms": medians, "first_token_ms": first, "second_question_first_token_ms": second}
    print(
        json.dumps(
            {"bundle": bundle, **result, "ratio": first / second, "frames": times.frames, "tokens": times.tokens}
        )
    )


if __name__ == "__main__":
    main()
