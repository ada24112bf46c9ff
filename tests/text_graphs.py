"""Graphs written in ONNX's text form, what they are fed and what they give."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from runtime.backend_ort import create_session
from tests.graphs import Arrays, run

STORED = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def model_of(text: str, weights: dict[str, NDArray[Any]], opset: int = 21) -> ir.Model:
    """A graph in ONNX's text form with its weights; nodes are called by their first output."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "linvt" : 1]>\n'
    proto = onnx.parser.parse_model(header + text)
    proto.graph.initializer.extend(ir.to_proto(ir.tensor(array, name=name)) for name, array in weights.items())
    model = ir.from_proto(proto)
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


def typed(text: str, weights: dict[str, NDArray[Any]], opset: int = 23) -> ir.Model:
    """A graph in ONNX's text form, with the types and shapes of inner tensors as an export has them."""
    proto = ir.to_proto(model_of(text, weights, opset))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True))


def outputs(model: ir.Model, **feeds: NDArray[Any]) -> Arrays:
    return run(create_session(ir.to_proto(model).SerializeToString(), "cpu", 1), **feeds)


def normal(random: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return random.standard_normal(shape, dtype=np.float32)


def assert_same_bits(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        np.testing.assert_array_equal(found[name], wanted, name)
