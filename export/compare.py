"""``python -m export.compare BUNDLE CHECKPOINT``: does the bundle say what PyTorch says, and where does it depart?

Prints whose code the PyTorch side is and a table per case, and writes the result into the bundle as ``evidence.json``.
The comparing is in ``cases``.
"""

# ruff: noqa: T201  a command prints

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from export.__main__ import REQUIRED
from runtime.backend_names import BACKENDS
from runtime.cli import Parser, ascii_json, guarded, printable, require_extra
from runtime.errors import OptionError

if TYPE_CHECKING:
    from calibration.parity import Tolerance
    from export.cases import Comparer
    from export.evidence import Case, Comparison
    from runtime.manifest import FrameSpec, Manifest

__all__ = ["compare", "main"]

PROGRAM = "linvt-compare"
QUESTION = "What is happening in this video?"
DEFAULTS = "1e-4, of a float16 stage 2e-2, of bfloat16 0.16"
UNITS = {"video": "frames", "image": "picture(s)"}


def main(argv: list[str] | None = None) -> int:
    """The command; 0 when the bundle is within tolerance, 1 when it is not."""
    parser = Parser(PROGRAM, description="Compare a bundle with its checkpoint in PyTorch, stage by stage.")
    parser.add_argument("bundle", help="bundle folder, or demo")
    parser.add_argument("checkpoint", help="the checkpoint it was exported from: folder or hub id")
    parser.add_argument("--linvt", metavar="WEIGHTS", help="as given to the export")
    parser.add_argument("--video", action="append", metavar="V", help="repeatable; default: seeded moving shapes")
    parser.add_argument("--image", action="append", metavar="I", help="repeatable; all of them are one case more")
    parser.add_argument("--question", action="append", metavar="Q", help=f"repeatable; default: {QUESTION!r}")
    parser.add_argument("--frames", type=int, metavar="N", help="frames of each video; default: the bundle's")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="greedy tokens compared; default: 16")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moving shapes; default: 0")
    parser.add_argument("--atol", type=float, metavar="X", help=f"accepted difference; default: {DEFAULTS}")
    parser.add_argument("--rtol", type=float, metavar="X", help="plus X times the largest value; default: the same")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-evidence", action="store_true", help="leave the bundle as it is")
    arguments = parser.parse_args(argv)
    return guarded(PROGRAM, lambda: compare(arguments))


def compare(arguments: argparse.Namespace) -> int:
    """Compare, print, write the evidence."""
    require_extra("export", REQUIRED)
    from export.cases import Comparer
    from export.evidence import Comparison, write_evidence
    from export.reference import Reference
    from runtime.engine import VideoQA

    check_numbers(arguments)
    with VideoQA.open(arguments.bundle, backend=arguments.backend) as qa:
        manifest = qa.bundle.manifest
        reference = Reference.open(arguments.checkpoint, arguments.linvt if manifest.linvt else "none", manifest)
        given, widest = tolerances(arguments.atol, arguments.rtol, manifest)
        if not arguments.json:
            print("PyTorch is " + ", ".join(f"{code} for {stage}" for stage, code in reference.made_of.items()))
        cases = []
        for case in cases_of(arguments, Comparer(qa, reference, given, arguments.tokens)):
            cases.append(case)
            if not arguments.json:
                print("\n".join(map(printable, table(case))), flush=True)
        comparison = Comparison(
            qa.bundle.identity, reference.fingerprint, reference.made_of, qa.backend.name, widest, tuple(cases)
        )
    if arguments.json:
        print(ascii_json(comparison.content()))
    else:
        print(verdict(comparison))
    if not arguments.no_evidence:
        write_evidence(qa.bundle, comparison)
    return 0 if comparison else 1


def cases_of(arguments: argparse.Namespace, comparer: Comparer) -> Iterator[Case]:
    """Every question about every video, and about the pictures; about moving shapes where there is neither."""
    from export.cases import moving_shapes

    frames = frame_count(arguments.frames, comparer.qa.bundle.manifest.frames)
    videos, chosen = arguments.video or [], arguments.frames
    if not videos and not arguments.image:
        videos, chosen = [moving_shapes(frames, arguments.seed)], None  # as many as asked for: all are taken
    questions = arguments.question or [QUESTION]
    for video in videos:
        yield from (comparer.case(video, question, chosen) for question in questions)
    if arguments.image:
        yield from (comparer.pictures(arguments.image, question) for question in questions)


def tolerances(atol: float | None, rtol: float | None, manifest: Manifest) -> tuple[Tolerance | None, Tolerance]:
    """What is to hold for every stage, None where its dtype decides; and the widest that holds for any."""
    from calibration.parity import CHAIN, STAGES, Tolerance, tolerance_of

    widest = tolerance_of(manifest.stages, STAGES[-1], CHAIN)
    if atol is None and rtol is None:
        return None, widest
    given = Tolerance(widest.absolute if atol is None else atol, widest.relative if rtol is None else rtol)
    return given, given


def check_numbers(arguments: argparse.Namespace) -> None:
    """What argparse cannot say about numbers."""
    if arguments.tokens < 1 or arguments.seed < 0:
        raise OptionError("--tokens must be at least 1, --seed at least 0")
    if not all(given is None or given >= 0 for given in (arguments.atol, arguments.rtol)):  # NaN is no tolerance
        raise OptionError("--atol and --rtol must be at least 0")


def frame_count(asked: int | None, spec: FrameSpec) -> int:
    """How many frames to compare."""
    if asked is None:
        return spec.default
    if not spec.minimum <= asked <= spec.maximum:
        raise OptionError(f"--frames {asked} is outside what the bundle takes: {spec.minimum} to {spec.maximum}")
    return asked


def table(case: Case) -> Iterator[str]:
    """One case as text."""
    yield f"{case.source}, {case.frames} {UNITS[case.kind]}: {case.question}"
    yield f"  {'stage':<10} {'value':<13} {'fed by':<9} {'max abs':>9} {'relative':>9} {'cosine':>10} {'limit':>9}"
    for row in case.rows:
        numbers = f"{row.max_abs:9.2e} {row.relative:9.2e} {row.cosine:10.7f} {row.limit:9.2e}"
        passed = "ok" if row.passed else "DEPARTS"
        yield f"  {row.stage:<10} {row.value:<13} {row.scope:<9} {numbers} {passed}  {row.note}".rstrip()
    yield f"  bundle:  {case.answer}"
    yield f"  PyTorch: {case.reference_answer}"


def verdict(comparison: Comparison) -> str:
    """The result in one line."""
    departure = comparison.first_departure
    if departure is None:
        return f"the bundle agrees with PyTorch in {len(comparison.cases)} case(s)"
    return (
        f"the bundle departs from PyTorch first at {departure.stage}: {departure.value} (fed by the "
        f"{departure.scope}) is {departure.max_abs:.2e} away, accepted {departure.limit:.2e}"
    )


if __name__ == "__main__":
    sys.exit(main())
