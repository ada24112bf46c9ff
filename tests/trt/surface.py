"""What one version of the bindings has, as data: classes, members, enum values, functions with their signatures.

``bindings.py`` writes the files that are read here; nothing here imports TensorRT or CUDA.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.trt.signatures import Signature, parse_cython, parse_pybind

__all__ = ["ClassInfo", "CudaClass", "CudaFunction", "CudaModule", "CudaSurface", "Member", "Module", "Surface"]


@dataclass(frozen=True)
class Member:
    """An attribute of a class; overloads are without ``self``."""

    kind: Literal["method", "static", "property", "value", "class", "other"]
    overloads: tuple[Signature, ...] = ()
    readable: bool = True
    settable: bool = False
    value: object = None  # of a constant; (enum, name) where it is an enum's


@dataclass(frozen=True)
class ClassInfo:
    """A class; ``qualified`` differs from the name it was found under where it is an alias or nested."""

    qualified: str
    bases: tuple[str, ...]  # all of them, the nearest first
    enum: dict[str, int] | None
    members: dict[str, Member]
    nested: dict[str, ClassInfo] = field(default_factory=dict)

    @property
    def constructors(self) -> tuple[Signature, ...]:
        """The overloads of ``__init__``; empty where Python cannot make one."""
        member = self.members.get("__init__")
        return member.overloads if member else ()


@dataclass(frozen=True)
class Module:
    """A module's public names."""

    classes: dict[str, ClassInfo]
    functions: dict[str, tuple[Signature, ...]]
    values: dict[str, object]  # (enum, name) where it is an enum's

    def __contains__(self, dotted: object) -> bool:
        """Whether ``"Logger.Severity.WARNING"`` or ``"Builder.reset"`` exists."""
        return isinstance(dotted, str) and self.has(dotted)

    def has(self, dotted: str) -> bool:
        """The same, of a dotted name."""
        head, *rest = dotted.split(".")
        if head in self.classes:
            return not rest or self._member(self.classes[head], rest)
        return not rest and (head in self.functions or head in self.values)

    def lineage(self, info: ClassInfo) -> Iterator[ClassInfo]:
        """The class and its bases."""
        yield info
        for name in info.bases:
            if name in self.classes:
                yield self.classes[name]

    def _member(self, info: ClassInfo, rest: list[str]) -> bool:
        name, *more = rest
        for kind in self.lineage(info):
            if name in kind.nested:
                return not more or self._member(kind.nested[name], more)
            if name in kind.members or (kind.enum is not None and name in (*kind.enum, "__members__")):
                return not more or kind.enum is not None or kind.members[name].kind in ("property", "value")
        return False


@dataclass(frozen=True)
class Surface:
    """``tensorrt`` and, where the version has it, ``tensorrt.plugin``."""

    version: str
    tensorrt: Module
    plugin: Module | None

    @classmethod
    def read(cls, path: Path) -> Surface:
        """From the file that ``describe_tensorrt.py`` wrote."""
        data = json.loads(path.read_bytes())
        modules = {name: _module(found) for name, found in data["modules"].items()}
        return cls(data["version"], modules["tensorrt"], modules.get("tensorrt.plugin"))


@dataclass(frozen=True)
class CudaFunction:
    """A function of cuda.bindings, and the documented names of what it returns, the error first."""

    signature: Signature | None
    returns: tuple[str, ...]


@dataclass(frozen=True)
class CudaClass:
    """An enum, a handle or a struct."""

    enum: dict[str, int] | None
    members: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()


@dataclass(frozen=True)
class CudaModule:
    """One module's public names."""

    classes: dict[str, CudaClass]
    functions: dict[str, CudaFunction]
    values: dict[str, int]

    def has(self, dotted: str) -> bool:
        """Whether ``"cudaMalloc"`` or ``"cudaMemcpyKind.cudaMemcpyHostToDevice"`` exists."""
        head, *rest = dotted.split(".")
        if head in self.classes and rest:
            info = self.classes[head]
            return rest[0] in (info.members if info.enum is None else (*info.enum, "__members__"))
        return head in self.classes or head in self.functions or head in self.values


@dataclass(frozen=True)
class CudaSurface:
    """``cuda.bindings.runtime`` and ``cuda.bindings.driver``."""

    runtime: CudaModule
    driver: CudaModule

    @classmethod
    def read(cls, path: Path) -> CudaSurface:
        """From the file that ``describe_cuda.py`` wrote."""
        data = json.loads(path.read_bytes())
        return cls(_cuda_module(data["cuda.bindings.runtime"]), _cuda_module(data["cuda.bindings.driver"]))


def _module(found: dict[str, Any]) -> Module:
    return Module(
        {name: _class(info) for name, info in found["classes"].items()},
        {name: tuple(map(parse_pybind, lines)) for name, lines in found["functions"].items()},
        {name: _value(value) for name, value in found["values"].items()},
    )


def _class(info: dict[str, Any]) -> ClassInfo:
    members = {name: member for name, member in info["members"].items() if member}
    return ClassInfo(
        info["qualified"],
        tuple(info["bases"]),
        info["enum"],
        {name: _member(member) for name, member in members.items()},
        {name: _class(member) for name, member in members.items() if member["kind"] == "class"},
    )


def _member(member: dict[str, Any]) -> Member:
    overloads = tuple(map(parse_pybind, member.get("signatures", ())))
    value = _value(member) if member["kind"] == "value" else None
    return Member(member["kind"], overloads, member.get("readable", True), member.get("settable", False), value)


def _value(value: dict[str, Any]) -> object:
    return (value["enum"], value["name"]) if "enum" in value else value["value"]


def _cuda_module(found: dict[str, Any]) -> CudaModule:
    return CudaModule(
        {
            name: CudaClass(info["enum"], tuple(info.get("members", ())), tuple(info.get("bases", ())))
            for name, info in found["classes"].items()
        },
        {
            name: CudaFunction(
                parse_cython(info["signature"]) if info["signature"] else None,
                tuple(entry.partition(" : ")[0] for entry in info["returns"]),
            )
            for name, info in found["functions"].items()
        },
        found["values"],
    )
