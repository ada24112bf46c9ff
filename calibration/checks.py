"""What a calibration run refuses at once: options, bundles and questions that do not fit.

Looks into no graph and at no clip; what a scale table says about a graph is ``given``'s to check.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from calibration.clips import Clip
from calibration.options import QuantizeOptions
from calibration.questions import Questions
from runtime.bundle import Bundle
from runtime.errors import CalibrationError, OptionError

__all__ = ["check_options", "check_questions", "check_source"]


def check_options(options: QuantizeOptions) -> None:
    """Nothing is asked of an LLM that stays in floating point.

    Raises:
        OptionError: something is.
    """
    unused = {"min-cosine-llm": options.min_cosine_llm is not None, **options.narrow_options}
    if options.decode == "float" and any(unused.values()):
        names = ", ".join(f"--{name}" for name, given in unused.items() if given)
        raise OptionError(f"--llm float quantises nothing of the LLM; found {names}, which is about it; leave out one")


def check_source(bundle: Bundle, called: Path | str) -> None:
    """The bundle, which errors call ``called``, is a float one that this machine can run."""
    for name, stage in bundle.manifest.stages.items():
        if stage.quantized:
            raise CalibrationError(
                f"{called} is quantised already ({name}: {stage.quantized.weights}); give the float bundle it "
                "was made of (demo-float for the demo)"
            )
        if stage.compute == "bfloat16":
            raise CalibrationError(
                f"{called}: {name} computes in bfloat16, which the CPU cannot run; export with --dtype float32"
            )


def check_questions(questions: Questions, clips: Sequence[Clip], options: QuantizeOptions) -> None:
    """Labels are there where they are needed, and about clips that are."""
    if unknown := questions.unknown_clips([clip.name for clip in clips]):
        raise CalibrationError(
            f"{options.questions} asks about {unknown[0]!r:.80}, which is none of the {len(clips)} clips "
            f"(such as {clips[0].name!r:.80}); use the clips' names below the folder"
        )
    if options.max_drop is not None and not questions.labelled:
        raise CalibrationError(
            "--max-drop needs labelled questions; give --questions FILE.jsonl with lines of question, clip and answer"
        )
