"""The graphs for older engines are the same functions without TensorScatter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from calibration.passes.lower_opset import OPSET
from runtime import GenerationOptions, VideoQA, backend_ort
from tests.conftest import Recorded

STAGES = ["vision", "refine", "aggregate", "decode"]


def random_feeds(session: ort.InferenceSession, random: np.random.Generator) -> dict[str, NDArray[Any]]:
    free = {"frames": 5, "text": 7, "sequence": 6, "capacity": 40}
    feeds = {
        value.name: random.normal(size=[free.get(axis, axis) for axis in value.shape]).astype(np.float32)
        for value in session.get_inputs()
        if value.type == "tensor(float)"
    }
    if "inputs_embeds" in feeds:
        feeds["write_index"] = np.array([11])
        feeds["position_ids"] = np.arange(11, 17)[None]
    return feeds


@pytest.mark.parametrize("stage", STAGES)
def test_lowered_graphs_say_the_same(stage: str, linvt_bundle: Path, random: np.random.Generator) -> None:
    path = linvt_bundle / f"{stage}.opset{OPSET}.onnx"
    model = onnx.load(path)
    onnx.checker.check_model(path, full_check=True)
    assert model.opset_import[0].version == OPSET
    assert "TensorScatter" not in {node.op_type for node in model.graph.node}
    newer = ort.InferenceSession(linvt_bundle / f"{stage}.onnx", providers=["CPUExecutionProvider"])
    older = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = random_feeds(newer, random)
    expected, found = newer.run(None, feeds), older.run(None, feeds)
    assert [value.name for value in newer.get_outputs()] == [value.name for value in older.get_outputs()]
    for wanted, got in zip(expected, found, strict=True):
        print(f"largest difference {np.abs(wanted - got).max():.2e}")
        np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-5)


def test_an_engine_that_refuses_the_newer_graphs_answers_from_the_older_ones(
    linvt_bundle: Path, recorded: Callable[[str], Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ONNX Runtime 1.23 does, the last release for Python 3.10."""
    loaded: list[str] = []
    create = backend_ort.create_session

    def refuse_newer(path: Path, *options: Any) -> ort.InferenceSession:
        if f"opset{OPSET}" not in path.name:
            raise backend_ort.ort_errors.Fail("opset 24 is under development")
        loaded.append(path.name)
        return create(path, *options)

    monkeypatch.setattr(backend_ort, "create_session", refuse_newer)
    arrays = recorded("linvt-internvl2-a")
    with VideoQA.open(linvt_bundle) as qa:
        video = qa.video(arrays["frames_u8"])
        options = GenerationOptions(max_new_tokens=16, ignore_eos=True)
        answer = qa.ask(video, str(arrays["question"]), options)
    assert list(answer.token_ids) == arrays["chat_greedy_ids"].tolist()
    assert loaded == [f"{stage}.opset{OPSET}.onnx" for stage in STAGES]
