"""RotaryEmbedding -> products with cosines and sines.

Requires: the halves form (``interleaved`` 0) with cosines and sines of every row, no ``position_ids``. Ensures: the
same numbers in the graph's dtype; channels behind ``rotary_embedding_dim`` stay as they are.
"""

from __future__ import annotations

import onnx_ir as ir

from export.lower.emit import Emitter, refusal

__all__ = ["lower_rotary"]

Planes = dict[tuple[ir.Value, int], ir.Value]


def lower_rotary(model: ir.Model) -> None:
    """Apply the edit in place."""
    planes: Planes = {}  # heads and layers share their angles
    for node in list(model.graph):
        if node.op_identifier() == ("", "RotaryEmbedding", ""):
            expand(Emitter(model.graph, node), planes)


def expand(emit: Emitter, planes: Planes) -> None:
    """The node's place in standard operators."""
    node = emit.node
    states, cos, sin = node.inputs[:3]
    if node.attributes.get_int("interleaved", 0):
        raise refusal(node, "neighbouring channels rotated", "halves")
    if any(value is not None for value in node.inputs[3:]):
        raise refusal(node, "position_ids", "the cosines and sines of every row")
    assert states is not None and cos is not None and sin is not None
    shape, dtype = states.shape, states.dtype
    if shape is None or dtype is None or len(shape) not in (3, 4) or not isinstance(shape[-1], int):
        raise refusal(node, f"an input of shape {shape}", "three or four axes, the last one fixed")
    heads = node.attributes.get_int("num_heads", 0)
    if len(shape) == 3:
        if not heads or shape[-1] % heads:
            raise refusal(node, f"num_heads {heads} for {shape[-1]} channels", "a number that divides them")
        split = emit("Reshape", states, emit.constant([0, 0, heads, shape[-1] // heads]), dtype=dtype)
        turned = turn(emit, split, shape[-1] // heads, cos, sin, 2, planes)
        emit.replace(emit("Reshape", turned, emit.constant([0, 0, shape[-1]]), dtype=dtype))
    else:
        emit.replace(turn(emit, states, shape[-1], cos, sin, 1, planes))


def turn(
    emit: Emitter, states: ir.Value, channels: int, cos: ir.Value, sin: ir.Value, axis: int, planes: Planes
) -> ir.Value:
    """Rotate a head's first channels; ``axis`` counts the heads: (B, heads, S, d) for 1, (B, S, heads, d) for 2."""
    dtype, dims = states.dtype, emit.node.attributes.get_int("rotary_embedding_dim", 0) or channels
    assert dtype is not None
    rest = []
    if dims < channels:
        sizes = emit.constant([dims, channels - dims])
        states, *rest = emit.many("Split", states, sizes, dtype=dtype, outputs=2, axis=-1)
    first, second = emit.many("Split", states, emit.constant([dims // 2] * 2), dtype=dtype, outputs=2, axis=-1)
    cosines, sines = (plane(emit, angles, axis, planes) for angles in (cos, sin))

    def times(one: ir.Value, other: ir.Value) -> ir.Value:
        return emit("Mul", one, other, dtype=dtype)

    left = emit("Sub", times(first, cosines), times(second, sines), dtype=dtype)
    right = emit("Add", times(second, cosines), times(first, sines), dtype=dtype)
    return emit("Concat", left, right, *rest, dtype=dtype, axis=-1)


def plane(emit: Emitter, angles: ir.Value, axis: int, planes: Planes) -> ir.Value:
    """(B, S, dims / 2) with an axis for the heads."""
    assert angles.dtype is not None
    if (angles, axis) not in planes:
        planes[angles, axis] = emit("Unsqueeze", angles, emit.constant([axis]), dtype=angles.dtype)
    return planes[angles, axis]
