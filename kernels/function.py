"""``linvt::GatherPool`` as an ONNX function whose body is standard operators.

ONNX Runtime inlines the body; TensorRT puts a plugin of the same name in its place when one is registered. The
window counts are constants of the body, so a function belongs to one ``top_k``; the node carries ``scales`` for
plugins.

Needs ``onnx``; the runtime does not import this module.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import FunctionProto, NodeProto, helper, numpy_helper

from kernels.spec import DOMAIN, NAME, pooled_length

__all__ = ["function_body"]


def function_body(top_k: int, scales: Sequence[int], opset: int) -> FunctionProto:
    """The function for ``tokens`` (B, L, D) and ``indices`` (B, top_k) -> ``pooled`` (B, M, D)."""
    nodes = [
        constant("last", [-1]),
        helper.make_node("Unsqueeze", ["indices", "last"], ["rows"]),
        helper.make_node("GatherND", ["tokens", "rows"], ["picked"], batch_dims=1),
    ]
    used = [scale for scale in scales if scale <= top_k]
    for scale in used:
        nodes += window_means(top_k, scale)
    nodes.append(helper.make_node("Concat", [f"mean_{scale}" for scale in used], ["pooled"], axis=1))
    return helper.make_function(
        DOMAIN,
        NAME,
        ["tokens", "indices"],
        ["pooled"],
        nodes,
        [helper.make_opsetid("", opset)],
        attributes=["scales"],
        doc_string=f"{top_k} gathered tokens pooled at {list(used)}: {pooled_length(top_k, used)} tokens",
    )


def window_means(top_k: int, scale: int) -> list[NodeProto]:
    """Nodes that average windows of ``scale`` rows of ``picked`` (B, top_k, D) into ``mean_{scale}``."""
    windows = top_k // scale
    return [
        constant(f"start_{scale}", [0]),
        constant(f"end_{scale}", [windows * scale]),
        constant(f"axis_{scale}", [1]),
        helper.make_node("Slice", ["picked", f"start_{scale}", f"end_{scale}", f"axis_{scale}"], [f"cut_{scale}"]),
        constant(f"shape_{scale}", [0, windows, scale, -1]),
        helper.make_node("Reshape", [f"cut_{scale}", f"shape_{scale}"], [f"windows_{scale}"]),
        constant(f"window_axis_{scale}", [2]),
        helper.make_node("ReduceMean", [f"windows_{scale}", f"window_axis_{scale}"], [f"mean_{scale}"], keepdims=0),
    ]


def constant(name: str, values: list[int]) -> NodeProto:
    """A node that yields int64 ``values``."""
    tensor = numpy_helper.from_array(np.array(values, np.int64))
    return helper.make_node("Constant", [], [name], value=tensor)
