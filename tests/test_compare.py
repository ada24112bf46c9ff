"""The comparison passes what PyTorch says, finds the stage that says something else, and keeps evidence of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from export import compare, evidence
from export.cases import moving_shapes
from export.evidence import Case, Comparison
from export.parity import STAGES, Row, Tolerance, greedy_row, selection_row, value_row
from runtime import inspect
from runtime.bundle import Bundle

GOLDEN = Path(__file__).parent / "golden"
WITH_LINVT, PLAIN = GOLDEN / "linvt-internvl2-a", GOLDEN / "internvl2-qwen2-a"

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def bundle(linvt_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the LinVT bundle, to be altered."""
    return Path(shutil.copytree(linvt_bundle, tmp_path / "bundle"))


def compared(bundle: Path, checkpoint: Path, *options: str) -> int:
    return compare.main([str(bundle), str(checkpoint), "--tokens", "3", "--frames", "4", *options])


def refusal(captured: Captured, bundle: Path, checkpoint: Path, *options: str) -> str:
    assert compared(bundle, checkpoint, *options) == 1
    lines = captured.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("linvt-compare: ")
    return lines[0]


def alter(bundle: Path, file: str, edit: Callable[[Path], None]) -> None:
    """Change a file, and the manifest so that the bundle still opens."""
    edit(bundle / file)
    manifest = json.loads((bundle / "bundle.json").read_text())
    for name in (file, f"{file}.data"):
        if name in manifest["files"]:
            data = (bundle / name).read_bytes()
            manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def scale_largest_weight(factor: float) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        model = onnx.load(path)
        # Of the largest the last: in LinVT the aggregator's, to which all others are small corrections.
        largest = max(reversed(model.graph.initializer), key=lambda weight: len(weight.raw_data))
        array = numpy_helper.to_array(largest) * np.float32(factor)
        largest.CopyFrom(numpy_helper.from_array(array, largest.name))
        path.with_name(f"{path.name}.data").unlink()
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)

    return edit


def scale_embedding(path: Path) -> None:
    save_file({"embedding": load_file(path)["embedding"] * np.float32(1.1)}, path)


# --- what passes


def test_a_bundle_agrees_with_its_checkpoint_and_says_so(bundle: Path, capsys: Captured) -> None:
    assert compared(bundle, WITH_LINVT) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.splitlines()[-1] == "the bundle agrees with PyTorch in 1 case(s)"
    assert [line.split()[0] for line in out.splitlines()[2:-3]] == [
        *("vision", "refine", "refine", "refine", "refine", "refine", "refine", "embedding"),
        *("aggregate", "aggregate", "decode", "decode", "decode", "decode", "decode"),
    ]
    assert inspect.main([str(bundle)]) == 0
    assert "passed: 1 cases against PyTorch" in capsys.readouterr().out


def test_a_bundle_without_linvt_agrees_too(plain_bundle: Path, capsys: Captured) -> None:
    assert compared(plain_bundle, PLAIN, "--frames", "2", "--no-evidence") == 0
    assert "refine" not in capsys.readouterr().out
    assert not (plain_bundle / "evidence.json").exists()


