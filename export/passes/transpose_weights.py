"""Transpose(weight) -> the transposed weight under the same name.

Requires: initializers that are memory-resident tensors. Ensures: no Transpose reads an initializer; a weight used both
ways keeps both forms. The transposed copy is made while the file is written, one at a time.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["transpose_weights"]


def transpose_weights(model: ir.Model) -> None:
    """Apply the edit in place."""
    graph = model.graph
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if node.op_type != "Transpose" or source is None or not source.is_initializer():
            continue
        order = node.attributes["perm"].as_ints()
        node.outputs[0].replace_all_uses_with(transposed(graph, source, tuple(order)))
        graph.remove(node, safe=True)


def transposed(graph: ir.Graph, source: ir.Value, order: tuple[int, ...]) -> ir.Value:
    """An initializer that holds ``source`` in another axis order."""
    tensor = source.const_value
    assert tensor is not None and source.name is not None
    sizes = tensor.shape.numpy()
    shape = ir.Shape([sizes[axis] for axis in order])
    copy = f"{source.name}.transposed_{'_'.join(map(str, order))}"
    if copy in graph.initializers:
        return graph.initializers[copy]
    alone = len(source.uses()) == 1
    name = source.name if alone else copy
    lazy = ir.LazyTensor(
        functools.partial(transpose_tensor, tensor, order, name), dtype=tensor.dtype, shape=shape, name=name
    )
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=lazy)
    if alone:
        graph.initializers.pop(name).const_value = None
    graph.register_initializer(value)
    return value


def transpose_tensor(tensor: ir.TensorProtocol, order: tuple[int, ...], name: str) -> ir.Tensor[np.ndarray[Any, Any]]:
    """The transposed copy, contiguous."""
    return ir.Tensor(np.ascontiguousarray(tensor.numpy().transpose(order)), name=name)
