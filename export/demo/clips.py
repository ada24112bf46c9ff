"""Videos of the demo's world with labelled questions: ``python -m export.demo.clips FOLDER --count 64``.

What a calibration run of the demo model takes: a folder of H.264 files and ``questions.jsonl`` with question, clip and
answer, every kind of question once per clip where it applies. Does not answer them.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

from export.demo.film import FPS, cases, film
from export.demo.glyphs import Split, glyphs
from export.demo.video import write
from runtime.cli import guarded

__all__ = ["main", "write_clips"]

QUESTIONS = "questions.jsonl"


def write_clips(folder: Path, count: int, split: Split) -> int:
    """Write ``count`` videos and their questions; how many questions there are."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (scene, questions) in enumerate(islice(cases(split, count), count)):
        name = f"scene-{index:04}.mp4"
        write(folder / name, film(scene, glyphs(split)), fps=FPS)
        lines += [{"clip": name, "question": found.text, "answer": found.answer} for found in questions]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / QUESTIONS).write_text(text, "utf-8")
    return len(lines)


def main(arguments: list[str] | None = None) -> int:
    """Parse, write, print."""
    parser = argparse.ArgumentParser(prog="python -m export.demo.clips", description="Clips of the demo's world.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=64, help="videos (default: 64)")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="train", help="of the drawings")
    given = parser.parse_args(arguments)
    questions = write_clips(given.folder, given.count, given.split)
    sys.stdout.write(f"wrote {given.count} videos and {questions} questions to {given.folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded("linvt-demo-clips", main))
