"""Signatures in docstrings of pybind11 and Cython, parsed; and arguments bound to them as those would bind them.

A call is refused with TypeError when no overload takes its names, its number of arguments and their obvious types.
Types that are not obvious (capsules, callables, foreign objects) take anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

__all__ = ["Bound", "Parameter", "Signature", "TypeCheck", "bind", "parse_cython", "parse_pybind", "split_top"]

Bound = dict[str, Any]
TypeCheck = Callable[[str, object], bool]  # (the type as documented, a value) -> whether it would be taken


@dataclass(frozen=True)
class Parameter:
    """One parameter; ``default`` is source text, None where there is none."""

    name: str
    type: str
    default: str | None = None


@dataclass(frozen=True)
class Signature:
    """One overload, without ``self``; ``open`` where it ends in ``*args`` or ``**kwargs``."""

    parameters: tuple[Parameter, ...]
    returns: str
    open: bool = False
    method: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names."""
        return tuple(parameter.name for parameter in self.parameters)


@cache
def parse_pybind(line: str) -> Signature:
    """``name(self: T, a: int = 0) -> R`` as pybind11 and ``inspect.signature`` write it."""
    body, returns = _body(line)
    entries = [_pybind_parameter(entry) for entry in split_top(body) if entry not in ("*", "/")]
    method = bool(entries) and entries[0].name == "self"
    named = tuple(entry for entry in entries[int(method) :] if not entry.name.startswith("*"))
    return Signature(named, returns, len(named) < len(entries) - int(method), method)


@cache
def parse_cython(line: str) -> Signature:
    """``name(dst, size_t count, kind: cudaMemcpyKind)`` as Cython writes it."""
    body, returns = _body(line)
    parameters = []
    for entry in split_top(body):
        declared, _, default = entry.partition("=")
        name, colon, annotation = declared.strip().partition(":")
        kind, _, last = name.strip().rpartition(" ")
        parameters.append(Parameter(last.lstrip("*"), annotation.strip() if colon else kind, default.strip() or None))
    return Signature(tuple(parameters), returns)


def bind(
    name: str, overloads: Sequence[Signature], args: Sequence[Any], kwargs: Mapping[str, Any], fits: TypeCheck
) -> Bound:
    """Arguments by name as the first overload takes them that fits; defaults that were not given are left out.

    Raises:
        TypeError: none fits, in the words of pybind11.
    """
    reasons = []
    for signature in overloads:
        bound, reason = _bound(signature, args, kwargs, fits)
        if bound is not None:
            return bound
        reasons.append(f"{', '.join(f'{p.name}: {p.type}' for p in signature.parameters)} ({reason})")
    given = ", ".join([repr(a) for a in args] + [f"{key}={value!r}" for key, value in kwargs.items()])
    raise TypeError(
        f"{name}(): incompatible function arguments. The following argument types are supported: "
        + "; ".join(f"{number}. {text}" for number, text in enumerate(reasons, 1))
        + f". Invoked with: {given}"
    )


def _bound(
    signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any], fits: TypeCheck
) -> tuple[Bound | None, str]:
    names = signature.names
    if len(args) > len(names) and not signature.open:
        return None, f"takes {len(names)} arguments, got {len(args)}"
    bound = dict(zip(names, args, strict=False))
    for key, value in kwargs.items():
        if key in bound:
            return None, f"{key} given twice"
        if key not in names and not signature.open:
            return None, f"has no {key}"
        bound[key] = value
    for parameter in signature.parameters:
        if parameter.name not in bound:
            if parameter.default is None:
                return None, f"{parameter.name} is missing"
        elif not (parameter.default == "None" and bound[parameter.name] is None) and not fits(
            parameter.type, bound[parameter.name]
        ):
            return None, f"{parameter.name} is a {type(bound[parameter.name]).__name__}"
    return bound, ""


def split_top(text: str) -> list[str]:
    """The parts between commas that no bracket or quote encloses, stripped."""
    parts, depth, start, quote = [], 0, 0, ""
    for place, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{<":
            depth += 1
        elif character in ")]}" or (character == ">" and text[place - 1] != "-"):
            depth -= 1
        elif character == "," and not depth:
            parts.append(text[start:place].strip())
            start = place + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def _body(line: str) -> tuple[str, str]:
    """What stands in the outer parentheses, and after the arrow."""
    opening = line.index("(")
    depth, end = 0, len(line) - 1
    for place in range(opening, len(line)):
        depth += {"(": 1, ")": -1}.get(line[place], 0)
        if not depth:
            end = place
            break
    return line[opening + 1 : end], line[end + 1 :].replace("->", "", 1).strip()


def _pybind_parameter(entry: str) -> Parameter:
    declared, default = entry, None
    found = re.search(r"\s*(?<![=<>!])=(?!=)\s*", entry)
    if found:
        declared, default = entry[: found.start()], entry[found.end() :]
    name, _, kind = declared.partition(":")
    return Parameter(name.strip(), kind.strip(), default)
