"""Checkpoint to quantised bundle in one go: the float bundle is an intermediate that nobody sees.

Exporting is ``convert``'s work and quantising ``calibration``'s; both know nothing of each other.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from calibration.checks import check_options, check_questions
from calibration.clips import clips_from
from calibration.given import check_table
from calibration.options import QuantizeOptions
from calibration.quantize import quantized_bundle
from calibration.questions import questions_from
from calibration.scales import read_table
from calibration.write import bundle_draft, written
from export.checkpoint import Checkpoint
from export.convert import ExportOptions, bundle_from_checkpoint
from export.families import backbone_from_checkpoint
from export.families.base import FrameRoute
from runtime.errors import OptionError

__all__ = ["quantized_from_checkpoint"]

Progress = Callable[[str], None]


def quantized_from_checkpoint(
    options: ExportOptions, clips: Path, quantize: QuantizeOptions, progress: Progress, note: Progress
) -> Path:
    """Export and quantise; returns the bundle's folder.

    Args:
        options: what to export.
        clips: folder of videos, a video, or a list of paths.
        quantize: what to quantise, and what has to be kept.
        progress: told the name of each step as it begins.
        note: told what the user should know.

    Raises:
        LinvtError: one line; the output is as it was.
    """
    check(options, clips, quantize)
    with bundle_draft(options.output, force=options.force) as draft:
        plain, narrow = draft / "float", draft / "quantized"
        bundle_from_checkpoint(replace(options, output=plain, force=False), progress, note)
        quantize = replace(quantize, force=False)
        quantized_bundle(plain, clips, narrow, quantize, progress, note, called=options.checkpoint)
        with written(options.output):
            shutil.rmtree(plain)
            for path in narrow.iterdir():
                path.rename(draft / path.name)
            narrow.rmdir()
    return options.output


def check(options: ExportOptions, clips: Path, quantize: QuantizeOptions) -> None:
    """What can be refused before the export, which takes minutes."""
    check_options(quantize)
    if quantize.scales:
        unused = ("decode",) if quantize.decode != "int8" else ()
        check_table(str(quantize.scales), read_table(quantize.scales), unused)
    check_questions(questions_from(quantize.questions), clips_from(clips), quantize)
    if options.dtype == "float32":
        return
    checkpoint = Checkpoint.open(options.checkpoint)
    overflows = backbone_from_checkpoint(checkpoint, FrameRoute(options.image_size, options.route)).llm.overflows
    if options.dtype == "bfloat16" or overflows:
        reason = f" (this LLM computes in it where float16 is asked for: {overflows})" if overflows else ""
        raise OptionError(
            f"--precision with --dtype {options.dtype}: calibration runs on the CPU, which cannot compute in "
            f"bfloat16{reason}; use --dtype float32"
        )
