"""Dtype and shape of every tensor of a graph whose inputs have given sizes, without its weights in memory.

ONNX's shape inference alone loses what a graph computes from ``Shape``; so nodes whose inputs are known and small are
evaluated here as they come, and the rest is inferred node by node.

Runs no graph, and needs neither TensorRT nor ONNX Runtime.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper, inliner, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from kernels.spec import DOMAIN, NAME, pooled_length
from runtime.errors import BackendError

__all__ = ["Graph", "TensorSize", "graph_at", "in_float32"]

INFERENCE_ERRORS = (  # share no base class
    onnx.checker.ValidationError,
    onnx.defs.SchemaError,
    shape_inference.InferenceError,
    RuntimeError,
)
ODD_GRAPHS = (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError)  # of what is no node
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
KNOWN = 64  # elements of a tensor that is worth evaluating: a shape, an axis, an index


@dataclass(frozen=True)
class TensorSize:
    """How large a tensor is."""

    dtype: ir.DataType
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Without alignment; 4-bit elements lie two in a byte."""
        return math.ceil(math.prod(self.shape) * self.dtype.bitwidth / 8)


@dataclass(frozen=True)
class Graph:
    """A graph at given sizes.

    Attributes:
        nodes: in order; functions are inlined, but for the plugin's.
        inputs, outputs: names.
        constants: names of initializers and of outputs of Constant nodes.
        sizes: of every tensor, by name.
    """

    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: frozenset[str]
    sizes: Mapping[str, TensorSize]


