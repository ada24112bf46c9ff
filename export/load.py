"""Checkpoint tensors -> a module's parameters, one at a time, as float32.

A module is built on the "meta" device, where it costs no memory and no initialisation, and receives each parameter
from the tensor that ``Names`` maps its name to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from export.checkpoint import TensorFiles
from runtime.errors import CheckpointError

__all__ = ["Names", "load_module"]

Module = TypeVar("Module", bound=nn.Module)

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Names:
    """From our parameter names to a checkpoint's: the first prefix that fits is replaced.

    Attributes:
        prefixes: (ours, the checkpoint's) pairs.
        unused: our parameter prefixes that no formula reads; absent tensors are filled with zeros.
    """

    prefixes: tuple[tuple[str, str], ...] = (("", ""),)
    unused: tuple[str, ...] = ()

    def __call__(self, name: str) -> str:
        """The checkpoint's name of our parameter ``name``."""
        for ours, theirs in self.prefixes:
            if name.startswith(ours):
                return theirs + name[len(ours) :]
        raise AssertionError(f"no prefix for parameter {name}")


def load_module(build: Callable[[], Module], tensors: TensorFiles, names: Names) -> Module:
    """Build a module and fill it.

    Raises:
        CheckpointError: a tensor is missing or has another shape; the message names it.
    """
    with torch.device("meta"):
        module = build()
    loaded: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay one; the first name is read
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        if parameter not in loaded:
            tensor = read(tensors, names, name, tuple(parameter.shape))
            loaded[parameter] = nn.Parameter(tensor, requires_grad=False)
        setattr(module.get_submodule(owner), leaf, loaded[parameter])
    return module.eval()


def read(tensors: TensorFiles, names: Names, name: str, shape: tuple[int, ...]) -> Tensor:
    """The float32 tensor for our parameter ``name``."""
    source = names(name)
    if source not in tensors.files and name.startswith(names.unused):
        return torch.zeros(shape)
    found = tensors.shape(source)
    if found != shape:
        raise CheckpointError(
            f"tensor {source} has shape {list(found)}, expected {list(shape)} from config.json; "
            "the configuration belongs to other weights"
        )
    tensor = tensors.tensor(source)
    if tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"tensor {source} is stored as {tensors.dtype(source)}, expected BF16, F16, F32 or F64; "
            "quantised checkpoints cannot be exported, give the original one"
        )
    return tensor.to(torch.float32)
