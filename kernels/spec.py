"""The op ``linvt::GatherPool``: its name, attributes, shapes, and a NumPy oracle.

After a native top-k the op gathers the selected tokens and averages windows of every pooling scale, one scale after
the other. Everything that implements it (the ONNX function body, device kernels) is tested against ``gather_pool``.

Does not score and does not select.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["DOMAIN", "NAME", "VERSION", "gather_pool", "pooled_length"]

DOMAIN = "linvt"
NAME = "GatherPool"
VERSION = 1


def pooled_length(top_k: int, scales: Sequence[int]) -> int:
    """Tokens after pooling ``top_k`` at every scale; windows that do not fit are dropped (1024 -> 1792)."""
    return sum(top_k // scale for scale in scales)


def gather_pool(tokens: NDArray[np.float32], indices: NDArray[np.int64], scales: Sequence[int]) -> NDArray[np.float32]:
    """The slow, obvious form.

    Args:
        tokens: (B, L, D).
        indices: (B, k), rows of ``tokens`` in the order in which windows are cut.
        scales: window lengths; the stride equals the length.

    Returns:
        (B, M, D) with M = ``pooled_length(k, scales)``: all windows of the first scale, then of the next.
        A window's mean is taken in float32 and returned in the dtype of ``tokens``.
    """
    clips = []
    for rows, chosen in zip(tokens, indices, strict=True):
        picked = rows[chosen]  # (k, D)
        windows = [
            picked[start : start + scale].mean(0, dtype=np.float32)
            for scale in scales
            for start in range(0, len(chosen) // scale * scale, scale)
        ]
        clips.append(np.stack(windows))
    return np.stack(clips).astype(tokens.dtype)
