"""Clips of the same content count once: none calibrates and measures under two names."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from calibration.__main__ import main
from calibration.report import REPORT, SCALES, Report
from tests.calibrations import QUICK
from tests.commands import Captured
from tests.videos import write_video


@pytest.mark.parametrize("linked", [True, False])
def test_a_copy_is_left_out_and_its_questions_are_asked_about_the_first(
    capfd: Captured, tmp_path: Path, linked: bool
) -> None:
    """Without that the third of four clips would be measured on, which is the first."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in (0, 1, 3):
        write_video(folder / f"a{number}.mp4", frames=8 + number, size=(64, 64))
    if linked:
        (folder / "a2.mp4").symlink_to("a0.mp4")
    else:
        (folder / "a2.mp4").write_bytes((folder / "a0.mp4").read_bytes())
    line = json.dumps({"question": "Who?", "clip": "a2.mp4", "answer": "a"})
    (tmp_path / "questions.jsonl").write_text(line)
    words = [*QUICK, "--min-cosine", "0.9", "--questions", str(tmp_path / "questions.jsonl")]
    assert main(["demo-float", str(folder), "-o", str(tmp_path / "out"), *words]) == 0
    said = "it has the content of a0.mp4, which counts once"
    assert f"skipped a2.mp4: {said}\n" in capfd.readouterr().err
    report = msgspec.json.decode((tmp_path / "out" / REPORT).read_bytes(), type=Report)
    calibrated = [clip["name"] for clip in json.loads((tmp_path / "out" / SCALES).read_text())["clips"]]
    assert calibrated == ["a0.mp4", "a1.mp4", "a3.mp4"] and report.skipped == {"a2.mp4": said}
    assert report.held_out is False and set(report.measured_on) <= set(calibrated)  # three are too few to hold some out
    assert report.accuracy is not None and (report.accuracy.asked, report.accuracy.about_held_out) == (1, 0)
