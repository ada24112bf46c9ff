"""What stops a calibration run: one line, the target as it was, no draft; and what a missed target leads to."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import calibration.quantize
import calibration.watch
import calibration.write_stage
from calibration.__main__ import main
from calibration.options import QuantizeOptions
from calibration.quantize import quantized_bundle
from calibration.questions import questions_from
from calibration.report import REPORT, SCALES, Report
from runtime.backend import MAX_THREADS
from runtime.backend_ort import create_session
from runtime.bundle import Bundle
from runtime.embedding import EmbeddingTable
from runtime.engine import VideoQA
from runtime.errors import BackendError, LinvtError, OptionError
from tests.bundles import forge
from tests.commands import Captured, refused
from tests.videos import write_video

ROOT = Path(__file__).parents[1]
QUICK = ("--llm", "float", "--method", "minmax", "--frames", "4")
V = slice(256, 384)  # columns of the demo's qkv weight that make values
HARMFUL = tuple(f"tower.encoder.layers.{number}.attn.proj.weight" for number in (1, 2))
STEPS = ("calibrate: ", "skipped ", "labelled answers", "more than --max-drop", "decode: ", "embedding: ")
STEPS += (
    "scales rest on 1 clips; 32 or more",
    "scales rest on 2 clips; 32 or more",
    "losses are measured on clips that",
)
Edit = Callable[[NDArray[Any]], None]  # changes an array (of float16 or float32) in place


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(2):
        write_video(folder / f"{number}.mp4", frames=8 + 4 * number, size=(64, 64))
    return folder


@pytest.fixture(scope="module")
def quantized(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, quantised."""
    options = QuantizeOptions(llm="float", method="minmax", frames=4, min_cosine=0.9)
    return quantized_bundle("demo-float", clips, tmp_path_factory.mktemp("quantized") / "bundle", options)


def edited(target: Path, stage: str, edits: dict[str, Edit]) -> Path:
    """The demo with some of a stage's weights changed."""
    source = Bundle.open("demo-float")
    graph = onnx.load(str(source.path(f"{stage}.onnx")), load_external_data=False).graph
    data = bytearray(source.path(f"{stage}.onnx.data").read_bytes())
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for name, edit in edits.items():
        place = {entry.key: entry.value for entry in tensors[name].external_data}
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensors[name].data_type)
        count = int(np.prod(tensors[name].dims))
        edit(np.frombuffer(data, kind, count, int(place["offset"])).reshape(tensors[name].dims))
    files: dict[str, Any] = {f"{stage}__onnx__data": bytes(data)}
    return forge(source.folder, target, **files)


def setting(value: float, *where: slice) -> Edit:
    def edit(array: NDArray[Any]) -> None:
        array[where] = value

    return edit


def times(factor: float, *where: int | slice) -> Edit:
    def edit(array: NDArray[Any]) -> None:
        array[where] *= array.dtype.type(factor)

    return edit


def all_below(folder: Path) -> dict[str, float]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def failure(
    capfd: Captured, tmp_path: Path, clips: Path, *arguments: str, bundle: Path | str = "demo-float", code: int = 1
) -> str:
    """The one line, below those of steps, with which the command ends; nothing on disk has changed."""
    before = all_below(tmp_path)
    capfd.readouterr()
    assert main([str(bundle), str(clips), "-o", str(tmp_path / "out"), *arguments]) == code
    output, errors = capfd.readouterr()
    *steps, line = errors.splitlines()
    assert output == "" and line.startswith("linvt-calibrate: ") and len(line) < 600, line
    assert all(step.startswith(STEPS) for step in steps), steps
    assert all_below(tmp_path) == before
    return line


