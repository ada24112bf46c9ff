"""``python -m export CHECKPOINT -o BUNDLE``: a published checkpoint becomes a bundle."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from calibration.__main__ import add_quantize_options, quantize_options
from runtime.cli import Parser, guarded, require_extra
from runtime.errors import OptionError

__all__ = ["add_export_options", "export", "main"]

PROGRAM = "linvt-export"
REQUIRED = (
    *("torch", "onnx", "onnx_ir", "onnxscript", "ml_dtypes"),
    *("huggingface_hub", "safetensors", "tqdm", "transformers"),
)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(PROGRAM, description="Export a LinVT checkpoint to a bundle that runs without torch.")
    parser.add_argument("checkpoint", help="folder in a published layout, or a hub id")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="BUNDLE", help="folder to write")
    add_export_options(parser)
    arguments = parser.parse_args(argv)
    return guarded(PROGRAM, lambda: export(arguments))


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """What ``optimum-cli export linvt`` takes too."""
    parser.add_argument(
        "--linvt",
        metavar="WEIGHTS",
        help="LinVT weights (safetensors) where the checkpoint has none, or 'none' for the plain image LLM",
    )
    parser.add_argument("--frames", type=int, metavar="N", help="frames taken of a video unless told otherwise")
    parser.add_argument(
        "--layout",
        choices=("video", "training"),
        default="video",
        help="how the video stands in the prompt: as in chat (default), or as in the released training data",
    )
    parser.add_argument(
        "--text-input",
        choices=("question", "released_slice"),
        default="question",
        help="what LinVT reads: the question (default), or the slice the released training code took",
    )
    parser.add_argument(
        "--image-size",
        type=height_and_width,
        metavar="HxW",
        help="pixels a frame is resized to, for families that leave it open (Qwen2-VL; default: 336x336)",
    )
    parser.add_argument(
        "--route",
        choices=("images", "video"),
        default="images",
        help="encode every frame as a picture (default), or as the family encodes videos (Qwen2-VL: in pairs)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="what the graphs compute in: float32 for the CPU (default), 16 bits for GPUs",
    )
    parser.add_argument("--force", action="store_true", help="replace a bundle that exists")
    parser.add_argument(
        "--precision",
        choices=("float", "int8", "int4"),
        default="float",
        help="int8: all stages in 8 bits (W8A8); int4: the same with an LLM of 4-bit weights; needs --calibration",
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="CLIPS", help="folder of videos, a video, or a .txt list, for --precision"
    )
    add_quantize_options(parser)


def height_and_width(text: str) -> tuple[int, int]:
    """ "336x448" -> (336, 448)."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isascii() and side.isdigit() and 0 < int(side) < 2**16 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH in pixels, as in 336x336")
    return int(sides[0]), int(sides[1])


def export(arguments: argparse.Namespace) -> int:
    """Run the export with a progress display on stderr."""
    require_extra("export", REQUIRED)
    check_calibration(arguments)
    from calibration.progress import Steps
    from export.convert import ExportOptions, bundle_from_checkpoint
    from export.quantized import quantized_from_checkpoint

    options = ExportOptions(
        checkpoint=arguments.checkpoint,
        output=arguments.output,
        linvt=arguments.linvt,
        frames=arguments.frames,
        layout=arguments.layout,
        text_input=arguments.text_input,
        force=arguments.force,
        image_size=arguments.image_size,
        route=arguments.route,
        dtype=arguments.dtype,
    )
    with Steps("export") as steps:
        if arguments.precision == "float":
            check_plain(arguments)
            bundle_from_checkpoint(options, steps.begin, steps.say)
        else:
            narrow = quantize_options(arguments, arguments.precision)
            quantized_from_checkpoint(options, arguments.calibration, narrow, steps.begin, steps.say)
        steps.end()
        steps.say(f"wrote {options.output}")
    return 0


def check_calibration(arguments: argparse.Namespace) -> None:
    """Clips come with a precision that needs them, and with no other."""
    if (arguments.precision == "float") != (arguments.calibration is None):
        raise OptionError(
            "--precision int8 and int4 need --calibration CLIPS, a folder of videos, and nothing else takes it; "
            f"found --precision {arguments.precision} {'with' if arguments.calibration else 'without'} --calibration"
        )


def check_plain(arguments: argparse.Namespace) -> None:
    """A float export takes none of the options of quantisation."""
    from calibration.options import QuantizeOptions

    given = quantize_options(arguments, "int8")
    plain = QuantizeOptions(frames=arguments.frames, force=arguments.force)
    if given != plain:
        names = [name for name, value in vars(given).items() if value != getattr(plain, name)]
        option = {"block": "block-size"}.get(names[0], names[0].replace("_", "-"))
        raise OptionError(f"--{option} is for quantisation; give --precision int8 or int4 with it, or leave it out")


if __name__ == "__main__":
    sys.exit(main())
