"""``python -m export.build BUNDLE``: TensorRT engines of a bundle, built on the device that runs them.

Needs the extra [tensorrt] and a GPU, no torch. ``--dry-run`` needs neither TensorRT nor a GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from export.engine.options import BuildOptions, numbers
from runtime.cli import Parser, guarded, require_extra

__all__ = ["main"]

PROGRAM = "linvt-build"
REQUIRED = ("onnx", "onnx_ir")  # TensorRT and cuda-python have messages of their own: JetPack brings one of them


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(PROGRAM, description="Build TensorRT engines of a bundle, for this GPU and this TensorRT.")
    parser.add_argument("bundle", help="bundle folder")
    parser.add_argument(
        "--stages", nargs="+", default=[], metavar="STAGE", help="vision, refine, aggregate, decode; default: all"
    )
    parser.add_argument("--force", action="store_true", help="build what is up to date too, and what seems too large")
    parser.add_argument("--dry-run", action="store_true", help="check and estimate, build nothing")
    parser.add_argument("--tensorrt", metavar="VERSION", help="with --dry-run: of another TensorRT, e.g. 10.3")
    parser.add_argument(
        "--device-memory", type=int, metavar="MIB", help="with --dry-run: what is free on another device, a Jetson"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show what TensorRT says")
    add_size_options(parser)
    add_builder_options(parser)
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and (arguments.tensorrt or arguments.device_memory is not None):
        parser.error("--tensorrt and --device-memory go with --dry-run")
    if arguments.device_memory is not None and arguments.device_memory < 1:
        parser.error(f"--device-memory is {arguments.device_memory}, expected 1 MiB or more")
    return guarded(PROGRAM, lambda: build(arguments))


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """``--min``, ``--opt`` and ``--max``."""
    group = parser.add_argument_group(
        "sizes",
        "KEY=N[,KEY=N...] with batch (frames of one vision run), frames (of a video), text (tokens of a question, as "
        "LinVT reads it) and tokens (prompt and answer together); default: as the bundle says, of tokens "
        "2048 or what its usual video takes",
    )
    group.add_argument("--min", type=sizes, action=Merged, default={}, metavar="KEY=N", help="smallest")
    group.add_argument("--opt", type=sizes, action=Merged, default={}, metavar="KEY=N", help="what to be fastest for")
    group.add_argument("--max", type=sizes, action=Merged, default={}, metavar="KEY=N", help="largest")


def add_builder_options(parser: argparse.ArgumentParser) -> None:
    """How TensorRT builds."""
    group = parser.add_argument_group("building")
    group.add_argument("--workspace", type=int, metavar="MIB", help="scratch memory of a layer; default: what is left")
    group.add_argument("--max-memory", type=int, metavar="MIB", help="memory to make do with; default: what is free")
    group.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="measured tactics; default: beside the engines"
    )
    group.add_argument(
        "--optimization-level", type=int, metavar="N", help="0 builds fastest, 5 searches longest; default: TensorRT's"
    )
    group.add_argument("--tf32", action="store_true", help="faster products of float32, with 10 of its 23 bits")
    group.add_argument("--no-plugin", action="store_true", help="gather and pool with standard layers")
    group.add_argument(
        "--ptx",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="further PTX (python -m kernels.compile)",
    )


class Merged(argparse.Action):
    """Repeated options add up; the last of a key holds."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: object = None
    ) -> None:
        """Add the keys of one option."""
        assert isinstance(values, dict)
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), **values})


def sizes(text: str) -> dict[str, int]:
    """The value of ``--max`` and its like."""
    try:
        return numbers(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def build(arguments: argparse.Namespace) -> int:
    """Build, or rehearse it; progress goes to stderr."""
    require_extra("tensorrt", REQUIRED)
    from export.engine.dry_run import rehearsed
    from export.engine.make import make_engines
    from export.engine.progress import Progress

    progress = Progress()
    options = build_options(arguments)
    if arguments.dry_run:
        for line in rehearsed(arguments.bundle, options, arguments.tensorrt, arguments.device_memory, progress.say):
            print(line)  # noqa: T201  what was asked for
        return 0
    folder = make_engines(arguments.bundle, options, progress, verbose=arguments.verbose)
    progress.say(f"engines are in {folder}")
    return 0


def build_options(arguments: argparse.Namespace) -> BuildOptions:
    """Command line -> configuration."""
    return BuildOptions(
        least=arguments.min,
        best=arguments.opt,
        most=arguments.max,
        workspace=arguments.workspace,
        max_memory=arguments.max_memory,
        stages=tuple(arguments.stages),
        timing_cache=arguments.timing_cache,
        level=arguments.optimization_level,
        tf32=arguments.tf32,
        plugin=not arguments.no_plugin,
        ptx=tuple(arguments.ptx),
        force=arguments.force,
    )


if __name__ == "__main__":
    sys.exit(main())
