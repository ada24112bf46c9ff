"""pytorch_model files (``torch.save`` of a state dict), read like safetensors.

Only tensors and plain containers are unpickled, so that a file cannot run code. A file is mapped into memory and stays
so between reads; pages that were read count as the process' own, so that it is mapped anew from time to time.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from runtime.errors import CheckpointError

__all__ = ["PickleReader"]

SPELLED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
REMAPPED = 2**27  # bytes read between one mapping and the next, which costs some tenths of a second
TORCH_ERRORS = (
    *(RuntimeError, ValueError, EOFError, OSError, LookupError, TypeError, AttributeError),
    pickle.UnpicklingError,
)


@dataclass
class Pickled:
    """The tensors of one file.

    Attributes:
        mapped: they lie in the file rather than in memory.
        read: bytes of them that were asked for.
    """

    tensors: Mapping[str, Tensor]
    mapped: bool
    read: int = 0


@functools.lru_cache(maxsize=1)
def pickled(path: Path, changed: int) -> Pickled:
    """A pytorch_model file, memory-mapped where its format allows; ``changed`` is its time."""
    mapped = True
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            content, mapped = torch.load(path, map_location="cpu", weights_only=True), False
    except TORCH_ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path} is not a whole file of tensors alone: {reason:.200}; download it again or give safetensors"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds {type(content).__name__}, expected tensors by name; give the state dict")
    return Pickled(content, mapped)


@dataclass(frozen=True)
class PickleReader:
    """The part of a safetensors reader that is used here."""

    content: Pickled

    @classmethod
    def open(cls, path: Path) -> PickleReader:
        """Read the names in a file; raises CheckpointError where it is damaged or holds more than tensors."""
        return cls(pickled(path, path.stat().st_mtime_ns))

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self.content.tensors)

    def get_tensor(self, name: str) -> Tensor:
        """One tensor."""
        tensor = self.content.tensors[name].contiguous()
        self.content.read += tensor.nbytes
        if self.content.mapped and self.content.read > REMAPPED:
            pickled.cache_clear()  # the mapping goes with its last tensor
        return tensor

    def get_slice(self, name: str) -> PickleSlice:
        """Shape and dtype of one tensor."""
        return PickleSlice(self.content.tensors[name])

    def metadata(self) -> None:
        """These files have none."""


@dataclass(frozen=True)
class PickleSlice:
    """Shape and dtype of a tensor in safetensors' spelling."""

    tensor: Tensor

    def get_shape(self) -> list[int]:
        """Sizes of all axes."""
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        """E.g. "BF16"."""
        return SPELLED.get(self.tensor.dtype, str(self.tensor.dtype).removeprefix("torch."))
