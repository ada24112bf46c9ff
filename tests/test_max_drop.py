"""Where labelled answers are lost, every stage is asked for more on its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import calibration.quantize
from calibration.collect import Collected
from calibration.options import QuantizeOptions
from calibration.plan import Plan, can_fold
from calibration.quantize import Run
from calibration.questions import Labelled, Questions
from calibration.sensitivity import Target, TargetMissedError
from calibration.smooth import Fold
from calibration.write_stage import StageWriter
from runtime.bundle import Bundle
from runtime.manifest import StageSpec


def test_a_stage_that_cannot_be_tightened_does_not_end_it_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float]] = []

    def write(self: StageWriter, stage: str, plan: Plan, target: Target) -> Any:
        asked.append((stage, round(target.cosine, 4)))
        if stage == "vision" and target.cosine > 0.5:
            raise TargetMissedError("vision cannot")
        return StageSpec("", (), ()), SimpleNamespace(floats={str(target.cosine): 0.0})

    def answered(self: Run, bundle: Bundle, labelled: list[Labelled], which: str) -> list[bool]:
        return [which == "float" or ("decode", 0.997) in asked]

    monkeypatch.setattr(StageWriter, "write", write)
    monkeypatch.setattr(Run, "answered", answered)
    monkeypatch.setattr(Run, "write_manifest", lambda self, stages: None)
    monkeypatch.setattr(calibration.quantize, "opened", lambda folder: None)
    source = Bundle.open("demo-float")
    labelled = [Labelled("a.mp4", "What?", ("that",))]
    options = QuantizeOptions(min_cosine=0.5, min_cosine_llm=0.99, max_drop=0)
    run = Run(source, tmp_path, options, (), Questions(("What?",)), str, str)
    plans: Any = dict.fromkeys(("vision", "decode"))
    stages, accuracy = run.within_drop(plans, Collected({}), labelled)
    assert asked == [
        *(("vision", 0.5), ("decode", 0.99)),
        *(("vision", 0.85), ("vision", 0.5), ("decode", 0.997)),
    ]
    assert accuracy is not None and (accuracy.drop, accuracy.about_held_out) == (0, 1)
    assert list(stages["vision"][1].floats) == ["0.5"]


@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_columns_of_float16_weights_take_no_factors(compute: Any) -> None:
    spec = StageSpec("", (), (), compute=compute)
    assert can_fold(Fold(feeder="up_proj"), spec) is (compute == "float32")
    assert not can_fold(None, spec)
