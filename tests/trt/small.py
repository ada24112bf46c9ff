"""Small ONNX graphs for tests of a double: a product with stored weights, and a cache that takes a row.

Opset 20 where the operators allow, as the oldest release takes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["SHAPES", "cache_graph", "graph"]

SHAPES = {"x": ((1, 4), (2, 4), (8, 4))}  # a profile of ``graph``


def graph(path: Path, operator: str = "MatMul", rows: int | str = "rows", **more: Any) -> Path:
    """``y`` (rows, 3) = ``x`` (rows, 4) times stored weights; ``operator`` may be another."""
    weights = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(4, 3), "w")
    node = helper.make_node(operator, ["x", "w"], ["y"], name="product", **more)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, 3])
    made = helper.make_graph([node], "small", [x], [y], [weights])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("linvt", 1)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=10), path)
    return path


def cache_graph(path: Path, operator: str) -> Path:
    """``present`` = ``past`` (1, 1, 4, 2) with a row of ``new`` (1, 1, 1, 2) at ``index`` (1,)."""
    floats = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("past", [1, 1, 4, 2]), ("new", [1, 1, 1, 2]), ("present", [1, 1, 4, 2]))
    ]
    index = helper.make_tensor_value_info("index", TensorProto.INT64, [1])
    if operator == "TensorScatter":
        nodes = [helper.make_node(operator, ["past", "new", "index"], ["present"], axis=2)]
    else:
        nodes = [
            helper.make_node("Constant", [], ["shape"], value_ints=[1, 1, 1, 1]),
            helper.make_node("Constant", [], ["wide"], value_ints=[1, 1, 1, 2]),
            helper.make_node("Reshape", ["index", "shape"], ["place"]),
            helper.make_node("Expand", ["place", "wide"], ["places"]),
            helper.make_node("ScatterElements", ["past", "places", "new"], ["present"], axis=2),
        ]
    made = helper.make_graph(nodes, "cache", [*floats[:2], index], floats[2:])
    opset = helper.make_opsetid("", 24 if operator == "TensorScatter" else 20)
    onnx.save(helper.make_model(made, opset_imports=[opset], ir_version=10), path)
    return path
