"""Held-out accuracy of the demo model: ``python -m export.demo.evaluate BUNDLE``.

Films scenes of drawings that training never saw, encodes each as an H.264 file, and asks every kind of question about
it. Bundles answer through the runtime, all about the same videos; with ``--torch`` checkpoint folders answer through
PyTorch. Progress goes to stderr; stdout gets a table and one JSON line for each.
Does not choose between checkpoints: training does that on the validation split.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from export.demo.answer import FRAMES, Answer, Watch, watch_with_torch
from export.demo.film import FPS, cases, film
from export.demo.glyphs import Split, glyphs
from export.demo.questions import KINDS, Question
from export.demo.video import write
from runtime.cli import guarded

__all__ = ["Tally", "main", "measure"]

CLAUSES = "describe, per digit"


@dataclass
class Tally:
    """Answers to one kind of question."""

    asked: int = 0
    right: int = 0
    wrong: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, question: Question, answer: str) -> None:
        """Count one answer; letter case and a final dot do not matter."""
        self.asked += 1
        if plain(answer) == plain(question.answer):
            self.right += 1
        else:
            self.wrong.append((question.text, question.answer, answer))

    @property
    def share(self) -> float:
        """Right answers, as a share."""
        return self.right / max(self.asked, 1)


def plain(answer: str) -> str:
    """An answer as it is compared."""
    return answer.strip().rstrip(".").lower()


def measure(watches: Sequence[Watch], questions: int, split: Split = "test") -> list[dict[str, Tally]]:
    """Ask each of ``watches`` the same ``questions`` of every kind; clauses of descriptions are counted too."""
    tallies = [{kind: Tally() for kind in (*KINDS, CLAUSES)} for _ in watches]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scene.mp4"
        for number, (scene, found) in enumerate(cases(split, questions), 1):
            write(path, film(scene, glyphs(split)), fps=FPS)
            for watch, own in zip(watches, tallies, strict=True):
                answer = watch(path)
                for question in found:
                    count(own, question, answer(question.text))
            if number % 20 == 0:
                sys.stderr.write(f"{number} videos\n")
    return tallies


def count(tallies: dict[str, Tally], question: Question, told: str) -> None:
    """Count one answer, and a description's clauses."""
    tallies[question.kind].add(question, told)
    if question.kind == "describe":
        add_clauses(tallies[CLAUSES], question, told)


def add_clauses(tally: Tally, question: Question, answer: str) -> None:
    """Every true clause counts as a question of its own."""
    given = plain(answer).split(", ")
    for clause in question.answer.split(", "):
        found = clause if clause in given else answer
        tally.add(Question(question.kind, question.text, clause), found)


def watch_with_bundle(folder: Path, stack: ExitStack, frames: int) -> Watch:
    """Open a bundle through the runtime; ``stack`` closes it."""
    from runtime import VideoQA

    opened = stack.enter_context(VideoQA.open(folder))

    def watch(path: Path) -> Answer:
        video = opened.video(path, frames=frames)
        return lambda question: opened.ask(video, question).text

    return watch


def table(tallies: dict[str, Tally], errors: int) -> str:
    """Lines of kind, share, counts, and some wrong answers."""
    lines = []
    for kind, tally in tallies.items():
        lines.append(f"{kind:20} {tally.share:6.1%}  {tally.right}/{tally.asked}")
        lines += [f"    {text} | {truth} | {told}" for text, truth, told in tally.wrong[:errors]]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m export.demo.evaluate", description="Held-out accuracy.")
    parser.add_argument("folders", type=Path, nargs="+", help="bundles, or with --torch checkpoint folders")
    parser.add_argument("--questions", type=int, default=200, help="questions of every kind")
    parser.add_argument("--frames", type=int, default=FRAMES, help="frames taken from every video")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--torch", action="store_true", help="answer with PyTorch from checkpoint folders")
    parser.add_argument("--errors", type=int, default=0, help="wrong answers to show per kind")
    given = parser.parse_args(arguments)
    with ExitStack() as stack:
        if given.torch:
            watches = [watch_with_torch(folder, given.frames) for folder in given.folders]
        else:
            watches = [watch_with_bundle(folder, stack, given.frames) for folder in given.folders]
        measured = measure(watches, given.questions, given.split)
    for folder, tallies in zip(given.folders, measured, strict=True):
        sys.stdout.write(f"{folder}\n{table(tallies, given.errors)}\n")
        summary = {kind: {"right": tally.right, "asked": tally.asked} for kind, tally in tallies.items()}
        result = {"folder": str(folder), "split": given.split, "frames": given.frames, **summary}
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded("linvt-demo-evaluate", main))
