"""Store float32 weights in 16 bits where not a bit is lost, and cast them back in the graph.

Published checkpoints hold bfloat16 or float16 numbers; as float32 they take twice the disk and the download.
Requires: float32 initializers. Ensures: an initializer whose every value is exact in the narrow dtype is stored in it
and read through a Cast, which engines fold while loading; all others are untouched, so results do not change by a bit.
"""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

__all__ = ["narrow_weights"]

SMALLEST = 1024  # elements: below, the Cast costs more than it saves
BLOCK = 2**20  # elements
NUMPY = {ir.DataType.FLOAT16: np.dtype(np.float16), ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16)}


def narrow_weights(model: ir.Model, dtype: ir.DataType) -> bool:
    """Apply the edit in place; whether any weight was narrowed."""
    narrowed = False
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST:
            continue
        if is_exact(tensor, dtype):
            narrow(model.graph, value, tensor, dtype)
            narrowed = True
    return narrowed


def is_exact(tensor: ir.TensorProtocol, dtype: ir.DataType) -> bool:
    """Whether a round trip through ``dtype`` gives back every value; looked at in blocks, to take little memory."""
    wide = np.ascontiguousarray(tensor.numpy()).reshape(-1)
    blocks = (wide[start : start + BLOCK] for start in range(0, wide.size, BLOCK))
    with np.errstate(over="ignore", invalid="ignore"):
        return all(
            np.array_equal(block.astype(NUMPY[dtype]).astype(np.float32), block, equal_nan=True) for block in blocks
        )


def narrow(graph: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol, dtype: ir.DataType) -> None:
    """Replace one initializer by its narrow form and a Cast."""
    name, shape = value.name, ir.Shape(tensor.shape.numpy())
    assert name is not None
    lazy = ir.LazyTensor(functools.partial(narrow_tensor, tensor, dtype, name), dtype=dtype, shape=shape, name=name)
    graph.initializers.pop(name).const_value = None
    stored = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=lazy)
    graph.register_initializer(stored)
    cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT.value})
    wide = cast.outputs[0]
    wide.name, wide.shape, wide.type = f"{name}.float32", shape, ir.TensorType(ir.DataType.FLOAT)
    value.replace_all_uses_with(wide)
    graph.insert_before(graph[0], cast)


def narrow_tensor(tensor: ir.TensorProtocol, dtype: ir.DataType, name: str) -> ir.Tensor[np.ndarray[Any, Any]]:
    """The narrow copy."""
    return ir.Tensor(tensor.numpy().astype(NUMPY[dtype]), dtype=dtype, name=name)
