"""RMSNormalization -> its formula.

Requires: ``stash_type`` float32, a known rank. Ensures: squares, mean and root in float32 in a graph of any dtype, as
the operator has them.
"""

from __future__ import annotations

import onnx_ir as ir

from export.lower.emit import Emitter, refusal

__all__ = ["lower_rms_norm"]

FLOAT = ir.DataType.FLOAT
EPSILON = 1e-5  # ONNX's default


def lower_rms_norm(model: ir.Model) -> None:
    """Apply the edit in place."""
    for node in list(model.graph):
        if node.op_identifier() == ("", "RMSNormalization", ""):
            expand(Emitter(model.graph, node))


def expand(emit: Emitter) -> None:
    """The node's place in standard operators: x / sqrt(mean(x * x) + epsilon) * weight."""
    node = emit.node
    states, weight = node.inputs
    assert states is not None and weight is not None
    stash = node.attributes.get_int("stash_type", 1)
    if stash != FLOAT:
        raise refusal(node, f"stash_type {ir.DataType(stash).name.lower()}", "float32")
    dtype = states.dtype
    if states.shape is None or dtype is None:
        raise refusal(node, "an input of unknown shape", "a known rank")
    rank = len(states.shape)
    axes = range(node.attributes.get_int("axis", -1) % rank, rank)
    wide = emit.cast(states, FLOAT)
    square = emit("Mul", wide, wide, dtype=FLOAT)
    mean = emit("ReduceMean", square, emit.constant([axis - rank for axis in axes]), dtype=FLOAT, keepdims=1)
    epsilon = emit.constant(node.attributes.get_float("epsilon", EPSILON), FLOAT)
    root = emit("Sqrt", emit("Add", mean, epsilon, dtype=FLOAT), dtype=FLOAT)
    normed = emit.cast(emit("Div", wide, root, dtype=FLOAT), dtype)
    emit.replace(emit("Mul", normed, weight, dtype=dtype))
