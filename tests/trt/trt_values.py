"""Values of a double's ``tensorrt``: enums, ``Dims``, host memory with a buffer, and which values an argument takes.

They behave as pybind11's do, traps included: an enum's value equals no integer, ``Dims`` compares with tuples and
lists alone.
"""

from __future__ import annotations

import contextlib
import numbers
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

__all__ = ["Dims", "Value", "face_of_bytes", "fits", "make_enum"]

MAX_DIMS = 8  # NvInferRuntimeBase.h


class Value:
    """A value of an enum of pybind11."""

    __members__: Mapping[str, Value] = {}
    name: str
    value: int

    def __init__(self, value: int) -> None:
        if not is_integer(value):
            raise TypeError(f"__init__(): incompatible constructor arguments: {value!r}")
        for name, member in self.__members__.items():
            if member.value == value:
                self.__dict__.update(name=name, value=value)
                return
        self.__dict__.update(name="???", value=value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"can't set attribute {name} of {self}")

    def __int__(self) -> int:
        return self.value

    __index__ = __int__

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.value == other.value  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(self.value)

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def twin(self) -> Value:
        """Another object of the same value, as pybind11 makes one for every call; ``is`` tells them apart."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __repr__(self) -> str:
        return f"<{self}: {self.value}>"


def make_enum(qualified: str, values: Mapping[str, int], module: str) -> Any:
    """A class with a value for every name."""
    made = type(qualified.rpartition(".")[2], (Value,), {"__module__": module, "__qualname__": qualified})
    members = {}
    for name, number in values.items():
        member = object.__new__(made)
        member.__dict__.update(name=name, value=number)
        members[name] = member
        setattr(made, name, member)
    made.__members__ = members  # type: ignore[attr-defined]
    return made


class Dims:
    """A shape."""

    MAX_DIMS = MAX_DIMS

    def __init__(self, shape: Any = ()) -> None:
        self.__dict__["_shape"] = [operator.index(size) for size in shape]
        if len(self._shape) > MAX_DIMS:
            raise ValueError(f"the maximum number of dimensions is {MAX_DIMS}, got {len(self._shape)}")

    def __len__(self) -> int:
        return len(self._shape)

    def __getitem__(self, place: Any) -> Any:
        found = self._shape[place]
        return tuple(found) if isinstance(place, slice) else found

    def __setitem__(self, place: Any, value: Any) -> None:
        self._shape[place] = value

    def __iter__(self) -> Iterator[int]:
        return iter(self._shape)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, tuple | list):
            raise TypeError("__eq__(): incompatible function arguments. Dims compares with list and tuple")
        return self._shape == list(other)

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return str(tuple(self._shape))


def face_of_bytes(qualified: str, body: dict[str, Any]) -> Any:
    """``IHostMemory``: a buffer, and none of what ``bytes`` has besides."""
    known = {name for name, value in body.items() if isinstance(value, property)} | {"_behaviour", "_fields"}

    def read(face: Any, name: str) -> Any:
        if not name.startswith("__") and name not in known:
            raise AttributeError(f"'{qualified}' object has no attribute '{name}'")
        return bytes.__getattribute__(face, name)

    def no_length(face: Any) -> int:
        raise TypeError(f"object of type '{qualified}' has no len()")

    def refused(face: Any, *args: Any) -> None:
        raise TypeError(f"{qualified}: No constructor defined!")

    body = {**body, "__getattribute__": read, "__len__": no_length, "__init__": refused}
    return type(qualified, (bytes,), body)


def fits(kind: str, value: object, module: Any) -> bool:
    """Whether pybind11 would take a value for an argument of a documented type."""
    found = re.match(r"(?:List|collections\.abc\.Sequence|list)\[(.*)\]$", kind)
    if found:
        return isinstance(value, list | tuple | np.ndarray) and all(fits(found[1], item, module) for item in value)
    name = re.split(r"::|\.", kind)[-1]
    if name in PLAIN:
        return PLAIN[name](value)
    wanted = module
    for part in re.sub(
        r"^.*?(?:tensorrt_bindings\.tensorrt\.|nvinfer1::|nvonnxparser::)(?:v_\d_\d::)?", "", kind
    ).split("."):
        wanted = getattr(wanted, part.rstrip("_"), None)  # PluginFieldCollection_ is made of the other one
    if isinstance(wanted, type) and name != "ndarray":
        return isinstance(value, wanted) or (value is None and not issubclass(wanted, Value))
    return True


def is_integer(value: object) -> bool:
    """Anything that has an integer in it; floats are refused as pybind11 does, enums because nobody means that."""
    return hasattr(value, "__int__") and not isinstance(value, float | np.floating | np.ndarray | Value | str)


def is_buffer(value: object) -> bool:
    """Whether there is memory to look at."""
    with contextlib.suppress(TypeError):
        return memoryview(value) is not None  # type: ignore[arg-type]
    return False


def is_shape(value: object) -> bool:
    """Whether ``Dims`` can be made of it."""
    with contextlib.suppress(TypeError):
        return all(hasattr(size, "__index__") for size in value)  # type: ignore[attr-defined]
    return False


PLAIN: dict[str, Callable[[object], bool]] = {
    "int": is_integer,
    "SupportsInt": is_integer,
    "float": lambda value: isinstance(value, numbers.Real | np.generic),
    "SupportsFloat": lambda value: isinstance(value, numbers.Real | np.generic),
    "bool": lambda value: isinstance(value, bool | np.bool_ | type(None)),
    "str": lambda value: isinstance(value, str | bytes),
    "FallbackString": lambda value: isinstance(value, str | bytes),
    "bytes": lambda value: isinstance(value, str | bytes),
    "buffer": is_buffer,
    "Buffer": is_buffer,
    "tuple": lambda value: isinstance(value, tuple),
    "list": lambda value: isinstance(value, list),
    "slice": lambda value: isinstance(value, slice),
    "Dims": is_shape,
}