# --- refused before anything runs


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--min-cosine", "1"], "--min-cosine is 1.0, expected 0 or more and below 1"),
        (["--min-cosine", "nan"], "--min-cosine is nan"),
        (["--min-cosine-llm", "-0.1"], "--min-cosine-llm is -0.1"),
        (["--max-drop", "101"], "--max-drop is 101.0, expected 0 to 100"),
        (["--max-drop", "1"], "--max-drop needs labelled questions; give --questions"),
        (["--threads", "0"], f"--threads is 0, expected 1 to {MAX_THREADS}"),
        (["--threads", "-3"], "--threads is -3"),
        (["--frames", "2"], "2 frames asked for, the bundle takes 3 to 32"),
        (["--frames", "33"], "33 frames asked for, the bundle takes 3 to 32"),
        (["--questions", "none.jsonl"], "none.jsonl: there is no such file"),
        (["--scales", "none.json"], "cannot read the scale table none.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_out_of_range(capfd: Captured, tmp_path: Path, clips: Path, arguments: list[str], said: str) -> None:
    assert said in failure(capfd, tmp_path, clips, *arguments)


@pytest.mark.parametrize("name", ["precision", "llm", "embedding", "method", "block"])
def test_options_of_no_kind_are_refused_from_python_too(name: str) -> None:
    values: dict[str, Any] = {name: "int2"}
    with pytest.raises(OptionError, match=f"{name} is 'int2', expected one of"):
        QuantizeOptions(**values)


@pytest.mark.parametrize(
    "arguments", [[], ["demo-float", "clips"], ["demo-float", "clips", "-o", "out", "--block-size", "8"]]
)
def test_wrong_usage_is_exit_code_2(capfd: Captured, arguments: list[str]) -> None:
    assert "see linvt-calibrate --help" in refused(capfd, arguments, 2, main)


def test_clips_that_are_none(capfd: Captured, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "list.txt").write_text("# nothing\n")
    said = {
        "": "there is no such file",
        "empty": "no clips in this folder",
        "notes.md": "does not end like a video",
        "list.txt": "lists no clips",
    }
    for name, line in said.items():
        assert line in failure(capfd, tmp_path, tmp_path / (name or "missing"))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("not json", "line 1: "),
        ('{"question": ""}', "line 1: the question is empty"),
        ('{"question": "Who?", "clip": "3.mp4", "answer": "a"}', "asks about '3.mp4', which is none of the 2 clips"),
        ('{"question": "Who?", "clip": "9.mp4"}', "asks about '9.mp4'"),
        ('{"question": "Who?", "answer": "a"}', "there is an answer and no clip"),
    ],
)
def test_questions_with_faults(capfd: Captured, tmp_path: Path, clips: Path, lines: str, said: str) -> None:
    (tmp_path / "questions.jsonl").write_text(lines)
    assert said in failure(capfd, tmp_path, clips, "--questions", str(tmp_path / "questions.jsonl"))


def test_a_bundle_that_is_quantised_already(capfd: Captured, tmp_path: Path, clips: Path, quantized: Path) -> None:
    line = failure(capfd, tmp_path, clips, bundle=quantized)
    assert "is quantised already" in line and "give the float bundle" in line


def test_a_bundle_that_the_cpu_cannot_run(capfd: Captured, tmp_path: Path, clips: Path) -> None:
    wide: Callable[[dict[str, Any]], None] = lambda found: found["stages"]["decode"].update(compute="bfloat16")  # noqa: E731
    bundle = forge(Bundle.open("demo-float").folder, tmp_path / "bundle", edit=wide)
    assert "decode computes in bfloat16, which the CPU cannot run" in failure(capfd, tmp_path, clips, bundle=bundle)


def test_a_table_of_another_model_or_with_entries_that_do_not_fit(
    capfd: Captured, tmp_path: Path, clips: Path, quantized: Path
) -> None:
    table = json.loads((quantized / SCALES).read_text())
    name, entry = next((k, v) for k, v in table["stages"]["vision"]["tensors"].items() if v["smooth"])

    def said(edit: Callable[[dict[str, Any]], object]) -> str:
        changed = json.loads(json.dumps(table))
        edit(changed["stages"]["vision"])
        (tmp_path / "table.json").write_text(json.dumps(changed))
        return failure(capfd, tmp_path, clips, *QUICK, "--scales", str(tmp_path / "table.json"))

    assert "was made for other weights of the stage 'vision'" in said(lambda stage: stage.update(weights="0" * 64))
    assert f"smooths {name} with 1 exponents" in said(lambda stage: stage["tensors"][name].update(smooth=[1]))
    assert "an entry for 'no_such', which no layer of vision.onnx reads" in said(
        lambda stage: stage["tensors"].update(no_such=entry)
    )
    assert "threshold" in said(lambda stage: stage["tensors"][name].update(threshold=-1.0))
    assert "is of method 'gptq', which is one of 4-bit weights" in said(
        lambda stage: stage["tensors"][name].update(method="gptq")
    )


