"""Tensors that stay on ONNX Runtime's device between stages: memory, and graphs that read and write it in place.

The same code runs over memory of the host, which is how it is tested. ONNX Runtime's Python API offers no pinned
memory for its own CUDA provider, so frames are copied from ordinary memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.backend import Tensor
from runtime.device_tensor import DeviceTensor
from runtime.dtypes import NUMBERS, NUMPY
from runtime.manifest import StageSpec
from runtime.ort_errors import translated

__all__ = ["SILENT", "OrtBlock", "OrtDeviceGraph", "device_empty", "lengthening_graph"]

SILENT = 4  # only fatal messages: everything else arrives as an exception
FLOAT = np.dtype(np.float32)


class OrtBlock:
    """Memory that ONNX Runtime allocated; ``owner`` is kept for as long."""

    def __init__(self, value: ort.OrtValue, owner: object = None) -> None:
        self.value = value
        self.owner = owner
        self.address: int = value.data_ptr()

    def read(self, offset: int, size: int) -> NDArray[np.uint8]:
        """A copy of ``size`` bytes on the host; ONNX Runtime waits for every run itself."""
        with translated("copy a result to the host", "open the bundle again"):
            flat = self.value.numpy().reshape(-1).view(np.uint8)
        part: NDArray[np.uint8] = flat[offset : offset + size].copy()
        return part


def device_empty(shape: tuple[int, ...], dtype: np.dtype[Any], device: str) -> DeviceTensor:
    """Memory for so many values on a device, "cpu" or "cuda"."""
    with translated(f"allocate {math.prod(shape) * dtype.itemsize} bytes", "use fewer frames or tokens"):
        value = ort.OrtValue.ortvalue_from_shape_and_type([max(1, axis) for axis in shape], dtype.type, device, 0)
    return DeviceTensor(OrtBlock(value), 0, shape, dtype)


class OrtDeviceGraph:
    """A stage whose inputs are taken where they lie and whose outputs stay on the device."""

    def __init__(self, session: ort.InferenceSession, stage: str, spec: StageSpec, device: str) -> None:
        self.session = session
        self.stage = stage
        self.device = device
        self.outputs = {tensor.name: tensor.dtype for tensor in spec.outputs}
        shapes = {tensor.name: tensor.shape for tensor in spec.outputs}
        self.fixed = {  # shapes that are known before a run
            name: tuple(map(int, shape)) for name, shape in shapes.items() if all(isinstance(x, int) for x in shape)
        }

    def run(self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Inputs by name -> outputs by name, on the device; those given are written in place."""
        given = outputs or {}
        results: dict[str, Tensor] = {}
        binding = self.session.io_binding()
        options = ort.RunOptions()
        options.log_severity_level = SILENT
        with translated(f"run {self.stage}", "use fewer frames, or open with --verify"):
            for name, value in feeds.items():
                self.bind_input(binding, name, value)
            for name, element in self.outputs.items():
                target, dtype = given.get(name), NUMPY[element]
                if not isinstance(target, DeviceTensor) and name in self.fixed:
                    target = device_empty(self.fixed[name], dtype, self.device)
                if isinstance(target, DeviceTensor):
                    results[name] = target
                    assert target.dtype == dtype, "the caller takes the dtype that the manifest says"
                    binding.bind_output(name, self.device, 0, NUMBERS[element], list(target.shape), target.address)
                else:
                    binding.bind_output(name, self.device)
            self.session.run_with_iobinding(binding, options)
            for (name, element), value in zip(self.outputs.items(), binding.get_outputs(), strict=True):
                if name not in results:
                    results[name] = DeviceTensor(OrtBlock(value, binding), 0, tuple(value.shape()), NUMPY[element])
        for name, target in given.items():
            if not isinstance(target, DeviceTensor):
                np.copyto(target, np.asarray(results[name]))
                results[name] = target
        return results

    def bind_input(self, binding: ort.IOBinding, name: str, value: Tensor) -> None:
        """Bind where it lies; what lies on the host is copied by ONNX Runtime where it has to be."""
        if isinstance(value, DeviceTensor):
            binding.bind_input(name, self.device, 0, value.dtype.type, list(value.shape), value.address)
        else:
            binding.bind_cpu_input(name, np.ascontiguousarray(value))


def lengthening_graph(element: int) -> bytes:
    """A model of one Concat: ``old`` (1, H, P, D) and ``rest`` (1, H, R, D) -> ``new`` (1, H, P + R, D).

    With it a cache moves to a larger one on the device. Written out as a protobuf message by hand (field numbers of
    onnx.proto), because the runtime has no onnx.

    Args:
        element: number of the dtype in ONNX.
    """
    axis = text(1, "axis") + number(20, 2) + number(3, 2)  # AttributeProto: name, type INT, i
    node = text(1, "old") + text(1, "rest") + text(2, "new") + text(4, "Concat") + part(5, axis)
    tensors = [part(field, value_info(name, element)) for field, name in ((11, "old"), (11, "rest"), (12, "new"))]
    graph = part(1, node) + text(2, "lengthen") + b"".join(tensors)
    return number(1, 8) + part(7, graph) + part(8, number(2, 13))  # ModelProto: IR version 8, opset 13


def value_info(name: str, element: int) -> bytes:
    """ValueInfoProto of a tensor with four free axes."""
    axes = b"".join(part(1, text(2, f"{name}{axis}")) for axis in range(4))
    return text(1, name) + part(2, part(1, number(1, element) + part(2, axes)))


def part(field: int, content: bytes) -> bytes:
    """A protobuf field of bytes; all of ours are shorter than 2 ** 14."""
    size = len(content)
    assert size < 2**14
    length = bytes([size]) if size < 128 else bytes([size % 128 + 128, size // 128])
    return tag(field, 2) + length + content


def text(field: int, content: str) -> bytes:
    """A protobuf field of text."""
    return part(field, content.encode())


def number(field: int, value: int) -> bytes:
    """A protobuf field of a number below 128."""
    return tag(field, 0) + bytes([value])


def tag(field: int, kind: int) -> bytes:
    """What comes before a protobuf field."""
    key = field << 3 | kind
    return bytes([key]) if key < 128 else bytes([key % 128 + 128, key // 128])
