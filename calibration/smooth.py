"""Move the range of an activation into the weights that read it, where that costs nothing at run time.

An activation x is divided by factors s, one a channel, and its layers' weights are multiplied by them: outliers of few
channels no longer set the scale of all (SmoothQuant, arXiv 2211.10438; for narrow weights AWQ, arXiv 2306.00978). The
division is folded into what makes x: into the weight of a norm, or into the columns of a layer whose output x is a
product with. Where x has neither origin, or other readers, it stays as it is.

All factors are powers of two: short of overflow and of subnormal numbers, which float16 has below 6e-5, dividing by
them is exact, and in floating point not a bit of any result changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.insert import LEVELS
from calibration.linears import Linear, constant_behind, matrix, replace_constant

__all__ = [
    "ALPHAS",
    "Fold",
    "Folds",
    "fold_of",
    "overflowing",
    "put_column_factors",
    "put_factors",
    "smooth_exponents",
]

Floats = NDArray[np.float32]
Exponents = NDArray[np.int8]

ALPHAS = (0.25, 0.5, 0.75)  # how much of the range is moved; none is always among what is tried
MOST = 10  # largest exponent
NORMS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True)
class Fold:
    """Where the factors of an activation go.

    Attributes:
        norm: the node whose weight and bias are divided.
        feeder: or the layer whose columns are, by name.
    """

    norm: ir.Node | None = None
    feeder: str | None = None


Folds = Mapping[str, Fold]


def fold_of(linears: Sequence[Linear], layers: Mapping[str, Linear]) -> Fold | None:
    """Where the factors of the activation that ``linears`` read can go; ``layers`` are all of the graph."""
    value = linears[0].node.inputs[0]
    assert value is not None
    readers = {linear.node for linear in linears}
    if value.is_graph_output() or any(use.node not in readers for use in value.uses()):
        return None
    producer = value.producer()
    if producer is None or producer.domain:
        return None
    if producer.op_type in NORMS and all(constant_behind(part) is not None for part in producer.inputs[1:]):
        return Fold(norm=producer)
    if producer.op_type == "Mul":
        return product_fold(producer, layers)
    return None


def product_fold(producer: ir.Node, layers: Mapping[str, Linear]) -> Fold | None:
    """The layer that one factor of a product comes from directly."""
    makers = {linear.node: name for name, linear in layers.items()}
    for factor in producer.inputs:
        node = factor.producer() if factor is not None else None
        if factor is not None and node in makers and len(factor.uses()) == 1 and not factor.is_graph_output():
            assert node is not None
            return Fold(feeder=makers[node])
    return None


def smooth_exponents(channels: Floats, weights: Sequence[Floats], alpha: float) -> Exponents:
    """log2 of s = max|x|^alpha / max|w|^(1 - alpha) per channel (SmoothQuant's formula 4), rounded; 0 where dead.

    Args:
        channels: (K,), largest magnitude of every channel.
        weights: matrices (K, N) that read it.
        alpha: in 0..1.
    """
    columns = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    alive = (channels > 0) & (columns > 0)
    logs = np.zeros(len(channels))
    logs[alive] = alpha * np.log2(channels[alive]) - (1 - alpha) * np.log2(columns[alive])
    logs[alive] -= np.median(logs[alive]) if alive.any() else 0  # the common part changes nothing
    return np.rint(logs).clip(-MOST, MOST).astype(np.int8)


def overflowing(
    fold: Fold, linears: Sequence[Linear], layers: Mapping[str, Linear], exponents: Exponents, dtype: ir.DataType
) -> str:
    """Name of the first constant that leaves its range where factors 2^exponents are folded in; empty where none does.

    What becomes too small is no fault: it costs accuracy, which is measured.

    Args:
        fold: where the factors go; there its constants keep their dtypes.
        linears: layers whose rows are multiplied by the factors, and then quantised with scales of ``dtype``.
        layers: all of the graph.
        exponents: (K,).
        dtype: what the graph computes in.
    """
    signed = exponents.astype(np.int32)
    divided = fold.norm.inputs[1:] if fold.norm is not None else [layers[str(fold.feeder)].node.inputs[1]]
    for value in divided:
        stored = constant_behind(value)
        assert value is not None and value.dtype is not None and stored is not None
        if leaves(np.ldexp(matrix(value), -signed), value.dtype):
            return str(stored.name)
    for linear in linears:
        largest = np.abs(linear.weight()).max(axis=1)  # (K,) f32
        if leaves(np.ldexp(largest, signed) / np.float32(LEVELS), dtype):
            return linear.name
    return ""


def leaves(values: Floats, dtype: ir.DataType) -> bool:
    """Whether ``dtype`` holds one of the values as infinite, or it is no number."""
    with np.errstate(over="ignore"):
        return not np.isfinite(values.astype(dtype.numpy())).all()


def put_factors(graph: ir.Graph, norm: ir.Node, exponents: Exponents) -> None:
    """Divide what a norm gives by 2^exponents: its weight and its bias."""
    for index, value in enumerate(norm.inputs[1:], 1):
        put_divided(graph, norm, index, value, exponents)


def put_column_factors(graph: ir.Graph, linear: Linear, exponents: Exponents) -> None:
    """Divide the columns of a weight that stays in floating point by 2^exponents."""
    put_divided(graph, linear.node, 1, linear.node.inputs[1], exponents)


def put_divided(graph: ir.Graph, node: ir.Node, index: int, value: ir.Value | None, exponents: Exponents) -> None:
    """Divide a constant input along its last axis."""
    stored = constant_behind(value)
    assert stored is not None
    divided = np.ldexp(matrix(value), -exponents.astype(np.int32))
    replace_constant(graph, node, index, f"{stored.name}.smoothed", divided)
