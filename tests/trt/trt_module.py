"""A module ``tensorrt`` with exactly the names of a real one, whose objects do what a double's behaviours do.

A class is generated for every class of the surface. Its constructor, methods and properties are bound to the real
signatures; what they do is looked up by name in the behaviour that belongs to the class, a plain Python object.
Behaviours get behaviours, tuples of integers and enum values; users get generated objects, ``Dims`` and enum values.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from tests.trt.cuda_module import NotModelledError
from tests.trt.signatures import Signature, bind
from tests.trt.surface import ClassInfo, Member, Module
from tests.trt.trt_values import Dims, Value, face_of_bytes, fits, make_enum

__all__ = ["Behaviours", "Face", "Maker"]


class Behaviours(Protocol):
    """What a module's objects do."""

    lock: AbstractContextManager[object]

    def constructed(self, name: str, arguments: dict[str, Any]) -> Any:
        """The behaviour of a new object of a class, None where its fields are all there is to it."""

    def called(self, name: str, arguments: dict[str, Any]) -> None:
        """Be told of a call: "Builder.create_network"."""

    def function(self, name: str, arguments: dict[str, Any]) -> Any:
        """A function of the module."""


class FaceType(type):
    """As pybind11's metaclass: a subclass must call the ``__init__`` of every bound base it has."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        for base in () if vars(cls).get("generated") else cls.__mro__[1:]:
            if base in _direct(cls) and base not in made.__dict__.get("_begun", ()):
                raise TypeError(f"{base.__name__}.__init__() must be called when overriding __init__")
        return made


def _direct(cls: type) -> set[type]:
    """The generated classes from which a user's class inherits without another generated one between."""
    found: set[type] = set()
    for base in cls.__bases__:
        found |= {base} if vars(base).get("generated") else _direct(base)
    return found


class Face(metaclass=FaceType):
    """Root of the generated classes."""

    generated = True
    _info: ClassInfo
    _known: frozenset[str] = frozenset()

    def __setattr__(self, name: str, value: Any) -> None:
        if vars(type(self)).get("generated") and name not in self._known and name != "__class__":
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        object.__setattr__(self, name, value)


