"""Attention -> MatMul, Softmax, MatMul.

Requires: 4-D queries, keys and values, sizes of heads known, a boolean or an added mask, no cache, no causal flag and
no soft cap: what ``export.ops.attention`` writes. Ensures: softmax in float32. Grouped queries fold into rows, a view
of the same memory, so keys and values are not repeated.

In a float16 graph both products stay in float16, the form that TensorRT fuses into one kernel ("Fused Attention" of its
guide, which asks for queries to be scaled before the first product as well). bfloat16 has 8 bits, too few for the large
scores of the LLMs it is chosen for: there scores are computed in float32.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from export.lower.emit import Emitter, refusal

__all__ = ["lower_attention"]

FLOAT = ir.DataType.FLOAT
KNOWN = ("scale", "softmax_precision", "is_causal", "softcap", "qk_matmul_output_mode")
CLOSED = -30000.0  # the score where a query may not look: exp gives 0, and float16 can hold it where an engine narrows


def lower_attention(model: ir.Model) -> None:
    """Apply the edit in place."""
    for node in list(model.graph):
        if node.op_identifier() == ("", "Attention", ""):
            expand(Emitter(model.graph, node), *heads(node))


def heads(node: ir.Node) -> tuple[int, int, int, int]:
    """Query heads, key heads, channels of a key's head and of a value's; refuses forms that are not expanded here."""
    for name in node.attributes:
        if name not in KNOWN:
            raise refusal(node, f"the attribute {name}", f"one of {', '.join(KNOWN)}")
    for name in ("is_causal", "qk_matmul_output_mode"):
        if node.attributes.get_int(name, 0):
            raise refusal(node, f"{name} set", "a mask made in the graph")
    if node.attributes.get_float("softcap", 0.0):
        raise refusal(node, "a soft cap", "none")
    if any(value is not None for value in node.inputs[4:]):
        raise refusal(node, "a cache as input", "queries, keys, values and a mask")
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        raise refusal(node, "several outputs read", "the first alone")
    sizes = [sizes_of(node, value) for value in node.inputs[:3]]
    (queries, channels), (keys, _), (_, width) = sizes
    return queries, keys, channels, width


def sizes_of(node: ir.Node, value: ir.Value | None) -> tuple[int, int]:
    """Heads and channels of (B, heads, S, channels)."""
    shape = value.shape if value is not None else None
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        raise refusal(node, f"an input of shape {shape}", "four axes, heads and channels fixed")
    return shape[1], shape[3]


def expand(emit: Emitter, queries: int, keys: int, channels: int, width: int) -> None:
    """The node's place in standard operators."""
    query, key, value = emit.node.inputs[:3]
    mask = emit.node.inputs[3] if len(emit.node.inputs) > 3 else None
    assert query is not None and key is not None and value is not None and value.dtype is not None
    dtype, grouped = value.dtype, queries != keys

    def view(states: ir.Value, *shape: int) -> ir.Value:
        assert states.dtype is not None
        return emit("Reshape", states, emit.constant(shape), dtype=states.dtype) if grouped else states

    scale = emit.node.attributes.get_float("scale", channels**-0.5)
    product = ir.DataType.FLOAT16 if dtype == ir.DataType.FLOAT16 else FLOAT
    # A power of two is exact in float16; what is left of the scale is applied in float32.
    first = scale if product == FLOAT else 2.0 ** round(math.log2(scale))
    scaled = emit("Mul", emit.cast(query, product), emit.constant(first, product), dtype=product)  # (B, heads, S, d)
    rows = view(scaled, 0, keys, -1, channels)  # (B, heads_kv, group * S, d)
    columns = emit("Transpose", emit.cast(key, product), dtype=product, perm=(0, 1, 3, 2))  # (B, heads_kv, d, P)
    scores = emit.cast(emit("MatMul", rows, columns, dtype=product), FLOAT)  # (B, heads_kv, group * S, P)
    if first != scale:
        scores = emit("Mul", scores, emit.constant(scale / first, FLOAT), dtype=FLOAT)
    if mask is not None:
        scores = view(masked(emit, view(scores, 0, queries, -1, 0), mask), 0, keys, -1, 0)
    weights = emit.cast(emit("Softmax", scores, dtype=FLOAT, axis=-1), dtype)
    mixed = emit("MatMul", weights, value, dtype=dtype)  # (B, heads_kv, group * S, dv)
    emit.replace(view(mixed, 0, queries, -1, width))


def masked(emit: Emitter, scores: ir.Value, mask: ir.Value) -> ir.Value:
    """Scores (B, heads, S, P) under a mask that broadcasts to them."""
    if mask.dtype == ir.DataType.BOOL:
        return emit("Where", mask, scores, emit.constant(CLOSED, FLOAT), dtype=FLOAT)
    return emit("Add", scores, emit.cast(mask, FLOAT), dtype=FLOAT)