def clip(path: Path) -> str:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for frame in moving_shapes(12, 3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return str(path)


def test_videos_and_questions_are_crossed_and_json_is_all_that_is_printed(
    bundle: Path, tmp_path: Path, capsys: Captured
) -> None:
    videos = [clip(tmp_path / "eins.mp4"), clip(tmp_path / "zwei.mp4")]
    options = [option for video in videos for option in ("--video", video)]
    assert (
        compared(
            bundle, WITH_LINVT, *options, "--tokens", "1", "--question", "Who?", "--question", "Wo ist 猫?", "--json"
        )
        == 0
    )
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert err == "" and out.count("\n") == 1
    assert [(case["video"], case["question"]) for case in content["cases"]] == [
        (video, question) for video in ("eins.mp4", "zwei.mp4") for question in ("Who?", "Wo ist 猫?")
    ]
    assert content["passed"] and content["first_departure"] is None
    assert content["bundle"] == Bundle.open(bundle).identity
    assert content == json.loads((bundle / "evidence.json").read_text())


# --- what departs


@pytest.mark.parametrize("stage", ["vision", "refine", "aggregate", "decode"])
def test_an_altered_graph_is_named(stage: str, bundle: Path, capsys: Captured) -> None:
    alter(bundle, f"{stage}.onnx", scale_largest_weight(1.5))
    assert compared(bundle, WITH_LINVT, "--atol", "1e-5", "--rtol", "1e-5") == 1
    out, err = capsys.readouterr()
    assert err == "" and f"departs from PyTorch first at {stage}:" in out.splitlines()[-1]
    assert "fed by the reference" in out.splitlines()[-1]
    assert inspect.main([str(bundle)]) == 0
    assert f"FAILED at {stage}" in capsys.readouterr().out


def test_an_altered_embedding_table_is_named(bundle: Path, capsys: Captured) -> None:
    alter(bundle, "embedding.safetensors", scale_embedding)
    assert compared(bundle, WITH_LINVT, "--no-evidence") == 1
    assert "departs from PyTorch first at embedding: rows" in capsys.readouterr().out


def test_tolerances_decide(bundle: Path, capsys: Captured) -> None:
    assert compared(bundle, WITH_LINVT, "--no-evidence", "--atol", "0", "--rtol", "0") == 1
    assert "first at vision" in capsys.readouterr().out
    alter(bundle, "vision.onnx", scale_largest_weight(1.5))
    assert compared(bundle, WITH_LINVT, "--no-evidence", "--atol", "1e9") == 0


def test_a_graph_that_yields_nan_departs_and_the_evidence_stays_json(bundle: Path, capsys: Captured) -> None:
    alter(bundle, "vision.onnx", scale_largest_weight(np.nan))
    assert compared(bundle, WITH_LINVT, "--json") == 1
    content = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert not content["passed"] and content["first_departure"] == "vision tokens (reference)"
    assert content["cases"][0]["rows"][0]["max_abs"] is None


def test_evidence_of_another_state_of_the_bundle_does_not_count(bundle: Path, capsys: Captured) -> None:
    assert compared(bundle, WITH_LINVT) == 0
    alter(bundle, "decode.onnx", scale_largest_weight(2.0))
    capsys.readouterr()
    assert inspect.main([str(bundle)]) == 0
    assert "of another state of this bundle; compare again" in capsys.readouterr().out


# --- what is refused


def test_a_bundle_of_another_model_is_refused(linvt_bundle: Path, plain_bundle: Path, capsys: Captured) -> None:
    assert "the bundle is of another model: its linvt is" in refusal(
        capsys, linvt_bundle, WITH_LINVT, "--linvt", "none"
    )
    assert "its vocabulary" not in refusal(capsys, plain_bundle, WITH_LINVT)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--video", "absent.mp4"], "absent.mp4"),
        (["--question", "  "], "question is empty"),
        (["--question", "a <IMG_CONTEXT> b"], "control token"),
        (["--frames", "0"], "frames"),
        (["--frames", "-3"], "frames"),
        (["--frames", "513"], "frames"),
        (["--tokens", "0"], "--tokens must be at least 1"),
        (["--tokens", "40000"], "do not fit into the context of 32768"),
        (["--seed", "-1"], "--seed at least 0"),
        (["--atol", "-1"], "--atol and --rtol must be at least 0"),
        (["--rtol", "nan"], "--atol and --rtol must be at least 0"),
        (["--backend", "cuda"], "cuda"),
    ],
)
def test_an_option_that_does_not_fit_is_one_line(
    options: list[str], reason: str, linvt_bundle: Path, capsys: Captured
) -> None:
    assert reason in refusal(capsys, linvt_bundle, WITH_LINVT, "--no-evidence", *options)


