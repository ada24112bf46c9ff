"""How large a KV cache is made, what holds its values on the host, and what a step is fed: the same for every backend.

Allocates nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.dtypes import NUMBERS, NUMPY
from runtime.errors import BackendError
from runtime.manifest import Dtype, StageSpec

__all__ = ["ANSWER_ROOM", "CACHE_BLOCK", "CACHE_DTYPES", "cache_dtype", "grown", "in_blocks", "rounded", "step_feeds"]

CACHE_BLOCK = 64  # tokens: sizes of the cache are rounded up so that questions of similar length reuse memory
ANSWER_ROOM = 128  # tokens of an answer before the cache grows for the first time
CACHE_DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")  # all of them have a zero of zero bits


def cache_dtype(spec: StageSpec) -> tuple[int, np.dtype[Any]]:
    """The number of the cache's dtype in ONNX, and what holds it.

    Raises:
        BackendError: no cache is of this dtype.
    """
    dtype = next(tensor.dtype for tensor in spec.inputs if tensor.name == "past_key.0")
    if dtype not in CACHE_DTYPES:
        raise BackendError(
            f"{spec.file} has a KV cache of {dtype}, expected {', '.join(CACHE_DTYPES)}; export the bundle again"
        )
    return NUMBERS[dtype], NUMPY[dtype]


def grown(room: int, rows: int, capacity: int) -> int:
    """Tokens of the cache after one of ``room``: twice as many, or ``rows`` and an answer, in whole blocks."""
    return in_blocks(max(2 * room, rows + ANSWER_ROOM), capacity)


def in_blocks(tokens: int, most: int) -> int:
    """Tokens rounded up to whole blocks, at most ``most``."""
    return rounded(tokens, CACHE_BLOCK, most)


def rounded(room: int, block: int, capacity: int) -> int:
    """Tokens rounded up to whole blocks, at most the capacity."""
    return min(-(-room // block) * block, capacity)


def step_feeds(
    embeds: NDArray[np.float32], position_ids: NDArray[np.int64], length: int
) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
    """Rows (S, D) at positions (axes, S) behind ``length`` tokens -> the graph's inputs without the cache.

    Positions on one axis are (1, S), on three (3, 1, S).
    """
    return {
        "inputs_embeds": np.ascontiguousarray(embeds[None]),
        "position_ids": np.ascontiguousarray(position_ids if len(position_ids) == 1 else position_ids[:, None]),
        "write_index": np.array([length], np.int64),
    }
