"""Give a graph whose plugins carry no function body the body again, so that ONNX Runtime can compute it.

Stands in for the device kernel; that the kernel computes the same is the kernel's tests' business.
"""

from __future__ import annotations

import onnx

from kernels.function import function_body
from kernels.spec import DOMAIN, NAME

__all__ = ["with_bodies"]


def with_bodies(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model itself, or a copy with the missing function."""
    nodes = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type == NAME]
    if not nodes or any((function.domain, function.name) == (DOMAIN, NAME) for function in model.functions):
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    shapes = {value.name: value.type.tensor_type.shape for value in known_shapes(model)}
    top_k = {shapes[node.input[1]].dim[-1].dim_value for node in nodes}
    scales = {tuple(next(a.ints for a in node.attribute if a.name == "scales")) for node in nodes}
    assert len(top_k) == len(scales) == 1, "a function belongs to one top_k and one list of scales"
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    made.functions.append(function_body(top_k.pop(), scales.pop(), opset))
    if DOMAIN not in {entry.domain for entry in made.opset_import}:
        made.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return made


def known_shapes(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Shapes of everything in the graph that ONNX can infer."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return [*graph.input, *graph.value_info, *graph.output]
