"""What a missed target leads to: harmful layers stay in floating point, and lost answers bring more of them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from numpy.typing import NDArray

import calibration.quantize
import calibration.watch
from calibration.__main__ import main
from calibration.options import QuantizeOptions
from calibration.quantize import quantized_bundle
from calibration.questions import questions_from
from calibration.report import REPORT, Report
from runtime.backend_ort import create_session
from runtime.bundle import Bundle
from runtime.engine import VideoQA
from runtime.errors import BackendError
from tests import calibrations
from tests.calibrations import QUICK, Edit, edited, failure
from tests.commands import Captured

V = slice(256, 384)  # columns of the demo's qkv weight that make values
HARMFUL = tuple(f"tower.encoder.layers.{number}.attn.proj.weight" for number in (1, 2))

clips = calibrations.clips


def times(factor: float, *where: int | slice) -> Edit:
    def edit(array: NDArray[Any]) -> None:
        array[where] *= array.dtype.type(factor)

    return edit


def outlier_bundle(target: Path) -> Path:
    """One value channel of two attentions is 512 times as large, and is read by weights as much smaller.

    In floating point that changes nothing; one scale for the activation leaves no steps for its other channels, and no
    norm before it can take the factor away.
    """
    channel = V.start + 17
    edits: dict[str, Edit] = {}
    for layer in (name.removesuffix(".proj.weight") for name in HARMFUL):
        edits |= {f"{layer}.qkv.weight": times(512, slice(None), channel), f"{layer}.qkv.bias": times(512, channel)}
        edits |= {f"{layer}.proj.weight": times(1 / 512, 17)}
    return edited(target, "vision", edits)


def report_of(bundle: Path) -> Report:
    return msgspec.json.decode((bundle / REPORT).read_bytes(), type=Report)


@pytest.fixture(scope="module")
def outlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with two layers that do not bear 8 bits."""
    return outlier_bundle(tmp_path_factory.mktemp("outlier") / "bundle")


def test_the_harmful_layers_alone_stay_in_floating_point_and_are_named(
    capfd: Captured, tmp_path: Path, clips: Path, outlier: Path
) -> None:
    assert main([str(outlier), str(clips), "-o", str(tmp_path / "out"), *QUICK, "--min-cosine", "0.995"]) == 0
    report = report_of(tmp_path / "out").stages["vision"]
    print(report)
    assert set(report.floats) == set(HARMFUL) and min(report.floats.values()) > 0.003
    assert report.loss.cosine >= 0.995
    assert f"2 layers left in float: {', '.join(report.floats)}" in capfd.readouterr().err
    spec = Bundle.open(tmp_path / "out").manifest.stages["vision"].quantized
    assert spec is not None and spec.floats == tuple(report.floats)
    with VideoQA.open(tmp_path / "out") as qa:
        assert qa.ask(clips / "0.mp4", "Who?").text
    stored = onnx.load(str(tmp_path / "out" / "vision.onnx"), load_external_data=False).graph.initializer
    assert {tensor.name for tensor in stored if tensor.name.endswith(".attn.proj.weight")} == set(HARMFUL)


def test_an_engine_of_older_opsets_ranks_layers_too(
    tmp_path: Path, clips: Path, outlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = create_session

    def older(graph: bytes, *arguments: Any) -> Any:
        if onnx.load_from_string(graph).opset_import[0].version > 23:
            raise BackendError("failed to load") from RuntimeError("opset 24 is under development")
        return create(graph, *arguments)

    monkeypatch.setattr(calibration.watch, "create_session", older)
    options = QuantizeOptions(llm="float", method="minmax", frames=4, min_cosine=0.995)
    quantized_bundle(outlier, clips, tmp_path / "out", options)
    assert set(report_of(tmp_path / "out").stages["vision"].floats) == set(HARMFUL)


def test_a_target_that_nothing_holds(capfd: Captured, tmp_path: Path, clips: Path) -> None:
    line = failure(capfd, tmp_path, clips, *QUICK, "--min-cosine", "0.99999999")
    assert "vision: the target" in line and "does not hold with any layer quantised" in line


def test_a_target_of_nothing_holds_always(tmp_path: Path, clips: Path, outlier: Path) -> None:
    options = QuantizeOptions(llm="float", method="minmax", frames=4, min_cosine=0)
    quantized_bundle(outlier, clips, tmp_path / "out", options)
    assert not any(stage.floats for stage in report_of(tmp_path / "out").stages.values())


def test_the_margin_tightens_worth_with_the_cosine(tmp_path: Path) -> None:
    options = QuantizeOptions(min_cosine=0.99, min_cosine_llm=None)
    run = calibration.quantize.Run(Bundle.open("demo-float"), tmp_path, options, (), questions_from(None), str, str)  # type: ignore[arg-type]
    targets = [run.target("refine", margin) for margin in (1, 0.1)]
    assert [target.cosine for target in targets] == pytest.approx([0.99, 0.999])
    assert [target.worth for target in targets] == pytest.approx([0.9, 0.99])
    assert [run.target("decode", margin).cosine for margin in (1, 0.1)] == pytest.approx([0, 0.999])


LABELS = '{"question": "Who?", "clip": "0.mp4", "answer": "a"}\n{"question": "How?", "clip": "1.mp4", "answer": "b"}\n'


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Two labelled questions."""
    (tmp_path / "labels.jsonl").write_text(LABELS)
    return tmp_path / "labels.jsonl"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[int]:
    """Float layers of the bundles that were asked; one of two answers is wrong below the parameter."""
    counts: list[int] = []

    def answers(qa: VideoQA, *arguments: Any) -> list[bool]:
        specs = [spec.quantized for spec in qa.bundle.manifest.stages.values() if spec.quantized]
        counts.append(sum(len(spec.floats) for spec in specs))
        return [not specs or counts[-1] >= request.param, True]

    monkeypatch.setattr(calibration.quantize, "right_answers", answers)
    return counts


@pytest.mark.parametrize("asked", [1], indirect=True)
def test_lost_answers_bring_layers_back_to_floating_point(
    capfd: Captured, tmp_path: Path, clips: Path, outlier: Path, labels: Path, asked: list[int]
) -> None:
    options = [*QUICK, "--min-cosine", "0.5", "--max-drop", "10", "--questions", str(labels)]
    assert main([str(outlier), str(clips), "-o", str(tmp_path / "out"), *options]) == 0
    report = report_of(tmp_path / "out")
    assert report.accuracy is not None and report.accuracy.drop == 0
    assert asked[:2] == [0, 0] and asked[2] >= 1 and len(asked) == 3  # float, all in 8 bits, with a better target
    assert set(HARMFUL) & set(report.stages["vision"].floats)
    notes = [line for line in capfd.readouterr().err.splitlines() if line.startswith("labelled answers: 2 of 2")]
    assert len(notes) == 2 and "50.00 percentage points lost" in notes[0]
    with VideoQA.open(tmp_path / "out", verify=True) as qa:
        assert qa.bundle.manifest.stages["vision"].quantized


@pytest.mark.parametrize("asked", [10**6], indirect=True)
def test_answers_that_stay_lost_are_refused(
    capfd: Captured, tmp_path: Path, clips: Path, labels: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration.quantize, "MARGINS", (1.0, 0.9, 0.02))
    options = [*QUICK, "--min-cosine", "0.99", "--max-drop", "10", "--questions", str(labels)]
    line = failure(capfd, tmp_path, clips, *options)
    assert "50.00 percentage points of 2 labelled answers are lost, more than --max-drop 10" in line
    assert asked[0] == asked[1] == 0 < asked[2] and len(asked) == 3  # the second margin gave the same bundle again
