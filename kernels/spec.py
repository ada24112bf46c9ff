"""The op ``linvt::GatherPool``: its name, attributes, shapes, policies, and a NumPy oracle.

After a native top-k the op gathers the selected tokens and averages windows of every pooling scale, one scale after
the other: ``tokens`` (B, L, D) and ``indices`` (B, k) int64 give ``pooled`` (B, M, D) in the tokens' dtype, which is
float32, float16 or bfloat16. The ONNX function body, the device kernel and the TensorRT plugins take their facts from
here and are tested against ``gather_pool``.

What every implementation does:

- Windows do not overlap and are cut in the order of ``indices``; rows that fill no window are dropped, so a scale
  larger than k gives nothing. A scale that is named twice is written twice.
- Rows of a window are added in float32 in the order of ``indices``, divided by the scale with IEEE division, and
  rounded once, to nearest even, to the tokens' dtype. Scale 1 is a copy, bit for bit.
- Infinities and NaN follow IEEE 754 (inf - inf is NaN; which NaN is not promised); a window of -0.0 gives -0.0. The
  sum is float32, so float16 tokens do not overflow in it.
- Indices lie in [0, L). The oracle raises ``IndexError``; kernels read the nearest row, never outside of ``tokens``.

The ONNX function body averages with the engine's own ``ReduceMean``: the same to rounding, in float32 about 2e-7. SVR
is exported in float32, so bodies of 16 bits do not occur.

Does not score and does not select.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DOMAIN",
    "DTYPES",
    "NAME",
    "PLUGIN_BEFORE_BODY_SINCE",
    "PLUGIN_FIELDS",
    "TENSORRT_DTYPES",
    "VERSION",
    "gather_pool",
    "plugin_attributes",
    "pooled_length",
    "scales_of_fields",
]

DOMAIN = "linvt"  # also the plugin's namespace
NAME = "GatherPool"
VERSION = 1
DTYPES = ("float32", "float16", "bfloat16")
TENSORRT_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}  # by the name of tensorrt.DataType

# The plugin's attributes, one int32 each, in registration order; 0 is no scale. One field for all scales would arrive
# wrong: with NumPy 2, the bindings of TensorRT up to 10.13 hand out [1, 1, 1] for the field [1, 2, 4].
PLUGIN_FIELDS = ("scale_0", "scale_1", "scale_2", "scale_3", "scale_4", "scale_5", "scale_6", "scale_7")

# Up to 10.6 the parser looks for a function body before it looks for a plugin (onnx-tensorrt issue 978), so the body
# must be absent for the plugin to be seen. From 10.7 on a registered plugin is found first (onnx-tensorrt PR 1004);
# newer parsers demand for it that the node names the plugin's namespace (``parseNode`` in ModelImporter.cpp).
PLUGIN_BEFORE_BODY_SINCE = (10, 7)


def pooled_length(top_k: int, scales: Sequence[int]) -> int:
    """Tokens after pooling ``top_k`` at every scale; windows that do not fit are dropped (1024 -> 1792)."""
    return sum(top_k // scale for scale in scales)


def plugin_attributes(scales: Sequence[int]) -> dict[str, list[int] | str | int]:
    """All attributes of a node that TensorRT is to import as the plugin, in the order to write them.

    ``scales`` is the op's, for whoever runs the function body. The fields follow in registration order, all of them:
    quickly deployable plugins are called with their fields by position. The rest are onnx-tensorrt's: where to look
    the plugin up, and ``aot``, which asks a quickly deployable plugin for its compiled kernel (others ignore it).

    Raises:
        ValueError: there are more scales than fields, or one below 1.
    """
    if len(scales) > len(PLUGIN_FIELDS) or min(scales) < 1:
        raise ValueError(f"the plugin takes 1 to {len(PLUGIN_FIELDS)} scales of at least 1; found {list(scales)}")
    padded = [*map(int, scales), *[0] * (len(PLUGIN_FIELDS) - len(scales))]
    fields = dict(zip(PLUGIN_FIELDS, padded, strict=True))
    where: dict[str, str | int] = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION), "aot": 1}
    return {"scales": [int(scale) for scale in scales], **fields, **where}


def scales_of_fields(values: Sequence[Any]) -> tuple[int, ...]:
    """The scales from the plugin's fields, in the order of ``PLUGIN_FIELDS``; each is a number or an array of one."""
    numbers = [int(np.asarray(value).reshape(-1)[0]) for value in values]
    return tuple(number for number in numbers if number)


def gather_pool(tokens: NDArray[Any], indices: NDArray[np.int64], scales: Sequence[int]) -> NDArray[Any]:
    """The slow, obvious form.

    Args:
        tokens: (B, L, D), float32, float16 or ml_dtypes' bfloat16.
        indices: (B, k), rows of ``tokens`` in the order in which windows are cut; rows may repeat.
        scales: window lengths; the stride equals the length.

    Returns:
        (B, M, D) with M = ``pooled_length(k, scales)``: all windows of the first scale, then of the next.

    Raises:
        IndexError: an index is negative or not below L.
    """
    batch, length, width = tokens.shape
    top_k = indices.shape[1]
    if indices.size and not (indices.min() >= 0 and indices.max() < length):
        raise IndexError(f"indices reach from {indices.min()} to {indices.max()}; expected rows of 0 to {length - 1}")
    pooled = np.empty((batch, pooled_length(top_k, scales), width), tokens.dtype)
    for clip in range(batch):
        picked = tokens[clip][indices[clip]]  # (k, D)
        windows = (picked[end - scale : end] for scale in scales for end in range(scale, top_k + 1, scale))
        for row, window in enumerate(windows):
            pooled[clip, row] = mean(window)
    return pooled


def mean(window: NDArray[Any]) -> NDArray[Any]:
    """(scale, D) -> (D,): added in float32 in order, divided, rounded once."""
    if len(window) == 1:
        only: NDArray[Any] = window[0]
        return only
    total: NDArray[np.float32] = window[0].astype(np.float32)
    with np.errstate(all="ignore"):  # inf - inf and overflow are values here
        for row in window[1:]:
            total = total + row.astype(np.float32)
        return np.asarray(total / np.float32(len(window)), window.dtype)
