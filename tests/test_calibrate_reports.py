"""What is said of a loss is no better than what was measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

import runtime.inspect
from calibration.__main__ import main
from calibration.embedding import write_narrow_embedding
from calibration.measure import Loss, floored
from calibration.report import REPORT, Report, StageReport
from calibration.sensitivity import Target, refusal
from runtime.bundle import Bundle
from runtime.errors import BundleError
from tests import calibrations
from tests.bundles import forge, replaced
from tests.bundles import refusal as refused
from tests.calibrations import QUICK
from tests.commands import Captured

clips = calibrations.clips

NEARLY = 0.99999978


def loss(cosine: float, worth: float | None = None) -> Loss:
    return Loss(cosine=cosine, mean_cosine=cosine, relative=0.0, overlap=worth, worth=worth)


@pytest.mark.parametrize(
    ("value", "digits", "said"),
    [(NEARLY, 5, "0.99999"), (1.0, 5, "1.00000"), (0.999, 7, "0.9990000"), (-0.25, 1, "-0.3"), (math.nan, 5, "NaN")],
)
def test_the_smallest_of_several_is_rounded_down(value: float, digits: int, said: str) -> None:
    assert str(floored(value, digits)) == said


def test_a_stage_is_told_with_no_more_than_it_keeps() -> None:
    report = StageReport(
        weights="int8",
        activations="int8",
        loss=loss(NEARLY, 0.99999),
        layers=1,
        floats={},
        methods={},
        quantized_bytes=1,
        float_bytes=1,
        size_ratio=0.25,
        tensorrt={},
    )
    assert "cosine 0.99999, " in str(report) and "worth 99.9%" in str(report)


def test_a_target_that_is_nearly_held_is_not_told_as_held() -> None:
    text = refusal("vision", Target(0.99999999), loss(0.99999998), loss(0.99999998))
    assert "cosine 1 " not in text and "cosine 0.9999999 with all of them" in text


def test_inspect_tells_no_more_than_a_stage_keeps(tmp_path: Path, capfd: Captured) -> None:
    """The manifest has six digits, rounded to the nearest."""
    bundle = forge(
        Bundle.open("demo").folder, tmp_path / "bundle", edit=replaced("stages/vision/quantized/cosine", 1.0)
    )
    assert runtime.inspect.main([str(bundle)]) == 0
    assert "cosine with the float stage at least 0.99999, " in capfd.readouterr().out


@pytest.mark.parametrize(("name", "value"), [("layers", -1), ("cosine", 1e30), ("cosine", -1.5)])
def test_a_manifest_with_figures_that_cannot_be_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    edit = replaced(f"stages/vision/quantized/{name}", value)
    bundle = forge(Bundle.open("demo").folder, tmp_path / "bundle", edit=edit)
    assert "quantised layers are" in refused(bundle, BundleError)


def test_the_loss_of_the_embedding_table_is_in_the_report(capfd: Captured, tmp_path: Path, clips: Path) -> None:
    words = [*QUICK, "--min-cosine", "0.9", "--embedding", "int8"]
    assert main(["demo-float", str(clips), "-o", str(tmp_path / "out"), *words]) == 0
    found = msgspec.json.decode((tmp_path / "out" / REPORT).read_bytes(), type=Report).embedding
    name = "embedding.safetensors"
    assert found == write_narrow_embedding(Bundle.open("demo-float").path(name), tmp_path / name)
    assert found is not None and f"cosine of the worst row {floored(found, 5)}\n" in capfd.readouterr().err


def test_a_report_without_a_narrow_table_says_nothing_of_one() -> None:
    assert b'"embedding": "float"' in (text := Bundle.open("demo").path(REPORT).read_bytes())
    assert text.count(b'"embedding"') == 1 and msgspec.json.decode(text, type=Report).embedding is None


def test_options_of_narrow_weights_that_are_not_used_are_named(capfd: Captured, tmp_path: Path, clips: Path) -> None:
    words = ["--method", "minmax", "--frames", "4", "--min-cosine", "0.5", "--rounding", "gptq"]
    assert main(["demo-float", str(clips), "-o", str(tmp_path / "out"), *words]) == 0
    said = "decode: --rounding and --block-size are about weights of 4 bits, of which there are none\n"
    assert said in capfd.readouterr().err