class Maker:
    """Makes ``module`` and its classes, bases first, over behaviours."""

    def __init__(self, name: str, found: Module, behaviours: Behaviours, version: str) -> None:
        self.found = found
        self.behaviours = behaviours
        self.module = types.ModuleType(name)
        self.made: dict[str, Any] = {}  # by qualified name
        self.module.__version__ = version  # type: ignore[attr-defined]
        for info in found.classes.values():
            self._class(info)
        for key, info in found.classes.items():
            setattr(self.module, key, self.made[info.qualified])
        for key, value in found.values.items():
            setattr(self.module, key, self._constant(value))
        for key, overloads in found.functions.items():
            setattr(self.module, key, self._function(key, overloads))

    def _class(self, info: ClassInfo) -> Any:
        if info.qualified in self.made:
            return self.made[info.qualified]
        if info.enum is not None:
            made = make_enum(info.qualified, info.enum, self.module.__name__)
        elif info.qualified.startswith("Dims") and info.qualified != "DimsExprs":
            made = type(info.qualified, (Dims,), {"__module__": self.module.__name__})
        else:
            made = self._face(info)
        self.made[info.qualified] = made
        for key, nested in info.nested.items():
            setattr(made, key, self._class(nested))
        for key, member in info.members.items():
            if member.kind == "value":
                setattr(made, key, self._constant(member.value))
        return made

    def _face(self, info: ClassInfo) -> Any:
        bases = tuple(self._class(self.found.classes[base]) for base in info.bases[:1] if base in self.found.classes)
        lineage = self.found.lineage(info)
        known = {name for kind in lineage for name, member in kind.members.items() if member.settable}
        body: dict[str, Any] = {
            "__module__": self.module.__name__,
            "generated": True,
            "_info": info,
            "_known": frozenset(known | {"_behaviour", "_fields", "_begun"}),
            "__init__": self._initialiser(info),
        }
        for name, member in info.members.items():
            if member.kind in ("method", "static") and name != "__init__":
                body[name] = self._method(info, name, member)
            elif member.kind == "property":
                body[name] = self._property(info, name, member)
        if info.qualified == "IHostMemory":
            return face_of_bytes(info.qualified, body)
        return FaceType(info.qualified.rpartition(".")[2], bases or (Face,), body)

    def _initialiser(self, info: ClassInfo) -> Any:
        name = info.qualified

        def initialise(face: Any, *args: Any, **kwargs: Any) -> None:
            if not info.constructors:
                raise TypeError(f"{name}: No constructor defined!")
            bound = bind("__init__", info.constructors, args, kwargs, self._fits)
            object.__setattr__(face, "_begun", {*face.__dict__.get("_begun", ()), self.made[name]})
            self.behaviours.called(name, bound)
            behaviour = self.behaviours.constructed(name, {key: self.bare(value) for key, value in bound.items()})
            object.__setattr__(face, "_behaviour", behaviour)
            if behaviour is None:
                fields = {key: value for key, value in bound.items() if key in info.members}
                object.__setattr__(face, "_fields", {**face.__dict__.get("_fields", {}), **fields})

        return initialise

    def _method(self, info: ClassInfo, name: str, member: Member) -> Any:
        full = f"{info.qualified}.{name}"

        @functools.wraps(lambda: None)
        def call(face: Any, *args: Any, **kwargs: Any) -> Any:
            bound = bind(name, member.overloads, args, kwargs, self._fits)
            self.behaviours.called(full, bound)
            behaviour = face.__dict__.get("_behaviour")
            if not hasattr(behaviour, name):
                raise NotModelledError(f"the double does not model {full}")
            with self.behaviours.lock:
                given = {key: self.bare(value) for key, value in bound.items()}
                operator = name.startswith("__")  # its overloads name their arguments differently
                result = getattr(behaviour, name)(*given.values()) if operator else getattr(behaviour, name)(**given)
            return self.dressed(result, member.overloads)

        call.__name__ = name
        return call

    def _property(self, info: ClassInfo, name: str, member: Member) -> property:
        def read(face: Any) -> Any:
            behaviour = face.__dict__.get("_behaviour")
            if behaviour is None:
                return face.__dict__.get("_fields", {}).get(name)
            if not hasattr(behaviour, name):
                raise NotModelledError(f"the double does not model {info.qualified}.{name}")
            return self.dressed(getattr(behaviour, name), member.overloads)

        def write(face: Any, value: Any) -> None:
            if member.overloads and not self._fits(member.overloads[0].returns, value):
                raise TypeError(f"(): incompatible function arguments: {info.qualified}.{name} = {value!r}")
            self.behaviours.called(f"{info.qualified}.{name}=", {"value": value})
            behaviour = face.__dict__.get("_behaviour")
            if behaviour is None:
                face.__dict__.setdefault("_fields", {})[name] = value
            elif hasattr(behaviour, name):
                setattr(behaviour, name, self.bare(value))
            else:
                raise NotModelledError(f"the double does not model {info.qualified}.{name}")

        return property(read if member.readable else None, write if member.settable else None)

    def _function(self, name: str, overloads: tuple[Signature, ...]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = bind(name, overloads, args, kwargs, self._fits)
            self.behaviours.called(name, bound)
            result = self.behaviours.function(name, {key: self.bare(value) for key, value in bound.items()})
            return self.dressed(result, overloads)

        call.__name__ = name
        return call

    def _constant(self, value: Any) -> Any:
        return getattr(self._class_named(value[0]), value[1]).twin() if isinstance(value, tuple) else value

    def _class_named(self, qualified: str) -> Any:
        head, *rest = qualified.split(".")
        info = self.found.classes[head]
        for name in rest:
            info = info.nested[name]
        return self._class(info)

    def _fits(self, kind: str, value: object) -> bool:
        return fits(kind, value, self.module)

    def bare(self, value: Any) -> Any:
        """What behaviours see of an argument."""
        if isinstance(value, Dims):
            return tuple(value)
        if isinstance(value, bytes):  # IHostMemory is a buffer
            return value
        if vars(type(value)).get("generated") and value.__dict__.get("_behaviour") is not None:
            return value._behaviour
        return value

    def dressed(self, value: Any, overloads: Iterable[Signature]) -> Any:
        """What users see of a result."""
        if isinstance(value, Value):
            return value.twin()
        returns = {signature.returns for signature in overloads}
        if any(text.endswith("Dims]") for text in returns) and isinstance(value, list):
            return [self.module.Dims(shape) for shape in value]
        if any(text.endswith("Dims") for text in returns) and isinstance(value, tuple):
            return self.module.Dims(value)
        if isinstance(value, list):
            return [self.dressed(item, ()) for item in value]
        face = getattr(value, "face", None)
        if isinstance(face, str):
            return self._dress(face, value)
        return value

    def blank(self, face: str) -> Any:
        """An object of a class that only has fields."""
        made = self.made[face].__new__(self.made[face])
        object.__setattr__(made, "_fields", {})
        return made

    def _dress(self, face: str, behaviour: Any) -> Any:
        kind = self.made[face]
        made = kind.__new__(kind, behaviour.data) if face == "IHostMemory" else kind.__new__(kind)
        object.__setattr__(made, "_behaviour", behaviour)
        return made
