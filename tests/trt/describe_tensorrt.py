"""Write what the imported ``tensorrt`` and ``tensorrt.plugin`` have to a JSON file; run in a process of its own.

Keeps signature lines of docstrings, not their prose. Knows nothing about versions.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

OVERLOAD = re.compile(r"^\d+\. (\w+\(.*)$", re.MULTILINE)
KEPT = ("__init__", "__call__", "__len__", "__getitem__", "__setitem__", "__buffer__")  # of the double-underscore names


def signature_lines(value: object, name: str) -> list[str]:
    """The signatures that a docstring of pybind11 begins with, or the one Python knows."""
    if isinstance(value, types.FunctionType):
        return [name + re.sub(r"<([\w.]+) object at 0x[0-9a-f]+>", r"<\1>", str(inspect.signature(value)))]
    text = value if isinstance(value, str) else getattr(value, "__doc__", None) or ""
    lines = [line for line in OVERLOAD.findall(text) if line.startswith(f"{name}(")]
    first = text.partition("\n")[0].strip()
    return lines or ([first] if re.match(rf"{re.escape(name)}\(|\(", first) else [])


def is_enum(kind: type) -> bool:
    return isinstance(getattr(kind, "__members__", None), dict | types.MappingProxyType)


def member(owner: type, name: str, value: Any) -> dict[str, Any] | None:
    """One attribute of a class, by kind."""
    if isinstance(value, property):
        return {
            "kind": "property",
            "signatures": signature_lines(value.fget, ""),
            "readable": value.fget is not None,
            "settable": value.fset is not None,
        }
    if isinstance(value, staticmethod):
        return {"kind": "static", "signatures": signature_lines(getattr(owner, name), name)}
    if isinstance(value, type):
        return {"kind": "class", "of": f"{owner.__name__}.{name}"} | described_class(value)
    if callable(value):
        return {"kind": "method", "signatures": signature_lines(value, name)}
    if is_enum(type(value)):
        return {"kind": "value", "enum": type(value).__qualname__, "name": value.name}
    if isinstance(value, int | str | float | bool):
        return {"kind": "value", "value": value}
    return {"kind": "other"}


def described_class(kind: type) -> dict[str, Any]:
    """Bases, members and, for an enum, its values."""
    own = {
        name: member(kind, name, value)
        for name, value in sorted(vars(kind).items())
        if (not name.startswith("_") or name in KEPT) and not (is_enum(kind) and name in kind.__members__)  # type: ignore[attr-defined]
    }
    values = {name: int(value) for name, value in kind.__members__.items()} if is_enum(kind) else None  # type: ignore[attr-defined]
    return {
        "qualified": kind.__qualname__,
        "bases": [base.__qualname__ for base in kind.__mro__[1:] if base.__module__.startswith("tensorrt")],
        "enum": values,
        "members": own,
    }


def described_module(module: types.ModuleType) -> dict[str, Any]:
    """Public classes, functions and values."""
    found: dict[str, Any] = {"classes": {}, "functions": {}, "values": {}}
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or isinstance(value, types.ModuleType):
            continue
        if isinstance(value, type):
            found["classes"][name] = described_class(value)
        elif is_enum(type(value)):
            found["values"][name] = {"enum": type(value).__qualname__, "name": value.name}
        elif callable(value):
            found["functions"][name] = signature_lines(value, getattr(value, "__name__", name))
        else:
            found["values"][name] = {"value": value if isinstance(value, int | float | str | bool) else repr(value)}
    return found


def main() -> None:
    tensorrt = importlib.import_module("tensorrt")
    modules = {"tensorrt": described_module(tensorrt)}
    with contextlib.suppress(ModuleNotFoundError):
        modules["tensorrt.plugin"] = described_module(importlib.import_module("tensorrt.plugin"))
    text = json.dumps({"version": tensorrt.__version__, "modules": modules})
    Path(sys.argv[1]).write_text(text)  # not stdout: TensorRT logs there


if __name__ == "__main__":
    main()
