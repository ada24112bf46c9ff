"""Bundles of every family, quantised: they pass the lint, open, answer, and stay near what they were made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import onnx_ir as ir
import pytest

from calibration.linears import exempt_weights
from calibration.lint import lint
from calibration.options import Precision, QuantizeOptions
from calibration.quantize import quantized_bundle
from calibration.report import REPORT, Report
from runtime.bundle import Bundle
from runtime.engine import VideoQA
from runtime.options import GenerationOptions
from tests.conftest import Recorded
from tests.families import FIXTURES, ROUTED, Fixture, random_linvt
from tests.videos import write_video

Load = Callable[[str], Recorded]
Export = Callable[..., Path]

SHORT = GenerationOptions(max_new_tokens=4, ignore_eos=True, do_sample=False)
LEAST = {"vision": 0.99, "refine": 0.98, "aggregate": 0.98}  # mean cosines; random weights forgive less than trained
LEAST_LLM = {"int8": 0.95, "int4": 0.6}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short videos."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(2):
        write_video(folder / f"{number}.mp4", frames=3 + 2 * number)
    return folder


def quantised(source: Path, clips: Path, target: Path, precision: Precision = "int8") -> Report:
    """Quantise by the cheapest method, asking for nothing."""
    options = QuantizeOptions(precision, method="minmax", block=32, min_cosine=0, threads=2)
    quantized_bundle(source, clips, target, options)
    return msgspec.json.decode((target / REPORT).read_bytes(), type=Report)


def assert_it_stays_near_and_answers(source: Path, target: Path, clips: Path, report: Report) -> None:
    for stage, found in report.stages.items():
        print(f"{stage}: {found}")
        assert found.loss.mean_cosine >= LEAST.get(stage, LEAST_LLM[found.weights]), stage
        assert found.layers and not found.floats
    before, after = Bundle.open(source).manifest, Bundle.open(target).manifest
    assert after.frames == before.frames and after.positions == before.positions
    for stage, spec in after.stages.items():
        exempt = exempt_weights(ir.load(source / spec.file))
        problems = lint(ir.load(target / spec.file), floats=exempt).problems
        assert problems == (), stage
        assert [(value.name, value.shape) for value in (*spec.inputs, *spec.outputs)] == [
            (value.name, value.shape) for value in (*before.stages[stage].inputs, *before.stages[stage].outputs)
        ]
    with VideoQA.open(target, verify=True) as qa:
        assert len(qa.ask(clips / "1.mp4", "What happens?", SHORT).token_ids) == 4


@pytest.mark.parametrize("fixture", FIXTURES, ids=str)
def test_every_family_bears_8_bits(fixture: Fixture, export_bundle: Export, clips: Path, tmp_path: Path) -> None:
    source = export_bundle(fixture.name, linvt="none", **fixture.options)
    report = quantised(source, clips, tmp_path / "out")
    assert report.stages.keys() == {"vision", "decode"}
    assert_it_stays_near_and_answers(source, tmp_path / "out", clips, report)


@pytest.mark.parametrize("fixture", ROUTED, ids=str)
def test_every_family_bears_linvt_in_8_bits_and_an_llm_in_4(
    fixture: Fixture, export_bundle: Export, clips: Path, tmp_path: Path, recorded: Load
) -> None:
    weights = random_linvt(tmp_path / "linvt.safetensors", recorded(fixture.name)["visual_tokens"].shape[-1])
    source = export_bundle(fixture.name, linvt=str(weights), **fixture.options)
    report = quantised(source, clips, tmp_path / "out", "int4")
    assert report.stages.keys() == {"vision", "refine", "aggregate", "decode"}
    assert report.stages["decode"].weights == "int4"
    assert_it_stays_near_and_answers(source, tmp_path / "out", clips, report)


@pytest.mark.parametrize("name", [f.name for f in FIXTURES if f.name not in {r.name for r in ROUTED}])
def test_every_llm_bears_4_bits(name: str, export_bundle: Export, clips: Path, tmp_path: Path) -> None:
    source = export_bundle(name, linvt="none")
    report = quantised(source, clips, tmp_path / "out", "int4")
    assert (report.stages["decode"].weights, report.stages["decode"].activations) == ("int4", "float")
    assert_it_stays_near_and_answers(source, tmp_path / "out", clips, report)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_an_export_in_float16_stays_in_float16(
    precision: Precision, export_bundle: Export, clips: Path, tmp_path: Path
) -> None:
    source = export_bundle("internvl2-phi3-a", linvt="none", dtype="float16")
    report = quantised(source, clips, tmp_path / "out", precision)
    assert {spec.compute for spec in Bundle.open(tmp_path / "out").manifest.stages.values()} == {"float16"}
    assert_it_stays_near_and_answers(source, tmp_path / "out", clips, report)
