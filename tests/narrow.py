"""Stages of the golden checkpoints in any dtype, run as graphs, and how near they come to what was recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import nn

from export.checkpoint import Checkpoint
from export.convert import frame_spec, load_decoder, load_vision
from export.families import Backbone, backbone_from_checkpoint
from export.families.base import FrameRoute
from export.stages import Stage, decode_stage, vision_stage
from runtime.preprocess import vision_feeds
from tests.conftest import GOLDEN, Recorded
from tests.families import Fixture

Floats = NDArray[np.floating[Any]]


def opened(fixture: Fixture) -> tuple[Checkpoint, Backbone]:
    checkpoint = Checkpoint.open(GOLDEN / fixture.name)
    route = FrameRoute(fixture.options.get("image_size"), fixture.options.get("route", "images"))
    return checkpoint, backbone_from_checkpoint(checkpoint, route)


def stage_of(fixture: Fixture, name: str) -> Stage:
    """In float32."""
    checkpoint, backbone = opened(fixture)
    if name == "decode":
        return decode_stage(load_decoder(checkpoint, backbone))
    frames = frame_spec(backbone, None, None)
    return vision_stage(load_vision(checkpoint, backbone), backbone.preprocess, frames)


def session(model: Path | bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def share(found: Any, expected: Any, what: str) -> float:
    """The largest difference as a share of the largest expected value."""
    found, expected = np.asarray(found, np.float32), np.asarray(expected)
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    part = float(np.abs(found - expected).max() / np.abs(expected).max())
    print(f"{what}: {part:.2e} of the largest value")
    return part


def pixels(fixture: Fixture, arrays: Recorded) -> dict[str, NDArray[np.float32]]:
    """The vision stage's inputs for the recorded frames, in whole groups."""
    _, backbone = opened(fixture)
    frames = list(arrays["frames_u8"].astype(np.uint8))
    frames += [frames[-1]] * (-len(frames) % backbone.frame_group)
    return vision_feeds(frames, backbone.preprocess)


def prompt_of(fixture: Fixture, arrays: Recorded) -> tuple[Any, Any]:
    """Rows (S, D) f32 and positions (axes, S) int64 of the recorded prompt."""
    rows = fixture.of(arrays, "inputs_embeds")
    with_axes = opened(fixture)[1].llm.config.rotary.axes == 3
    return rows, arrays["position_ids"][:, 0] if with_axes else np.arange(len(rows))[None]


def steps(
    graph: ort.InferenceSession, spans: list[tuple[Any, Any]], backbone: Backbone, dtype: type[np.floating[Any]]
) -> Iterator[Floats]:
    """Logits (V,) after each of several runs of rows (S, D) at positions (axes, S)."""
    config, length = backbone.llm.config, 0
    shape = (1, config.heads_kv, sum(len(rows) for rows, _ in spans), config.head_dim)
    names = [f"{part}.{layer}" for layer in range(config.layers) for part in ("key", "value")]
    caches = [np.zeros(shape, dtype) for _ in names]
    for rows, positions in spans:
        feeds = dict(zip([f"past_{name}" for name in names], caches, strict=True))
        feeds |= {"inputs_embeds": rows[None], "write_index": np.array([length])}
        feeds["position_ids"] = positions if len(positions) == 1 else positions[:, None]
        logits, *caches = graph.run(["logits", *(f"present_{name}" for name in names)], feeds)
        length += len(rows)
        yield logits[0]


def halves(rows: Any, positions: Any) -> list[tuple[Any, Any]]:
    """The first half at once, then row by row."""
    half = len(rows) // 2
    spans = [slice(0, half), *(slice(at, at + 1) for at in range(half, len(rows)))]
    return [(rows[span], positions[:, span]) for span in spans]


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value in a graph."""
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    values = [*graph.input, *graph.output, *graph.value_info]
    return {value.name: value.type.tensor_type.elem_type for value in values} | {
        weight.name: weight.data_type for weight in graph.initializer
    }


def widened(path: Path) -> bytes:
    """The graph with every bfloat16 turned into float32: the same arithmetic on the same, rounded weights."""
    model = onnx.load(path)
    graph = model.graph
    weights = [
        numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float32), weight.name)
        if weight.data_type == TensorProto.BFLOAT16
        else weight
        for weight in graph.initializer
    ]
    del graph.initializer[:]
    graph.initializer.extend(weights)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            assert attribute.t.data_type != TensorProto.BFLOAT16, "constants are initializers"
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
    return bytes(model.SerializeToString())


def rounded(module: nn.Module) -> nn.Module:
    """The module in float32 with weights that bfloat16 holds."""
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return module.eval()
