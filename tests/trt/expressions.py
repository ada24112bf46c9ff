"""Symbolic sizes of a double: what TensorRT hands to plugins for shapes and launches, as trees that can be stored.

A tree is an integer, ``["dim", input, axis]`` or ``[operation, left, right]``. Also the plugin fields and the little
containers of symbols, with the traps of the real ones.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tests.trt.double import Double

__all__ = [
    "DimensionExpr",
    "DimsExprs",
    "ExprBuilder",
    "Field",
    "FieldCollection",
    "SymExprs",
    "Tree",
    "evaluate",
]

Tree = Any  # int | list

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "SUM": operator.add,
    "PROD": operator.mul,
    "SUB": operator.sub,
    "MAX": max,
    "MIN": min,
    "EQUAL": lambda a, b: int(a == b),
    "LESS": lambda a, b: int(a < b),
    "FLOOR_DIV": operator.floordiv,
    "CEIL_DIV": lambda a, b: -(-a // b),
}


def evaluate(tree: Tree, shapes: Sequence[Sequence[int]]) -> int:
    """The number, for given shapes of a plugin's inputs."""
    if isinstance(tree, int):
        return tree
    if tree[0] == "dim":
        return int(shapes[tree[1]][tree[2]])
    return OPERATIONS[tree[0]](evaluate(tree[1], shapes), evaluate(tree[2], shapes))


class DimensionExpr:
    """``IDimensionExpr``."""

    face = "IDimensionExpr"

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    def is_constant(self) -> bool:
        return isinstance(self.tree, int)

    def get_constant_value(self) -> int:
        assert isinstance(self.tree, int), "get_constant_value of what is not constant"
        return self.tree

    def is_size_tensor(self) -> bool:
        return False


class ExprBuilder:
    """``IExprBuilder``."""

    face = "IExprBuilder"

    def constant(self, arg0: int) -> DimensionExpr:
        return DimensionExpr(int(arg0))

    def operation(self, arg0: Any, arg1: DimensionExpr, arg2: DimensionExpr) -> DimensionExpr:
        if isinstance(arg1.tree, int) and isinstance(arg2.tree, int):
            return DimensionExpr(OPERATIONS[arg0.name](arg1.tree, arg2.tree))
        return DimensionExpr([arg0.name, arg1.tree, arg2.tree])


class DimsExprs:
    """``DimsExprs``: a shape of expressions."""

    face = "DimsExprs"

    def __init__(self, world: Double, arg0: Any = 0) -> None:
        size = arg0 if isinstance(arg0, int) else len(arg0)
        self.items: list[Any] = [None] * size if isinstance(arg0, int) else [world.bare(item) for item in arg0]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, arg0: int) -> Any:
        return self.items[arg0]

    def __setitem__(self, arg0: int, arg1: DimensionExpr) -> None:
        self.items[arg0] = arg1


class SymExprs:
    """``ISymExprs``: what a kernel gets between its inputs and outputs."""

    face = "ISymExprs"

    def __init__(self) -> None:
        self.items: list[Any] = []

    @property
    def nbSymExprs(self) -> int:  # noqa: N802
        return len(self.items)

    @nbSymExprs.setter
    def nbSymExprs(self, count: int) -> None:  # noqa: N802
        self.items = [None] * count

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, arg0: int) -> Any:
        return self.items[arg0]

    def __setitem__(self, arg0: int, arg1: Any) -> None:
        self.items[arg0] = arg1


class Field:
    """``PluginField``: a name, a type and values."""

    face = "PluginField"

    def __init__(self, world: Double, name: Any = "", data: Any = None, type: Any = None) -> None:  # noqa: A002
        self.name = name.decode() if isinstance(name, bytes) else name
        self.type = world.trt.PluginFieldType.UNKNOWN if type is None else type
        self.size = data.size if isinstance(data, np.ndarray) else 0 if data is None else len(data)
        self.values = data if isinstance(data, np.ndarray) else np.frombuffer(data or b"", np.int8)
        self.world = world

    @property
    def data(self) -> NDArray[Any]:
        """A copy; the bindings of 10.3, 10.9 and 10.13 (seen in them) repeat the first value."""
        repeats = self.world.release < (10, 16) and self.size
        return np.full_like(self.values, self.values.flat[0]) if repeats else self.values.copy()


class FieldCollection:
    """``PluginFieldCollection``: a list of fields."""

    face = "PluginFieldCollection"

    def __init__(self, world: Double, arg0: Any = ()) -> None:
        self.items: list[Any] = list(arg0.items if isinstance(arg0, FieldCollection) else arg0)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, arg0: Any) -> Any:
        return self.items[arg0]

    def append(self, x: Any) -> None:
        self.items.append(x)
