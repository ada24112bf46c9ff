"""``python -m calibration BUNDLE CLIPS -o BUNDLE8``: a float bundle becomes a quantised one, without torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.cli import Parser, guarded, require_extra

if TYPE_CHECKING:
    from calibration.options import Precision, QuantizeOptions

__all__ = ["add_quantize_options", "main", "quantize_options"]

PROGRAM = "linvt-calibrate"
REQUIRED = ("onnx", "onnx_ir", "ml_dtypes", "safetensors", "tqdm")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(PROGRAM, description="Quantise a bundle to INT8 or INT4 with scales from video clips.")
    parser.add_argument("bundle", help="float bundle folder, or demo-float")
    parser.add_argument("clips", type=Path, help="folder of videos, a video, or a .txt list of paths")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="BUNDLE", help="folder to write")
    parser.add_argument(
        "--precision",
        choices=("int8", "int4"),
        default="int8",
        help="int8: all stages W8A8 (default); int4: the same with an LLM of 4-bit weights",
    )
    parser.add_argument("--frames", type=int, metavar="N", help="frames taken of every clip; default: the bundle's")
    add_quantize_options(parser)
    parser.add_argument("--force", action="store_true", help="replace a bundle that exists")
    arguments = parser.parse_args(argv)
    return guarded(PROGRAM, lambda: quantize(arguments))


def add_quantize_options(parser: argparse.ArgumentParser) -> None:
    """What ``python -m export`` takes too."""
    group = parser.add_argument_group("quantisation")
    group.add_argument("--llm", choices=("int8", "int4", "float"), help="the LLM alone; default: follows --precision")
    group.add_argument(
        "--embedding", choices=("float", "int8"), default="float", help="token embedding table; default: as it is"
    )
    group.add_argument(
        "--method",
        choices=("auto", "minmax", "percentile", "entropy", "mse"),
        default="auto",
        help="how activations are clipped; auto takes what errs least for each (default)",
    )
    group.add_argument(
        "--rounding",
        choices=("auto", "gptq", "fitted", "rounded"),
        default="auto",
        help="how 4-bit weights are rounded; auto takes what errs least for each layer (default)",
    )
    group.add_argument(
        "--block-size",
        type=int,
        choices=(16, 32, 64, 128, 256),
        default=128,
        help="rows of a 4-bit weight that share a scale, at most (default: 128)",
    )
    group.add_argument(
        "--min-cosine",
        type=float,
        default=0.999,
        metavar="C",
        help="vision, refine and aggregate keep this cosine with the float stages (default: 0.999)",
    )
    group.add_argument("--min-cosine-llm", type=float, metavar="C", help="the same of the LLM's logits; default: none")
    group.add_argument(
        "--max-drop", type=float, metavar="P", help="lose at most P percentage points of the labelled answers"
    )
    group.add_argument(
        "--questions", type=Path, metavar="FILE", help="questions, one a line, or .jsonl with question, clip and answer"
    )
    group.add_argument("--threads", type=int, metavar="N", help="compute threads; default: one per core")
    group.add_argument("--scales", type=Path, metavar="TABLE", help="use this scale table (scales.json of a bundle)")


def quantize(arguments: argparse.Namespace) -> int:
    """Run it with a progress display on stderr."""
    require_extra("calibration", REQUIRED)
    from calibration.progress import Steps
    from calibration.quantize import quantized_bundle

    with Steps("calibrate") as steps:
        quantized_bundle(
            arguments.bundle,
            arguments.clips,
            arguments.output,
            quantize_options(arguments, arguments.precision),
            steps.begin,
            steps.say,
        )
        steps.end()
        steps.say(f"wrote {arguments.output}")
    return 0


def quantize_options(arguments: argparse.Namespace, precision: Precision) -> QuantizeOptions:
    """Command line -> configuration."""
    from calibration.options import QuantizeOptions

    return QuantizeOptions(
        precision=precision,
        llm=arguments.llm,
        embedding=arguments.embedding,
        method=arguments.method,
        rounding=arguments.rounding,
        block=arguments.block_size,
        min_cosine=arguments.min_cosine,
        min_cosine_llm=arguments.min_cosine_llm,
        max_drop=arguments.max_drop,
        questions=arguments.questions,
        frames=arguments.frames,
        scales=arguments.scales,
        threads=arguments.threads,
        force=arguments.force,
    )


if __name__ == "__main__":
    sys.exit(main())
