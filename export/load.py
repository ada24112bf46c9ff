"""Checkpoint tensors -> a module's parameters, one at a time, as float32.

A module is built on the "meta" device, where it costs no memory and no initialisation, and receives each parameter
from the ``Source`` that ``Names`` finds for it: a tensor as it stands, rows of a packed one, several stacked, or one
rearranged. A source checks the shapes of the tensors that it reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from export.checkpoint import TensorFiles
from runtime.errors import CheckpointError

__all__ = [
    "Names",
    "OrZeros",
    "Rearranged",
    "Rows",
    "Rule",
    "Source",
    "Stacked",
    "Whole",
    "filled",
    "load_module",
    "prefixed",
    "renamed",
]

Module = TypeVar("Module", bound=nn.Module)
Shape = tuple[int, ...]

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Source(Protocol):
    """Where a parameter comes from."""

    @property
    def names(self) -> tuple[str, ...]:
        """The checkpoint's tensors that are read."""

    def read(self, tensors: TensorFiles, shape: Shape) -> Tensor:
        """The parameter of ``shape`` in its stored dtype; raises CheckpointError and names the tensor."""


@dataclass(frozen=True)
class Whole:
    """A tensor as it stands."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """The tensor."""
        return (self.name,)

    def read(self, tensors: TensorFiles, shape: Shape) -> Tensor:
        """The tensor, which must have ``shape``."""
        return checked(tensors, self.name, shape)


@dataclass(frozen=True)
class OrZeros:
    """A tensor that no formula reads: zeros where it is absent."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        """The tensor."""
        return (self.name,)

    def read(self, tensors: TensorFiles, shape: Shape) -> Tensor:
        """The tensor or zeros."""
        return checked(tensors, self.name, shape) if self.name in tensors.files else torch.zeros(shape)


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``start + shape[0]`` of a tensor that has ``total`` rows."""

    name: str
    start: int
    total: int

    @property
    def names(self) -> tuple[str, ...]:
        """The packed tensor."""
        return (self.name,)

    def read(self, tensors: TensorFiles, shape: Shape) -> Tensor:
        """The rows, in memory of their own."""
        packed = checked(tensors, self.name, (self.total, *shape[1:]))
        return packed[self.start : self.start + shape[0]].clone()


@dataclass(frozen=True)
class Stacked:
    """Sources one after another along the rows: ``rows`` of each, or all the same number."""

    parts: tuple[Source, ...]
    rows: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every part's tensors."""
        return tuple(name for part in self.parts for name in part.names)

    def read(self, tensors: TensorFiles, shape: Shape) -> Tensor:
        """The parts as one tensor."""
        rows = self.rows or (shape[0] // len(self.parts),) * len(self.parts)
        pieces = [part.read(tensors, (count, *shape[1:])) for part, count in zip(self.parts, rows, strict=True)]
        return torch.cat(pieces)


@dataclass(frozen=True)
class Rearranged:
    """``arrange`` of a tensor that is stored with the shape ``stored``."""

    name: str
    stored: Shape
    arrange: Callable[[Tensor], Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensor."""
        return (self.name,)

    def read(self, tensors: TensorFiles, shape: Shape) -> Tensor:
        """The rearranged tensor."""
        arranged = self.arrange(checked(tensors, self.name, self.stored)).contiguous()
        assert arranged.shape == shape, (self.name, arranged.shape, shape)
        return arranged


Rule = tuple[str, Callable[[re.Match[str]], Source]]


def prefixed(ours: str, theirs: str) -> Rule:
    """Names that begin with ``ours`` begin with ``theirs`` in the checkpoint."""
    return re.escape(ours) + "(.*)", lambda found: Whole(theirs + found[1])


def renamed(ours: str, theirs: str) -> Rule:
    r"""A name that matches the pattern ``ours`` is called ``theirs``, where ``\1`` is the pattern's first group."""
    return ours, lambda found: Whole(found.expand(theirs))


@dataclass(frozen=True)
class Names:
    """From our parameter names to sources: the first rule whose pattern is the whole name."""

    rules: tuple[Rule, ...] = (prefixed("", ""),)

    def __call__(self, name: str) -> Source:
        """The source of our parameter ``name``."""
        for pattern, source in self.rules:
            if found := re.fullmatch(pattern, name):
                return source(found)
        raise AssertionError(f"no rule for parameter {name}")


def load_module(build: Callable[[], Module], tensors: TensorFiles, names: Names) -> Module:
    """Build a module and fill it.

    Raises:
        CheckpointError: a tensor is missing or has another shape; the message names it.
    """
    with torch.device("meta"):
        module = build()
    return filled(module, tensors, names)


def filled(module: Module, tensors: TensorFiles, names: Names) -> Module:
    """Give a module its parameters; raises CheckpointError as ``load_module`` does."""
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        tensor = names(name).read(tensors, tuple(parameter.shape)).to(torch.float32)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    return module.eval()


def checked(tensors: TensorFiles, name: str, shape: Shape) -> Tensor:
    """The tensor ``name``, which must hold floats and have ``shape``."""
    found = tensors.shape(name)
    if found != shape:
        raise CheckpointError(
            f"tensor {name} has shape {list(found)}, expected {list(shape)} from config.json; "
            "the configuration belongs to other weights"
        )
    tensor = tensors.tensor(name)
    if tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"tensor {name} is stored as {tensors.dtype(name)}, expected BF16, F16, F32 or F64; "
            "quantised checkpoints cannot be exported, give the original one"
        )
    return tensor
