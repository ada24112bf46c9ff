"""What stops a calibration run: one line, the target as it was, no draft."""

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
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import calibration.write_stage
from calibration.__main__ import main
from calibration.options import QuantizeOptions
from calibration.quantize import quantized_bundle
from calibration.report import REPORT, Report
from runtime.backend import MAX_THREADS
from runtime.bundle import Bundle
from runtime.embedding import EmbeddingTable
from runtime.errors import LinvtError, OptionError
from tests import calibrations
from tests.bundles import forge
from tests.calibrations import QUICK, Edit, all_below, edited, failure
from tests.commands import Captured, refused
from tests.videos import write_video

ROOT = Path(__file__).parents[1]

clips = calibrations.clips


@pytest.fixture(scope="module")
def quantized(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, quantised."""
    options = QuantizeOptions(llm="float", method="minmax", frames=4, min_cosine=0.9)
    return quantized_bundle("demo-float", clips, tmp_path_factory.mktemp("quantized") / "bundle", options)


def setting(value: float, *where: slice) -> Edit:
    def edit(array: NDArray[Any]) -> None:
        array[where] = value

    return edit


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
        (["--llm", "float", "--min-cosine-llm", "0.9"], "--llm float quantises nothing of the LLM; found --min-cosine"),
        (["--llm", "float", "--rounding", "gptq", "--block-size", "64"], "found --rounding, --block-size, which is"),
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


def test_an_embedding_table_that_8_bits_ruin(capfd: Captured, tmp_path: Path, clips: Path) -> None:
    """One value of a row is so large that nothing is left of its others."""
    source = Bundle.open("demo-float")
    rows = EmbeddingTable.open(source.path("embedding.safetensors")).rows(np.arange(598))
    rows[5] = 0.0035
    rows[5, 0] = 1
    save_file({"embedding": rows}, tmp_path / "table")
    files: dict[str, Any] = {"embedding__safetensors": (tmp_path / "table").read_bytes()}
    bundle = forge(source.folder, tmp_path / "bundle", **files)
    steps: list[str] = []
    options = ["--min-cosine", "0.9999", "--embedding", "int8"]
    line = failure(capfd, tmp_path, clips, *QUICK, *options, bundle=bundle, steps=steps)
    assert "the token embedding table keeps a cosine of" in line
    assert not any("clips" in step for step in steps)  # none was played


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
        (folder / f"{number}.mp4").write_bytes(b"no video" * (number + 1))
    line = failure(capfd, tmp_path, folder)
    assert "none of the 5 clips could be used (0.mp4: " in line and "give readable videos" in line


@pytest.mark.parametrize("unreadable", [{1}, {2}, {0, 1, 3}], ids=["calibrating", "held out", "all but the held out"])
def test_clips_that_cannot_be_read_are_passed_over(capfd: Captured, tmp_path: Path, unreadable: set[int]) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(4):  # of which the third measures
        if number in unreadable:
            (folder / f"{number}.mp4").write_bytes(b"no video" * (number + 1))
        else:
            write_video(folder / f"{number}.mp4", frames=8 + number, size=(64, 64))
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


def test_labels_that_are_not_asked_are_counted(capfd: Captured, tmp_path: Path, clips: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "list.txt").write_text(f"bad.mp4\n{clips / '0.mp4'}\n")
    lines = [{"question": "Who?", "clip": clip, "answer": "a"} for clip in ("bad.mp4", "bad.mp4", str(clips / "0.mp4"))]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [*QUICK, "--min-cosine", "0.9", "--questions", str(tmp_path / "questions.jsonl")]
    assert main(["demo-float", str(tmp_path / "list.txt"), "-o", str(tmp_path / "out"), *words]) == 0
    told = capfd.readouterr().err
    assert "labelled answers: 2 of 3 questions are about clips that could not be read; they are not asked\n" in told
    assert "labelled answers: 0 of 1 right in floating point" in told


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