def test_an_embedding_table_that_8_bits_ruin(capfd: Captured, tmp_path: Path, clips: Path) -> None:
    """One value of a row is so large that nothing is left of its others."""
    source = Bundle.open("demo-float")
    rows = EmbeddingTable.open(source.path("embedding.safetensors")).rows(np.arange(598))
    rows[5] = 0.0035
    rows[5, 0] = 1
    save_file({"embedding": rows}, tmp_path / "table")
    files: dict[str, Any] = {"embedding__safetensors": (tmp_path / "table").read_bytes()}
    bundle = forge(source.folder, tmp_path / "bundle", **files)
    line = failure(capfd, tmp_path, clips, *QUICK, "--min-cosine", "0.9999", "--embedding", "int8", bundle=bundle)
    assert "the token embedding table keeps a cosine of" in line


def test_a_missing_extra_is_named_before_anything_fails_for_it(
    capfd: Captured, tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx_ir" else find(name))
    line = failure(capfd, tmp_path, clips)
    assert "onnx_ir is not installed; run: pip install 'linvt-edge[calibration]'" in line


def test_an_output_that_exists(capfd: Captured, tmp_path: Path, clips: Path, quantized: Path) -> None:
    forge(quantized, tmp_path / "out")
    assert "exists; choose another --output or give --force" in failure(capfd, tmp_path, clips)
    (tmp_path / "out" / "bundle.json").unlink()
    assert "is not a bundle; --force replaces bundles only" in failure(capfd, tmp_path, clips, "--force")


# --- clips that cannot be read


def damaged(path: Path) -> Path:
    """A video whose last third is garbage."""
    data = bytearray(write_video(path, frames=120, size=(64, 64)).read_bytes())
    begin, end = data.index(b"mdat"), data.index(b"moov") - 4
    middle = begin + (end - begin) * 2 // 3
    data[middle:end] = bytes(end - middle)
    path.write_bytes(data)
    return path


def test_no_clip_that_can_be_read(capfd: Captured, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.mp4").write_bytes(b"no video")
    line = failure(capfd, tmp_path, folder)
    assert "none of the 5 clips could be used (0.mp4: " in line and "give readable videos" in line


@pytest.mark.parametrize("unreadable", [{1}, {2}, {0, 1, 3}], ids=["calibrating", "held out", "all but the held out"])
def test_clips_that_cannot_be_read_are_passed_over(
    capfd: Captured, tmp_path: Path, clips: Path, unreadable: set[int]
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(4):  # of which the third measures
        path = folder / f"{number}.mp4"
        path.write_bytes((clips / "0.mp4").read_bytes() if number not in unreadable else b"no video")
    assert main(["demo-float", str(folder), "-o", str(tmp_path / "out"), *QUICK, "--min-cosine", "0.9"]) == 0
    notes = [line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped ")]
    assert [note.split(":")[0] for note in notes] == [f"skipped {number}.mp4" for number in sorted(unreadable)]
    report = msgspec.json.decode((tmp_path / "out" / REPORT).read_bytes(), type=Report)
    assert report.skipped.keys() == {f"{number}.mp4" for number in unreadable}
    assert report.calibrated_on >= 1 and set(report.measured_on).isdisjoint(report.skipped) and report.measured_on
    assert report.held_out == (unreadable == {1})


def test_a_clip_that_breaks_half_way_is_passed_over_and_one_of_one_frame_is_not(
    capfd: Captured, tmp_path: Path
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    damaged(folder / "damaged.mp4")
    write_video(folder / "single.mp4", frames=1, size=(64, 64))
    assert main(["demo-float", str(folder), "-o", str(tmp_path / "out"), *QUICK, "--min-cosine", "0.9"]) == 0
    assert "skipped damaged.mp4: damaged.mp4: the frame at 7." in capfd.readouterr().err
    report = msgspec.json.decode((tmp_path / "out" / REPORT).read_bytes(), type=Report)
    assert (report.calibrated_on, report.measured_on) == (1, ("single.mp4",))


def test_labels_are_of_no_use_where_their_clips_cannot_be_read(capfd: Captured, tmp_path: Path, clips: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "list.txt").write_text(f"bad.mp4\n{clips / '0.mp4'}\n")
    (tmp_path / "questions.jsonl").write_text('{"question": "Who?", "clip": "bad.mp4", "answer": "a"}')
    arguments = [*QUICK, "--max-drop", "5", "--questions", str(tmp_path / "questions.jsonl")]
    line = failure(capfd, tmp_path, tmp_path / "list.txt", *arguments)
    assert "all 1 are about bad.mp4; give readable videos" in line


@pytest.mark.parametrize("labelled", [False, True])
def test_a_question_that_does_not_fit_the_context(capfd: Captured, tmp_path: Path, clips: Path, labelled: bool) -> None:
    """As one that is asked while calibrating; or beyond the first two of its clip, which are labelled only."""
    lines = [{"question": "Who?", "clip": "0.mp4", "answer": "a"}] * (2 if labelled else 0)
    lines.append({"question": "Who is there? " * 200, "clip": "0.mp4", "answer": "a"})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = failure(capfd, tmp_path, clips, *QUICK, "--questions", str(tmp_path / "questions.jsonl"))
    assert "question 'Who is there? Who" in line and "about 0.mp4" in line and "the model's context holds 512" in line


# --- models that cannot be quantised


def test_activations_that_are_no_numbers(capfd: Captured, tmp_path: Path, clips: Path) -> None:
    edits = {"tower.encoder.layers.1.mlp.fc1.weight": setting(np.nan, slice(3), slice(5))}
    bundle = edited(tmp_path / "bundle", "vision", edits)
    line = failure(capfd, tmp_path, clips, bundle=bundle)
    assert "vision: " in line and "are not finite numbers on clip 0.mp4" in line and "export it again" in line


def test_a_weight_that_is_no_number(capfd: Captured, tmp_path: Path, clips: Path) -> None:
    """Of the last layer, whose output no other layer reads."""
    bundle = edited(tmp_path / "bundle", "vision", {"connector.mlp1.3.weight": setting(np.inf, slice(1), slice(1))})
    assert "finite" in failure(capfd, tmp_path, clips, *QUICK, bundle=bundle)


def test_an_activation_that_is_always_zero(capfd: Captured, tmp_path: Path, clips: Path) -> None:
    layer = "tower.encoder.layers.1.mlp.fc1"
    edits = {f"{layer}.weight": setting(0.0), f"{layer}.bias": setting(0.0)}
    bundle = edited(tmp_path / "bundle", "vision", edits)
    assert "was 0 on all clips, which gives a scale of 0" in failure(capfd, tmp_path, clips, *QUICK, bundle=bundle)


# --- targets


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


# --- what ends it early


def test_a_full_disk(capfd: Captured, tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(calibration.write_stage, "write_stage_file", full)
    assert f"cannot write {tmp_path / 'out'}: No space left" in failure(capfd, tmp_path, clips, *QUICK)


WAITS_AFTER_ITS_FIRST_STEP = """
import sys, time
from calibration.__main__ import main
from calibration.progress import Steps

say = Steps.say
Steps.say = lambda steps, line: (say(steps, line), time.sleep(60))
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("number", "code", "line"), [(signal.SIGINT, 130, "linvt-calibrate: interrupted"), (signal.SIGTERM, 143, None)]
)
def test_a_signal_leaves_the_old_bundle_and_no_draft(
    tmp_path: Path, clips: Path, quantized: Path, number: int, code: int, line: str | None
) -> None:
    forge(quantized, tmp_path / "out")
    before = all_below(tmp_path)
    words = ["demo-float", str(clips), "-o", str(tmp_path / "out"), "--force"]
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS_AFTER_ITS_FIRST_STEP, *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None and process.stderr.readline().startswith("calibrate: clips ")
    assert all_below(tmp_path) != before  # a draft is being written
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, f"{line}\n" if line else "")
    assert all_below(tmp_path) == before


def test_errors_of_the_function_are_of_the_tree(tmp_path: Path, clips: Path) -> None:
    with pytest.raises(LinvtError, match="is not a bundle"):
        quantized_bundle(tmp_path, clips, tmp_path / "out", QuantizeOptions())
