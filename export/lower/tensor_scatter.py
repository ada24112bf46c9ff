"""TensorScatter -> for every row of the cache, the row that is written there or what it held.

Requires: one sequence (batch 1), mode "linear", rows along axis -2 of (1, heads, P, d). Ensures: row p becomes new row
p - write_index where there is one, by Gather and Where: indices number P, where a scatter takes one for every element.
Rows that would be written outside of the cache are dropped; the operator leaves them undefined.
"""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from export.lower.emit import Emitter, refusal

__all__ = ["lower_tensor_scatter"]

INT64, BOOL = ir.DataType.INT64, ir.DataType.BOOL
Rows = dict[Hashable, tuple[ir.Value, ir.Value]]


def lower_tensor_scatter(model: ir.Model) -> None:
    """Apply the edit in place."""
    rows: Rows = {}  # keys and values of all layers are written at the same rows
    for node in list(model.graph):
        if node.op_identifier() == ("", "TensorScatter", ""):
            expand(Emitter(model.graph, node), rows)


def expand(emit: Emitter, rows: Rows) -> None:
    """The node's place in standard operators."""
    node = emit.node
    past, new = node.inputs[:2]
    index = node.inputs[2] if len(node.inputs) > 2 else None
    assert past is not None and new is not None
    if node.attributes.get_string("mode", "linear") != "linear":
        raise refusal(node, "another mode than linear", "linear")
    if past.shape is None or len(past.shape) != 4 or node.attributes.get_int("axis", -2) not in (-2, 2):
        raise refusal(node, f"a cache of shape {past.shape}", "(1, heads, rows, channels), written along its rows")
    if index is None or index.shape is None or list(index.shape) != [1]:
        raise refusal(node, f"a write index of shape {index and index.shape}", "one number")
    source, inside = written(emit, past, new, index, rows)
    dtype = past.dtype
    assert dtype is not None
    moved = emit("Gather", new, source, dtype=dtype, axis=2)  # (1, heads, P, d)
    emit.replace(emit("Where", inside, moved, past, dtype=dtype))


def written(emit: Emitter, past: ir.Value, new: ir.Value, index: ir.Value, rows: Rows) -> tuple[ir.Value, ir.Value]:
    """For every cache row, (P,) the new row that belongs there and (P, 1) whether there is one."""
    sizes = [value.shape[2] if value.shape is not None else None for value in (past, new)]
    known = [size if isinstance(size, int) else size and size.value for size in sizes]
    key = (index, *known) if None not in known else emit.node
    if key not in rows:
        slots, count = emit("Range", *bounds(emit, past), dtype=INT64), emit("Shape", new, dtype=INT64, start=2, end=3)
        offsets = emit("Sub", slots, index, dtype=INT64)  # (P,)
        zero, one = emit.constant([0]), emit.constant([1])
        last = emit("Sub", count, one, dtype=INT64)
        source = emit("Max", emit("Min", offsets, last, dtype=INT64), zero, dtype=INT64)
        begun = emit("GreaterOrEqual", offsets, zero, dtype=BOOL)
        inside = emit("And", begun, emit("Less", offsets, count, dtype=BOOL), dtype=BOOL)
        rows[key] = source, emit("Unsqueeze", inside, one, dtype=BOOL)
    return rows[key]


def bounds(emit: Emitter, past: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """0, P and 1 for a Range over the cache's rows."""
    size = emit("Shape", past, dtype=INT64, start=2, end=3)
    capacity = emit("Squeeze", size, emit.constant([0]), dtype=INT64)
    return emit.constant(0), capacity, emit.constant(1)
