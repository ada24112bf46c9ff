"""``python -m tests.benchmarks.stages [BUNDLE VIDEO]``: milliseconds per stage, and what a second question costs.

Opens the bundle once, answers about the video a few times after a warm-up, and prints medians; the ratio of a first to
a second question about the same ``Video`` comes from the same run.
"""

from __future__ import annotations

import json
import statistics
import sys

from runtime import Answer, VideoQA
from runtime.run import SAMPLE

ROUNDS = 15
QUESTIONS = ("What is happening in this video?", "How many digits are there?")


def main() -> None:
    bundle, video = sys.argv[1:3] if len(sys.argv) > 2 else ("demo", str(SAMPLE))
    stages: dict[str, list[float]] = {}
    first, second = [], []
    with VideoQA.open(bundle) as qa:
        for measured in [False] * 3 + [True] * ROUNDS:
            seen = qa.video(video)
            answers = [qa.ask(seen, question) for question in QUESTIONS]
            if not measured:
                continue
            for stage, took in (seen.milliseconds | answers[0].milliseconds).items():
                stages.setdefault(stage, []).append(took)
            first.append(sum(seen.milliseconds.values()) + answers[0].first_token_ms)
            second.append(answers[1].first_token_ms)
    report(stages, first, second, answers[0])


def report(stages: dict[str, list[float]], first: list[float], second: list[float], answer: Answer) -> None:
    """Print the medians and one JSON line."""
    medians = {stage: round(statistics.median(took), 2) for stage, took in stages.items() if stage != "load"}
    for stage, took in medians.items():
        print(f"{stage:>14} {took:8.2f} ms")
    times = {"first_token_ms": statistics.median(first), "second_question_first_token_ms": statistics.median(second)}
    for name, took in times.items():
        print(f"{name:>31} {took:8.2f} ms")
    result = {"stages_ms": medians, **times, "ratio": statistics.median(first) / statistics.median(second)}
    print(json.dumps({**result, "frames": len(answer.frame_timestamps), "tokens": len(answer.token_ids)}))


if __name__ == "__main__":
    main()
