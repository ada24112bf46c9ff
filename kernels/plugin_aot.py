"""``linvt::GatherPool`` as a quickly deployable TensorRT plugin whose kernel is baked into the engine.

For TensorRT 10.9 and newer: while the engine is built, TensorRT asks for output shapes, PTX and launch expressions; at
run time it needs no plugin and no Python. TensorRT reads the annotations of ``shapes`` and ``kernel`` as types, so this
module cannot postpone their evaluation, and wants them in its own order: tensors, attributes, ``outputs``, ``tactic``.

Needs ``tensorrt`` with ``tensorrt.plugin``. Does not compile: PTX comes from ``kernels.ptx``.
"""

# mypy: disable-error-code="no-any-unimported, misc"

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add

import numpy as np
import tensorrt as trt  # noqa: F401  kernels.register asks which one this module is bound to
import tensorrt.plugin as trtp
from numpy.typing import NDArray

from kernels.ptx import Kernel
from kernels.spec import DOMAIN, NAME, TENSORRT_DTYPES, scales_of_fields

__all__ = ["register"]

ID = f"{DOMAIN}::{NAME}"

_find: list[Callable[[str, Sequence[int]], Kernel]] = []  # of the latest registration; TensorRT calls back by name only


def register(find: Callable[[str, Sequence[int]], Kernel]) -> None:
    """Put the plugin into TensorRT's registry, once; ``find`` gives the kernel for a dtype and scales."""
    if not _find:
        trtp.register(ID)(shapes)
        trtp.aot_impl(ID)(kernel)
    _find[:] = [find]


def shapes(
    tokens: trtp.TensorDesc,
    indices: trtp.TensorDesc,
    scale_0: NDArray[np.int32],
    scale_1: NDArray[np.int32],
    scale_2: NDArray[np.int32],
    scale_3: NDArray[np.int32],
    scale_4: NDArray[np.int32],
    scale_5: NDArray[np.int32],
    scale_6: NDArray[np.int32],
    scale_7: NDArray[np.int32],
) -> tuple[trtp.TensorDesc]:
    """Tokens (B, L, D), indices (B, k) -> (B, M, D) of the tokens' dtype."""
    scales = scales_of_fields([scale_0, scale_1, scale_2, scale_3, scale_4, scale_5, scale_6, scale_7])
    top_k = indices.shape_expr[1]
    length = reduce(add, (top_k // scale for scale in scales))
    return (trtp.from_shape_expr((tokens.shape_expr[0], length, tokens.shape_expr[2]), tokens.dtype),)


def kernel(
    tokens: trtp.TensorDesc,
    indices: trtp.TensorDesc,
    scale_0: NDArray[np.int32],
    scale_1: NDArray[np.int32],
    scale_2: NDArray[np.int32],
    scale_3: NDArray[np.int32],
    scale_4: NDArray[np.int32],
    scale_5: NDArray[np.int32],
    scale_6: NDArray[np.int32],
    scale_7: NDArray[np.int32],
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
    """Entry, PTX, grid and block, and the scalars that TensorRT passes between inputs and outputs."""
    scales = scales_of_fields([scale_0, scale_1, scale_2, scale_3, scale_4, scale_5, scale_6, scale_7])
    found = _find[-1](TENSORRT_DTYPES[tokens.dtype.name], scales)
    batch, length, width = tokens.shape_expr
    top_k = indices.shape_expr[1]
    launch = trtp.KernelLaunchParams(
        grid_x=trtp.cdiv(top_k, found.facts.layout.rows),
        grid_y=trtp.cdiv(width, found.facts.layout.block),
        grid_z=batch,
        block_x=found.threads,
        shared_mem=found.facts.shared,
    )
    scalars = trtp.SymIntExprs.from_tuple([trtp.SymInt32(extent) for extent in (length, top_k, width)])
    return found.facts.entry, found.ptx, launch, scalars
