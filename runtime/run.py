"""``python -m runtime.run [BUNDLE VIDEO QUESTION]``: answer a question about a video, or about pictures.

Without arguments the bundled demo answers about the bundled sample. The answer goes to stdout as it is
generated, a line of timings to stderr; ``--json`` prints one object instead.
"""

# ruff: noqa: T201  a command prints

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.cli import Parser, add_backend_options, ascii_json, backend_options, guarded, printable

if TYPE_CHECKING:
    from runtime.answer import Answer
    from runtime.engine import VideoQA
    from runtime.options import GenerationOptions
    from runtime.seen import Seen

__all__ = ["main"]

PROGRAM = "linvt-run"
SAMPLE = Path(__file__).parent / "demo" / "sample.mp4"
SAMPLE_QUESTION = "What is happening in this video?"


@dataclass(frozen=True)
class RunConfig:
    """One run, parsed."""

    arguments: argparse.Namespace
    generation: GenerationOptions


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return guarded(PROGRAM, lambda: run(parse(argv)))


def parse(argv: list[str] | None) -> RunConfig:
    """Command line -> configuration."""
    from runtime.bundle import DEMO
    from runtime.options import GenerationOptions

    parser = Parser(PROGRAM, description="Answer a question about a video, or pictures, with an exported bundle.")
    parser.add_argument("bundle", nargs="?", default=DEMO, help="bundle folder, demo (default) or demo-float")
    parser.add_argument("video", nargs="?", help="video file or folder of images; default: the bundled sample")
    parser.add_argument("question", nargs="?", help="plain text")
    parser.add_argument(
        "--image", action="append", metavar="FILE", help="ask about this picture instead: BUNDLE QUESTION; repeatable"
    )
    parser.add_argument("--system", metavar="TEXT", help="in place of the model's own system text")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is used and where time goes")
    add_video_options(parser)
    names = add_generation_options(parser)
    add_backend_options(parser)
    arguments = parser.parse_args(argv)
    check_positionals(parser, arguments)
    for name in ("question", "system"):
        if getattr(arguments, name) is not None:
            setattr(arguments, name, text_from_argument(getattr(arguments, name)))
    options = {name: getattr(arguments, name) for name in names}
    return RunConfig(arguments, GenerationOptions(**options))


