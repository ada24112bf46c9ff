"""Write what the imported ``cuda.bindings.runtime`` and ``cuda.bindings.driver`` have to a JSON file; needs no GPU.

Keeps signatures and the documented names of what a function returns, not the prose.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

MODULES = ("cuda.bindings.runtime", "cuda.bindings.driver")


def returned(text: str) -> list[str]:
    """The entries of the section "Returns": ``["cudaError_t", "devPtr : Any"]``."""
    found = re.search(r"\nReturns\n-+\n(.*?)(?:\n\n|\n\S+[^\n]*\n-{3,}|\Z)", text, re.DOTALL)
    return [line for line in found[1].splitlines() if line and not line.startswith(" ")] if found else []


def described_function(name: str, value: Any) -> dict[str, Any]:
    first, _, prose = (value.__doc__ or "").partition("\n")
    return {"signature": first if first.startswith(f"{name}(") else "", "returns": returned(inspect.cleandoc(prose))}


def described_class(kind: type) -> dict[str, Any]:
    if isinstance(getattr(kind, "__members__", None), dict | types.MappingProxyType):
        return {"enum": {name: int(value) for name, value in kind.__members__.items()}}
    attributes = {
        name: "attribute" if inspect.isdatadescriptor(getattr(kind, name)) else "method"
        for name in dir(kind)
        if not name.startswith("_")
    }
    bases = [base.__name__ for base in kind.__mro__[1:] if base.__module__.startswith("cuda")]
    return {"enum": None, "members": attributes, "bases": bases}


def described_module(module: types.ModuleType) -> dict[str, Any]:
    found: dict[str, Any] = {"classes": {}, "functions": {}, "values": {}}
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or isinstance(value, types.ModuleType):
            continue
        if isinstance(value, type):
            found["classes"][name] = described_class(value)
        elif isinstance(value, int):
            found["values"][name] = int(value)
        elif callable(value):
            found["functions"][name] = described_function(name, value)
    return found


if __name__ == "__main__":
    text = json.dumps({name: described_module(importlib.import_module(name)) for name in MODULES})
    Path(sys.argv[1]).write_text(text)
