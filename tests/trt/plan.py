"""An engine of a double as bytes: facts in JSON, then the ONNX model; and what the graph computes, by ONNX Runtime.

Shapes of outputs come from ONNX's shape inference. bfloat16 and low-precision floats are not computed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

__all__ = [
    "DTYPES",
    "NUMPY",
    "Plan",
    "PlanTensor",
    "Shape",
    "compute",
    "known_values",
    "output_shapes",
    "read_plan",
    "session_of",
]

MAGIC = b"ftrt-double\0"

Shape = tuple[int, ...]
Array = NDArray[Any]

# ONNX's element types -> TensorRT's names
DTYPES = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.INT8: "INT8",
    onnx.TensorProto.UINT8: "UINT8",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.BOOL: "BOOL",
    onnx.TensorProto.INT4: "INT4",
    onnx.TensorProto.FLOAT8E4M3FN: "FP8",
}
NUMPY: dict[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
SIZES = {"BF16": 2, "FP8": 1, **{name: np.dtype(kind).itemsize for name, kind in NUMPY.items()}}


@dataclass(frozen=True)
class PlanTensor:
    """An input or output; -1 is a dimension that is not fixed."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class Plan:
    """An engine."""

    tensorrt: str
    sm: tuple[int, int]
    name: str
    inputs: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]
    profiles: tuple[dict[str, tuple[Shape, Shape, Shape]], ...]
    model: bytes = field(repr=False)
    aliases: dict[str, str] = field(default_factory=dict)  # output -> input whose memory it is
    plugins: tuple[dict[str, Any], ...] = ()  # ``plugin_host.Hosted``
    stripped: bool = False
    refittable: bool = False
    layers: int = 0

    @functools.cached_property
    def by_name(self) -> dict[str, PlanTensor]:
        """Inputs, then outputs."""
        return {tensor.name: tensor for tensor in (*self.inputs, *self.outputs)}

    def scratch(self, profile: int) -> int:
        """Bytes of scratch memory at a profile's largest shapes: what inputs and outputs have, twice."""
        shapes = {name: most for name, (_, _, most) in self.profiles[profile].items()} if self.profiles else {}
        return self.scratch_of({tensor.name: shapes.get(tensor.name, tensor.shape) for tensor in self.inputs})

    def scratch_of(self, shapes: Mapping[str, Shape]) -> int:
        """The same, at given input shapes."""
        size = sum(bytes_of(self.by_name[name].dtype, shape) for name, shape in shapes.items())
        return -(-2 * size // 256) * 256 + 256

    def to_bytes(self) -> bytes:
        """Magic, length of the facts, facts, model, hash of all."""
        facts = {name: value for name, value in vars(self).items() if name not in ("model", "by_name")}
        facts["inputs"], facts["outputs"] = ([vars(t) for t in tensors] for tensors in (self.inputs, self.outputs))
        text = json.dumps(facts).encode()
        body = struct.pack("<Q", len(text)) + text + self.model
        return MAGIC + hashlib.sha256(body).digest() + body


def read_plan(data: bytes) -> Plan:
    """An engine's bytes, parsed.

    Raises:
        ValueError: they are none.
    """
    digest, body = data[len(MAGIC) : len(MAGIC) + 32], data[len(MAGIC) + 32 :]
    if not data.startswith(MAGIC):
        raise ValueError("Magic tag does not match")
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("the engine's checksum does not match")
    length = struct.unpack("<Q", body[:8])[0]
    facts = json.loads(body[8 : 8 + length])
    for side in ("inputs", "outputs"):
        facts[side] = tuple(PlanTensor(t["name"], t["dtype"], tuple(t["shape"])) for t in facts[side])
    facts["profiles"] = tuple(
        {name: tuple(tuple(shape) for shape in shapes) for name, shapes in profile.items()}
        for profile in facts["profiles"]
    )
    facts["sm"] = tuple(facts["sm"])
    facts["plugins"] = tuple(facts["plugins"])
    return Plan(model=body[8 + length :], **facts)


def bytes_of(dtype: str, shape: Shape) -> int:
    """Bytes of a tensor."""
    return int(np.prod(shape, dtype=np.int64)) * SIZES[dtype]


def compute(plan: Plan, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs by name -> outputs by name."""
    session = session_of(plan.model)
    assert session is not None
    names = [tensor.name for tensor in plan.outputs]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


@functools.lru_cache(maxsize=32)
def session_of(model: bytes) -> Any:
    """A session over a model, None where it has no outputs."""
    if not onnx.load_from_string(model).graph.output:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # one warning per cache that is not bound in place
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def output_shapes(plan: Plan, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes of all outputs, of given input shapes; -1 where it depends on data."""
    return _output_shapes(plan.model, tuple(sorted(shapes.items())))


@functools.lru_cache(maxsize=512)
def _output_shapes(model: bytes, shapes: tuple[tuple[str, Shape], ...]) -> dict[str, Shape]:
    bare = _for_inference(model)
    given = dict(shapes)
    symbols: dict[str, int] = {}
    for value in bare.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, given.get(value.name, ()), strict=False):
            if dim.dim_param:
                symbols[dim.dim_param] = size
    found = {}
    for value in bare.graph.output:
        dims = value.type.tensor_type.shape.dim
        found[value.name] = tuple(
            d.dim_value if d.HasField("dim_value") else symbols.get(d.dim_param, -1) for d in dims
        )
    if any(-1 in shape for shape in found.values()):
        known = known_values(model, shapes)
        found = {name: known[name][1] for name in found}
    return found


@functools.lru_cache(maxsize=32)
def _for_inference(model: bytes) -> onnx.ModelProto:
    return onnx.load_from_string(model)


@functools.lru_cache(maxsize=512)
def known_values(model: bytes, shapes: tuple[tuple[str, Shape], ...]) -> dict[str, tuple[int, Shape]]:
    """Element type and shape of everything that ONNX can infer, with some inputs' shapes written in; -1 is unknown."""
    fixed, given = onnx.ModelProto(), dict(shapes)
    fixed.CopyFrom(_for_inference(model))
    for value in fixed.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, given.get(value.name, ()), strict=False):
            dim.dim_value = size
    for value in fixed.graph.output if shapes else ():
        for dim in value.type.tensor_type.shape.dim:
            dim.ClearField("dim_param")
    del fixed.graph.value_info[:]
    done = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    return {value.name: _type_of(value) for value in (*done.input, *done.value_info, *done.output)}


def _type_of(value: onnx.ValueInfoProto) -> tuple[int, Shape]:
    kind = value.type.tensor_type
    return kind.elem_type, tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
