"""Two small clips, the demo with chosen weights changed, and the one line with which a calibration of it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from calibration.__main__ import main
from runtime.bundle import Bundle
from tests.bundles import forge
from tests.commands import Captured
from tests.videos import write_video

QUICK = ("--llm", "float", "--method", "minmax", "--frames", "4")
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


def all_below(folder: Path) -> dict[str, float]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def failure(
    capfd: Captured,
    tmp_path: Path,
    clips: Path,
    *arguments: str,
    bundle: Path | str = "demo-float",
    code: int = 1,
    steps: list[str] | None = None,
) -> str:
    """The one line, below those of steps, with which the command ends; nothing on disk has changed.

    The lines of steps are added to ``steps``.
    """
    before = all_below(tmp_path)
    capfd.readouterr()
    assert main([str(bundle), str(clips), "-o", str(tmp_path / "out"), *arguments]) == code
    output, errors = capfd.readouterr()
    *told, line = errors.splitlines()
    assert output == "" and line.startswith("linvt-calibrate: ") and len(line) < 600, line
    assert all(step.startswith(STEPS) for step in told), told
    if steps is not None:
        steps += told
    after = all_below(tmp_path)
    assert after == before, sorted(after.items() ^ before.items())
    return line