def graph_at(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> Graph:
    """A model, whose weights may lie elsewhere, with the inputs' shapes given.

    Raises:
        BackendError: the size of a tensor cannot be told.
    """
    with told("the inputs and weights"):
        model = inliner.inline_selected_functions(model, [(DOMAIN, NAME)], exclude=True)
        walk = Walk(model, shapes)
    for node in model.graph.node:
        with told(f"the outputs of {node.op_type} {node.name or ', '.join(node.output)}"):
            walk.visit(node)
    outputs = tuple(value.name for value in model.graph.output)
    with told(f"{', '.join(sorted({*outputs} - walk.types.keys())) or 'tensors'}"):
        return Graph(
            nodes=tuple(model.graph.node),
            inputs=tuple(value.name for value in model.graph.input),
            outputs=outputs,
            constants=frozenset(walk.constants),
            sizes={name: size_of(walk.types[name]) for name in (*walk.types, *outputs)},
        )


@contextmanager
def told(what: str) -> Iterator[None]:
    """Say of what the size cannot be told.

    Raises:
        BackendError: in place of what odd graphs raise.
    """
    try:
        yield
    except (*INFERENCE_ERRORS, *ODD_GRAPHS) as error:
        reason = " ".join(str(error).split())
        raise BackendError(
            f"{what:.200} have no size that could be told ({reason:.100}); export the bundle again"
        ) from error


def in_float32(graph: Graph) -> Graph:
    """A graph as it would be if what is 16 bits wide were float32."""
    sizes = {name: replace(size, dtype=widened(size.dtype)) for name, size in graph.sizes.items()}
    return replace(graph, sizes=sizes)


def widened(dtype: ir.DataType) -> ir.DataType:
    """Float32 for 16 bits."""
    return ir.DataType.FLOAT if dtype in HALVES else dtype


class Walk:
    """What is known of a graph's tensors so far."""

    def __init__(self, model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.opsets = list(model.opset_import)
        self.versions = {opset.domain: opset.version for opset in model.opset_import}
        self.ir_version = model.ir_version
        self.types: dict[str, onnx.TypeProto] = {}
        self.values: dict[str, NDArray[Any]] = {}
        self.constants: set[str] = set()
        for tensor in model.graph.initializer:
            self.hold(tensor.name, tensor)
        for value in model.graph.input:
            if value.name not in self.constants:
                if value.name not in shapes:
                    raise ValueError(f"the manifest has no input {value.name!r}")
                element = value.type.tensor_type.elem_type
                self.types[value.name] = helper.make_tensor_type_proto(element, shapes[value.name])

    def hold(self, name: str, tensor: onnx.TensorProto) -> None:
        """Keep a constant's size, and its values where they are few and here."""
        if min(tensor.dims, default=0) < 0:  # ONNX's inference of a Slice would end the process
            raise ValueError(f"{name} has the shape {list(tensor.dims)}")
        self.constants.add(name)
        self.types[name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        if math.prod(tensor.dims) <= KNOWN and tensor.data_location != onnx.TensorProto.EXTERNAL:
            self.values[name] = numpy_helper.to_array(tensor)

    def visit(self, node: onnx.NodeProto) -> None:
        """Learn what a node gives."""
        if node.op_type == "Constant":
            self.hold(node.output[0], constant_tensor(node))
            return
        given = [name for name in node.input if name]
        if node.op_type == "Shape":
            self.know(node, [np.array(size_of(self.types[given[0]]).shape[window(node)], np.int64)])
            return
        if (node.domain, node.op_type) == (DOMAIN, NAME):  # the plugin, which has no body for some releases
            self.types[node.output[0]] = pooled_type(self.types[given[0]], self.types[given[1]], node)
            return
        self.types.update(self.inferred(node, given))
        if self.small(node, given):
            self.know(node, self.evaluated(node, given))

    def inferred(self, node: onnx.NodeProto, given: list[str]) -> dict[str, onnx.TypeProto]:
        """Types of a node's outputs, with all axes known."""
        schema = onnx.defs.get_schema(node.op_type, self.versions[node.domain], node.domain)
        found: dict[str, onnx.TypeProto] = shape_inference.infer_node_outputs(
            schema,
            node,
            {name: self.types[name] for name in given},
            {name: numpy_helper.from_array(self.values[name]) for name in given if name in self.values},
            opset_imports=self.opsets,
            ir_version=self.ir_version,
        )
        if not self.small(node, given):
            for name in filter(None, node.output):
                size_of(found[name])
        return found

    def small(self, node: onnx.NodeProto, given: list[str]) -> bool:
        """Whether the outputs may be evaluated: all inputs are known, and nothing makes much of little."""
        grows = node.op_type in ("Range", "Expand", "Tile", "ConstantOfShape", "Pad")
        return bool(given) and not grows and all(name in self.values for name in given)

    def evaluated(self, node: onnx.NodeProto, given: list[str]) -> list[NDArray[Any]]:
        """Outputs of a node on known inputs."""
        inputs = [helper.make_value_info(name, self.types[name]) for name in dict.fromkeys(given)]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        model = helper.make_model(helper.make_graph([node], "node", inputs, outputs), opset_imports=self.opsets)
        return list(ReferenceEvaluator(model).run(None, {name: self.values[name] for name in given}))

    def know(self, node: onnx.NodeProto, arrays: list[NDArray[Any]]) -> None:
        """Keep evaluated outputs."""
        for name, array in zip(filter(None, node.output), arrays, strict=True):
            tensor = numpy_helper.from_array(np.asarray(array))
            self.types[name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
            self.values[name] = np.asarray(array)


def size_of(kind: onnx.TypeProto) -> TensorSize:
    """A tensor's type -> its size.

    Raises:
        ValueError: an axis is not a number.
    """
    tensor = kind.tensor_type
    if not tensor.HasField("shape") or not all(axis.HasField("dim_value") for axis in tensor.shape.dim):
        raise ValueError("an axis stays open")
    return TensorSize(ir.DataType(tensor.elem_type), tuple(axis.dim_value for axis in tensor.shape.dim))


def pooled_type(tokens: onnx.TypeProto, indices: onnx.TypeProto, node: onnx.NodeProto) -> onnx.TypeProto:
    """What ``linvt::GatherPool`` gives."""
    batch, _, width = size_of(tokens).shape
    scales = next(list(attribute.ints) for attribute in node.attribute if attribute.name == "scales")
    rows = pooled_length(size_of(indices).shape[1], scales)
    return helper.make_tensor_type_proto(tokens.tensor_type.elem_type, (batch, rows, width))


def window(node: onnx.NodeProto) -> slice:
    """The axes that a Shape node tells."""
    bounds = {attribute.name: attribute.i for attribute in node.attribute}
    return slice(bounds.get("start", 0), bounds.get("end"))


def constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto:
    """The tensor of a Constant node, in whatever form it is written."""
    attribute = node.attribute[0]
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        tensor: onnx.TensorProto = value
        return tensor
    dtype = np.float32 if attribute.name.startswith("value_float") else np.int64
    return numpy_helper.from_array(np.array(value, dtype))
