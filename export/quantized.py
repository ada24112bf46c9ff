"""Checkpoint to quantised bundle in one go: the float bundle is an intermediate that nobody sees.

Exporting is ``convert``'s work and quantising ``calibration``'s; both know nothing of each other.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from calibration.clips import clips_from
from calibration.options import QuantizeOptions
from calibration.quantize import quantized_bundle
from calibration.questions import questions_from
from calibration.write import bundle_draft, written
from export.convert import ExportOptions, bundle_from_checkpoint
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
    if options.dtype == "bfloat16":
        raise OptionError(
            "--precision with --dtype bfloat16: calibration runs on the CPU, which cannot; use float32 or float16"
        )
    clips_from(clips), questions_from(quantize.questions)  # before the export, which takes minutes
    with bundle_draft(options.output, force=options.force) as draft:
        plain, narrow = draft / "float", draft / "quantized"
        bundle_from_checkpoint(replace(options, output=plain, force=False), progress, note)
        quantized_bundle(plain, clips, narrow, replace(quantize, force=False), progress, note)
        with written(options.output):
            shutil.rmtree(plain)
            for path in narrow.iterdir():
                path.rename(draft / path.name)
            narrow.rmdir()
    return options.output