def check_positionals(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """BUNDLE VIDEO QUESTION, or BUNDLE QUESTION with pictures, or nothing."""
    from runtime.bundle import DEMOS

    if arguments.image:
        if arguments.question is not None or arguments.video is None:
            parser.error("with --image the arguments are BUNDLE QUESTION")
        if any(getattr(arguments, name) is not None for name in ("frames", "fps", "start", "end")):
            parser.error("--frames, --fps, --start and --end are about a VIDEO, not about --image")
        arguments.question, arguments.video = arguments.video, None
    elif arguments.video is not None and arguments.question is None:
        parser.error("a VIDEO needs a QUESTION, as in: BUNDLE VIDEO QUESTION, where BUNDLE may be demo")
    elif arguments.video is None and arguments.bundle not in DEMOS:
        parser.error("a BUNDLE needs a VIDEO and a QUESTION")


def text_from_argument(argument: str) -> str:
    """UTF-8 whatever the locale says; what is not UTF-8 stays as it is, to be refused with its question."""
    try:
        return argument.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return argument


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """Which frames are looked at."""
    group = parser.add_argument_group("frames")
    group.add_argument("--frames", type=int, metavar="N", help="so many, spread evenly; default: the bundle's")
    group.add_argument("--fps", type=float, metavar="X", help="so many per second instead")
    group.add_argument("--start", type=float, metavar="SECONDS", help="begin here")
    group.add_argument("--end", type=float, metavar="SECONDS", help="end here")


def add_generation_options(parser: argparse.ArgumentParser) -> list[str]:
    """How the answer is generated, under Hugging Face's names; returns the names."""
    group = parser.add_argument_group("generation (default: as the bundle says)")
    options: list[argparse.Action] = [
        group.add_argument("--max-new-tokens", type=int, metavar="N"),
        group.add_argument("--do-sample", action=argparse.BooleanOptionalAction),
        group.add_argument("--temperature", type=float, metavar="X"),
        group.add_argument("--top-p", type=float, metavar="X"),
        group.add_argument("--top-k", type=int, metavar="N"),
        group.add_argument("--repetition-penalty", type=float, metavar="X"),
        group.add_argument("--seed", type=int, metavar="N"),
        group.add_argument("--ignore-eos", action="store_true", help="go on to --max-new-tokens"),
    ]
    return [option.dest for option in options]


def run(config: RunConfig) -> int:
    """Open, look, answer, print."""
    from runtime.engine import VideoQA

    arguments = config.arguments
    with VideoQA.open(arguments.bundle, **backend_options(arguments)) as qa:
        question = SAMPLE_QUESTION if arguments.question is None else arguments.question
        qa.prompts.check(question, system=arguments.system)
        if not arguments.image:
            qa.check_text(question)
        if arguments.verbose:
            note_settings(qa, config)
        seen = look(qa, arguments, question)
        answer = print_answer(qa, seen, question, config)
        if arguments.verbose:
            for note in qa.backend.notes:
                print(printable(note), file=sys.stderr)
    if not arguments.json:
        print(timings(answer, seen), file=sys.stderr)
    return 0


def look(qa: VideoQA, arguments: argparse.Namespace, question: str) -> Seen:
    """The pictures or the video."""
    if arguments.image:
        return qa.images(arguments.image)
    if arguments.video is None and not arguments.json:
        print(f"{SAMPLE.name}: {question}", file=sys.stderr)
    return qa.video(
        SAMPLE if arguments.video is None else arguments.video,
        frames=arguments.frames,
        fps=arguments.fps,
        start=arguments.start,
        end=arguments.end,
    )


def print_answer(qa: VideoQA, seen: Seen, question: str, config: RunConfig) -> Answer:
    """The answer as text while it comes, or as one JSON object."""
    stream = qa.stream(seen, question, config.generation, system=config.arguments.system)
    if config.arguments.json:
        print(json_text(stream.answer, seen, qa.backend.name))
        return stream.answer
    for piece in stream:
        print(printable(piece, kept="\n\t"), end="", flush=True)
    print(flush=True)
    return stream.answer


def json_text(answer: Answer, seen: Seen, backend: str) -> str:
    """One JSON object."""
    content = {
        "answer": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "frame_timestamps": answer.frame_timestamps,
        "prompt_tokens": answer.prompt_tokens,
        "milliseconds": rounded(all_milliseconds(answer, seen)),
        "first_token_ms": round(sum(seen.milliseconds.values()) + answer.first_token_ms, 3),
        "tokens_per_second": round(answer.tokens_per_second, 3),
        "backend": backend,
    }
    return ascii_json(content)


def all_milliseconds(answer: Answer, seen: Seen) -> dict[str, float]:
    """Per stage, of the video or the pictures and of the question together."""
    total = dict(seen.milliseconds)
    for stage, took in answer.milliseconds.items():
        total[stage] = total.get(stage, 0.0) + took
    return total


def timings(answer: Answer, seen: Seen) -> str:
    """One line: where the time went."""
    from runtime.seen import Images

    stages = rounded(all_milliseconds(answer, seen), 1)
    first = sum(seen.milliseconds.values()) + answer.first_token_ms
    kind, count = ("image", seen.count) if isinstance(seen, Images) else ("frame", len(answer.frame_timestamps))
    return (
        f"[{count} {kind}{'s' if count > 1 else ''} | "
        + " ".join(f"{stage} {took}" for stage, took in stages.items())
        + f" ms | first token {first:.0f} ms | {len(answer.token_ids)} tokens, {answer.tokens_per_second:.0f}/s]"
    )


def rounded(milliseconds: dict[str, float], digits: int = 3) -> dict[str, float]:
    """Milliseconds without noise digits."""
    return {stage: round(took, digits) for stage, took in milliseconds.items()}


def note_settings(qa: VideoQA, config: RunConfig) -> None:
    """What is used, on stderr."""
    manifest = qa.bundle.manifest
    reason = f" ({qa.backend.reason})" if qa.backend.reason else ""
    bundle = f"bundle {qa.bundle.folder}: {manifest.family}, backend {qa.backend.name}{reason}"
    print(printable(bundle), file=sys.stderr)
    print(f"generation: {config.generation.resolve(manifest.generation)}", file=sys.stderr)
    if ignored := config.generation.ignored(manifest.generation):
        print(f"without --do-sample these have no effect: {', '.join(ignored)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
