"""What an export that quantises in one go refuses before it exports, and what its errors call the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calibration.scales import ScaleTable, StageScales, TensorScale, encode_table
from export.__main__ import main
from tests.commands import Captured
from tests.plans import entry
from tests.videos import write_video

CHECKPOINT = Path(__file__).parent / "golden" / "internvl2-internlm2-a"
ENTRY: dict[str, Any] = {"threshold": 1, "method": "minmax", "largest": 1, "error": 0, "layers": []}


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """One video."""
    (tmp_path / "clips").mkdir()
    write_video(tmp_path / "clips" / "one.mp4", frames=4, size=(64, 64))
    return tmp_path / "clips"


def told(capfd: Captured, tmp_path: Path, clips: Path, *arguments: str) -> tuple[list[str], str]:
    """The steps and the one line with which an export ends that writes nothing."""
    before = sorted(tmp_path.rglob("*"))
    words = [str(CHECKPOINT), "-o", str(tmp_path / "out"), "--precision", "int8", "--calibration", str(clips)]
    assert main([*words, "--linvt", "none", *arguments]) == 1
    *steps, line = capfd.readouterr().err.splitlines()
    assert line.startswith("linvt-export: ") and sorted(tmp_path.rglob("*")) == before
    return steps, line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scales", "none.json"], "cannot read the scale table none.json"),
        (["--scales", "{faulty}"], "'vision', entry 'x': threshold is -1"),
        (["--scales", "{narrow}"], "the entry for 'x' is of method 'gptq', which is one of 4-bit weights"),
        (["--scales", "{empty}"], "has no entry that is of use"),
        (["--llm", "float", "--min-cosine-llm", "0.9"], "--llm float quantises nothing of the LLM"),
    ],
    ids=["missing", "faulty", "narrow", "empty", "float"],
)
def test_tables_and_options_are_refused_before_anything_is_exported(
    capfd: Captured, tmp_path: Path, clips: Path, arguments: list[str], said: str
) -> None:
    entries = {"faulty": {**ENTRY, "threshold": -1}, "narrow": {**ENTRY, "method": "gptq"}, "empty": None}
    for name, scale in entries.items():
        table = json.loads(encode_table(table_of({})))
        table["stages"]["vision"]["tensors"] = {"x": scale} if scale else {}
        (tmp_path / name).write_text(json.dumps(table))
    given = [argument.format(**{name: tmp_path / name for name in entries}) for argument in arguments]
    steps, line = told(capfd, tmp_path, clips, *given)
    assert said in line and steps == []


def table_of(tensors: dict[str, TensorScale]) -> ScaleTable:
    """A table of weights that no model has."""
    stages = {"vision": StageScales("0" * 64, tensors)}
    return ScaleTable(method="auto", clips=(), questions=(), versions={}, stages=stages)


def test_a_table_of_another_model_is_refused_by_the_checkpoints_name(
    capfd: Captured, tmp_path: Path, clips: Path
) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(encode_table(table_of({"x": entry(1)})))
    _, line = told(capfd, tmp_path, clips, "--scales", str(path))
    expected = f"{path} was made for other weights of the stage 'vision' than {CHECKPOINT} has; calibrate again"
    assert line == f"linvt-export: {expected}"
