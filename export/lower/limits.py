"""What TensorRT's parser asks of single nodes beyond operator and dtype: axes, attributes, constants.

Sources: the column "Restrictions" of onnx-tensorrt's ``docs/operators.md`` (10.1, 10.15, 10.16 and 11.1), its
``docs/Changelog.md`` in between, the assertions of its ``onnxOpImporters.cpp`` (10.1, 10.16) and NVIDIA's
``NvInfer.h``; quantised weights by ``calibration.qdq_rules``.

Axes of Slice are free since 10.3. Those of Squeeze and Unsqueeze may be computed since 10.7, of what the parser can
resolve to a constant; what that is, is not modelled: a constant is asked for in every release.

Knows what the graphs of this project could hold, not every operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from calibration.qdq_rules import block_problems, fused, written, zero_problems
from calibration.trt_rules import constant, is_blocked, problem
from export.lower.release import Release

__all__ = ["LIMITS", "dtype_of"]

SPATIAL = (4, 5)  # axes of 2-D and 3-D pictures
RESIZE = {
    "mode": ("nearest", "linear"),
    "coordinate_transformation_mode": (
        *("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"),
    ),
    "nearest_mode": ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"),
    "keep_aspect_ratio_policy": ("stretch",),
}

Limit = Callable[[ir.Node, Release], Iterator[str]]


def dtype_of(value: ir.Value | None) -> ir.DataType | None:
    """A value's dtype where it is known."""
    tensor = constant(value)
    return tensor.dtype if tensor is not None else value.dtype if value is not None else None


def attention(node: ir.Node, release: Release) -> Iterator[str]:
    """``IAttention``: 4-D, one output, no cache; a mask and the causal flag exclude each other."""
    if len(node.outputs) != 1:
        yield problem(node, f"{len(node.outputs)} outputs", "one")
    yield from axes_problems(node, 4, (4,))
    if any(value is not None for value in node.inputs[4:]):
        yield problem(node, "a cache as input", "queries, keys, values and a mask")
    for name in ("softcap", "qk_matmul_output_mode"):
        if name in node.attributes and node.attributes[name].value:
            yield problem(node, f"{name} set", "none")
    if node.attributes.get_int("is_causal", 0) and len(node.inputs) > 3 and node.inputs[3] is not None:
        yield problem(node, "a mask and is_causal", "one of them")


def tensor_scatter(node: ir.Node, release: Release) -> Iterator[str]:
    """``IKVCacheUpdateLayer``: 4-D along axis -2, linear."""
    yield from axes_problems(node, 2, (4,))
    if (axis := node.attributes.get_int("axis", -2)) != -2:
        yield problem(node, f"axis {axis}", "-2")
    if (mode := node.attributes.get_string("mode", "linear")) != "linear":
        yield problem(node, f"mode {mode}", "linear")


def rotary_embedding(node: ir.Node, release: Release) -> Iterator[str]:
    """``IRotaryEmbeddingLayer``: 4-D, positions in int64."""
    yield from axes_problems(node, 1, (4,))
    positions = dtype_of(node.inputs[3]) if len(node.inputs) > 3 else None
    if positions not in (None, ir.DataType.INT64):
        yield problem(node, "position_ids of another dtype", "int64")


def top_k(node: ir.Node, release: Release) -> Iterator[str]:
    """Sorted, and K a constant that is not too large."""
    if not node.attributes.get_int("sorted", 1):
        yield problem(node, "sorted 0", "1")
    count = constant(node.inputs[1])
    if count is None:
        yield problem(node, "a computed K", f"a constant of at most {release.largest_k}")
    elif (largest := int(count.numpy().max(initial=0))) > release.largest_k:
        yield problem(node, f"K {largest}", f"at most {release.largest_k}")


def constant_axes(node: ir.Node, release: Release) -> Iterator[str]:
    """Axes that come as the second input are a constant."""
    yield from constant_problems(node, 1)


def pad(node: ir.Node, release: Release) -> Iterator[str]:
    """The same of the fourth, where the release asks for it."""
    if release.constant_pad_axes:
        yield from constant_problems(node, 3)


def first_output(node: ir.Node, release: Release) -> Iterator[str]:
    """The first output is all there is."""
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        yield problem(node, "several outputs read", "the first alone")


def pooling(node: ir.Node, release: Release) -> Iterator[str]:
    """2-D or 3-D, without dilations or indices."""
    yield from axes_problems(node, 1, SPATIAL)
    if any(step != 1 for step in node.attributes.get_ints("dilations", ())):
        yield problem(node, "dilations", "none")
    yield from first_output(node, release)


def resize(node: ir.Node, release: Release) -> Iterator[str]:
    """The ways of resizing that the parser knows."""
    for name, known in RESIZE.items():
        if (value := node.attributes.get_string(name, known[0])) not in known:
            yield problem(node, f"{name} {value}", f"one of {', '.join(known)}")
    if node.attributes.get_int("antialias", 0):
        yield problem(node, "antialias", "none")


def scatter_nd(node: ir.Node, release: Release) -> Iterator[str]:
    """No reduction."""
    if (reduction := node.attributes.get_string("reduction", "none")) != "none":
        yield problem(node, f"reduction {reduction}", "none")


def quantize(node: ir.Node, release: Release) -> Iterator[str]:
    """Symmetric int8."""
    kind = written(node)
    if kind != ir.DataType.INT8:
        yield problem(node, f"{kind.name.lower()} values written", "int8")
    elif (scale := constant(node.inputs[1])) is not None:
        yield from zero_problems(node, kind, tuple(scale.shape.numpy()))


def dequantize(node: ir.Node, release: Release) -> Iterator[str]:
    """Symmetric; 4-bit and blocked weights are matrices with blocks along the input channels."""
    tensor, scale = constant(node.inputs[0]), constant(node.inputs[1])
    if is_blocked(node) and tensor is not None:
        yield from block_problems(node, tensor, [layer for layer, _ in fused(node)])
    elif (kind := dtype_of(node.inputs[0])) is not None and scale is not None:
        yield from zero_problems(node, kind, tuple(scale.shape.numpy()))


def constant_problems(node: ir.Node, index: int) -> Iterator[str]:
    """An input of axes that is there and not known."""
    axes = node.inputs[index] if len(node.inputs) > index else None
    if axes is not None and constant(axes) is None:
        yield problem(node, "computed axes", "a constant")


def axes_problems(node: ir.Node, count: int, allowed: tuple[int, ...]) -> Iterator[str]:
    """The first of ``count`` inputs that has another number of axes."""
    for value in node.inputs[:count]:
        if value is None:
            continue
        rank = len(value.shape) if value.shape is not None else None
        if rank not in allowed:
            found = "unknown shape" if rank is None else f"{rank} axes"
            yield problem(node, f"an input of {found}", f"{' or '.join(map(str, allowed))} axes")
            return


LIMITS: dict[str, Limit] = {
    "Attention": attention,
    "AveragePool": pooling,
    "CumSum": constant_axes,
    "DequantizeLinear": dequantize,
    "LayerNormalization": first_output,
    "MaxPool": pooling,
    "Pad": pad,
    "QuantizeLinear": quantize,
    "ReduceMax": constant_axes,
    "ReduceMean": constant_axes,
    "ReduceMin": constant_axes,
    "ReduceSum": constant_axes,
    "Resize": resize,
    "RotaryEmbedding": rotary_embedding,
    "ScatterND": scatter_nd,
    "Squeeze": constant_axes,
    "TensorScatter": tensor_scatter,
    "TopK": top_k,
    "Unsqueeze": constant_axes,
}