def test_what_is_no_bundle_or_no_checkpoint_is_one_line(linvt_bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    assert "is not a bundle" in refusal(capsys, tmp_path, WITH_LINVT)
    assert "is not a checkpoint" in refusal(capsys, linvt_bundle, tmp_path)


def test_a_bundle_that_cannot_be_written_is_one_line_after_the_result(
    bundle: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: Path, data: bytes) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", closed)
    assert compared(bundle, WITH_LINVT) == 1
    out, err = capsys.readouterr()
    assert "agrees with PyTorch" in out
    assert err == f"linvt-compare: cannot write {bundle / 'evidence.json'}: Permission denied\n"
    assert compared(bundle, WITH_LINVT, "--no-evidence") == 0


# --- rows


def test_scores_that_are_closer_than_the_noise_may_change_places() -> None:
    scores = np.array([3.0, 2.0, 1.0, 1.0 + 1e-6, 0.0], np.float32)
    tied = selection_row("chain", np.array([0, 1, 2]), np.array([0, 1, 3]), scores, Tolerance())
    assert tied.passed and tied.note == "overlap 66.7%, another order"
    worse = selection_row("chain", np.array([0, 1, 4]), np.array([0, 1, 3]), scores, Tolerance())
    assert not worse.passed


def test_a_token_kept_twice_is_a_departure() -> None:
    scores = np.array([3.0, 2.0, 1.0], np.float32)
    assert not selection_row("chain", np.array([0, 0]), np.array([0, 1]), scores, Tolerance()).passed


def test_the_order_of_a_selection_counts() -> None:
    scores = np.array([1.0, 3.0, 2.0], np.float32)
    best_first, in_time = np.array([1, 2]), np.array([1, 2])
    assert not selection_row("chain", best_first[::-1], best_first, scores, Tolerance()).passed
    assert not selection_row("chain", in_time[::-1], in_time, scores, Tolerance(), in_video_order=True).passed
    assert selection_row("chain", in_time, in_time, scores, Tolerance(), in_video_order=True).passed


def test_answers_may_part_only_where_the_best_two_tie() -> None:
    def logits(*gaps: float) -> list[np.ndarray]:
        """Steps in which token 5 is so far behind the best, and every other token further."""
        return [np.array([-9, 0, 0, 0, -9, -gap, -9, -9, -9, -9], np.float32) for gap in gaps]

    assert greedy_row("chain", [1, 2, 3], [1, 2, 3], logits(0, 0, 0), 0.1).passed
    tie = greedy_row("chain", [1, 5, 9], [1, 2, 3], logits(1, 0.05, 1), 0.1)
    assert tie.passed and tie.note == "1 of 3 tokens agree, then a gap of 0.05"
    assert not greedy_row("chain", [1, 5, 9], [1, 2, 3], logits(1, 0.5, 1), 0.1).passed
    assert not greedy_row("chain", [5], [2], logits(float("nan")), 0.1).passed


def test_nan_and_other_shapes_never_pass() -> None:
    one = np.ones(4, np.float32)
    for found, expected in (
        (one * np.nan, one),
        (one, one * np.nan),
        (one[:3], one),
        (one[None], one),
        (one * np.inf, one),
    ):
        assert not value_row("decode", "logits", "chain", found, expected, Tolerance(1e9, 0)).passed
    assert value_row("decode", "logits", "chain", one * 0, one * 0, Tolerance(0, 0)).cosine == 1


def test_the_first_departure_is_the_earliest_stage_of_any_case() -> None:
    def case(*failed: str) -> Case:
        rows: list[Any] = [Row(stage, "tokens", "chain", 1, 1, 0, 0, stage not in failed) for stage in STAGES]
        return Case("v", "q", 1, "", "", tuple(rows))

    result = Comparison("", "", "cpu", Tolerance(), (case("decode"), case("refine", "aggregate"), case()))
    assert not result and result.first_departure and result.first_departure.stage == "refine"
    assert Comparison("", "", "cpu", Tolerance(), (case(),)).first_departure is None
    assert evidence.Comparison("", "", "cpu", Tolerance(), (case(),))
