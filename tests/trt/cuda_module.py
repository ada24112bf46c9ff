"""Modules with exactly the names of a real ``cuda.bindings`` module, whose calls go to a double's implementation.

Arguments are bound to the real signature; what a function does is ``cuda_calls.py``'s business.
"""

from __future__ import annotations

import enum
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

from tests.trt.signatures import bind
from tests.trt.surface import CudaClass, CudaFunction, CudaModule

__all__ = ["NotModelledError", "cuda_module"]

INTEGERS = ("int", "unsigned int", "size_t", "unsigned long long", "long long", "unsigned char")

Call = Callable[[str, dict[str, Any]], tuple[Any, ...]]  # (function, arguments by name) -> what it returns


class NotModelledError(NotImplementedError):
    """The real library has it, the double does nothing for it."""


def cuda_module(name: str, found: CudaModule, perform: Call, shared: Mapping[str, Any] | None = None) -> Any:
    """The module; ``shared`` classes are taken from there where both modules have them."""
    module = types.ModuleType(name)
    for key, info in found.classes.items():
        setattr(module, key, (shared or {}).get(key) or _class(name, key, info))
    for key, value in found.values.items():
        setattr(module, key, value)
    for key, function in found.functions.items():
        if function.signature is not None:
            setattr(module, key, _function(module, key, function, perform))
    return module


def _class(module: str, name: str, info: CudaClass) -> type:
    if info.enum is not None:
        return _enum(module, name, tuple(info.enum.items()))
    if set(info.members) <= {"getPtr"}:
        return type(name, (Handle,), {"__module__": module})
    fields = tuple(member for member in info.members if member != "getPtr")
    return type(name, (Struct,), {"__module__": module, "__slots__": fields, "fields": fields})


@functools.cache
def _enum(module: str, name: str, members: tuple[tuple[str, int], ...]) -> type:
    return enum.IntEnum(name, members, module=module)  # type: ignore[return-value]


class Handle:
    """A stream, an event, a graph: an integer that is not one."""

    def __init__(self, init_value: Any = 0) -> None:
        self._value = int(init_value)

    def __int__(self) -> int:
        return self._value

    def __index__(self) -> int:
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._value:#x}>"

    def getPtr(self) -> int:  # noqa: N802
        """Not an address that anything could follow here."""
        return id(self)


class Struct:
    """Fields of the real one, 0 until set."""

    __slots__: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()

    def __init__(self, _ptr: int = 0) -> None:
        for name in self.fields:
            setattr(self, name, 0)


def _function(module: Any, name: str, function: CudaFunction, perform: Call) -> Any:
    signature = function.signature
    assert signature is not None
    call_signature = inspect.Signature(
        inspect.Parameter(
            parameter.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if parameter.default is None else None,
        )
        for parameter in signature.parameters
    )

    def fits(kind: str, value: object) -> bool:
        if kind in INTEGERS:
            return hasattr(value, "__index__")
        wanted = getattr(module, kind, None)
        if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
            return isinstance(value, wanted)
        return not (kind == "char" and not isinstance(value, bytes))

    def call(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return perform(name, bind(name, [signature], args, kwargs, fits))

    call.__name__ = name
    call.__signature__ = call_signature  # type: ignore[attr-defined]
    return call
