"""The token embedding table, looked up in numpy straight from the memory-mapped file.

Reads ``embedding.safetensors``: eight bytes of header length, a JSON header, one tensor ``embedding`` (V, D)
in F32, F16 or BF16; or in I8 beside a tensor ``scale`` (V,) F32, which every row is multiplied by its number of. Pages
are read when a token is looked up: a table of a gigabyte costs almost no memory.

Does not read other safetensors files, does not write, and does not follow a file that changes while mapped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from runtime.errors import BundleError
from runtime.text import Prompt, PromptSpec

__all__ = ["EmbeddingTable", "prompt_rows"]

_HEADER_LIMIT = 1 << 16  # bytes; a header of one tensor has about a hundred
_STORED: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
}
Stored = Literal["F32", "F16", "BF16", "I8"]


class _Tensor(msgspec.Struct, forbid_unknown_fields=True):
    dtype: Stored
    shape: tuple[int, int]
    data_offsets: tuple[int, int]


class _Scale(msgspec.Struct, forbid_unknown_fields=True):
    dtype: Literal["F32"]
    shape: tuple[int]
    data_offsets: tuple[int, int]


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    embedding: _Tensor
    scale: _Scale | None = None
    metadata: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict)


class EmbeddingTable:
    """Rows of the LLM's input embedding, by token id.

    Attributes:
        vocabulary: V, number of rows.
        width: D, length of a row.
        dtype: how the rows are stored, "F32", "F16", "BF16" or "I8".
    """

    def __init__(self, stored: NDArray[Any], dtype: Stored, scales: NDArray[np.float32] | None = None) -> None:
        self._stored = stored  # (V, D) f32, f16, bf16 as u16, or i8
        self._scales = scales  # (V,) f32, of i8
        self.dtype = dtype
        self.vocabulary, self.width = stored.shape

    @classmethod
    def open(cls, path: str | Path) -> EmbeddingTable:
        """Map the table in the safetensors file at ``path``.

        Raises:
            BundleError: no such file, or anything but one sound tensor ``embedding``.
        """
        try:
            with Path(path).open("rb") as file:
                header, start = _read_header(file)
                mapped = _mapped(file, header.embedding, start)
                scales = np.array(_mapped(file, header.scale, start)) if header.scale else None
        except OSError as error:
            reason = error.strerror or error
            raise BundleError(f"{path} cannot be read: {reason}; expected a file of the bundle") from error
        except ValueError as error:  # also what msgspec raises
            raise BundleError(
                f"{path} is not an embedding table: {error}; expected one tensor 'embedding' (V, D) in F32, "
                "F16 or BF16, or in I8 with 'scale' (V,); copy or export the bundle again"
            ) from error
        return cls(np.asarray(mapped), header.embedding.dtype, scales)

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Ids (S,) int64 -> their rows (S, D) f32.

        Raises:
            BundleError: an id has no row.
        """
        outside = ids[(ids < 0) | (ids >= self.vocabulary)]
        if outside.size:
            raise BundleError(
                f"token id {outside[0]} has no row in embedding.safetensors, expected 0 to "
                f"{self.vocabulary - 1}; tokenizer.json does not belong to it, export the bundle again"
            )
        rows = self._stored[ids]
        if self._scales is not None:
            scaled: NDArray[np.float32] = rows * self._scales[ids][:, None]
            return scaled
        if self.dtype == "BF16":  # the upper half of a f32
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32, copy=False)


def prompt_rows(
    lookup: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    prompt: Prompt,
    spec: PromptSpec,
    visual: NDArray[np.float32],
) -> NDArray[np.float32]:
    """A prompt's embeddings (S, D), with ``visual`` (rows, D) in place of its placeholders or added to theirs."""
    rows = lookup(prompt.table_rows)
    if spec.merge == "replace":
        rows[prompt.visual_positions] = visual
    else:
        rows[prompt.visual_positions] += visual
    return rows


def _mapped(file: BufferedReader, tensor: _Tensor | _Scale, start: int) -> NDArray[Any]:
    """A tensor's bytes as an array; ``start`` is where the first tensor's begin."""
    return np.memmap(file, _STORED[tensor.dtype], "r", start + tensor.data_offsets[0], tensor.shape)


def _read_header(file: BufferedReader) -> tuple[_Header, int]:
    """The checked description of the tensors and the place where their bytes start."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
        raise ValueError(f"its header would have {length} bytes in a file of {size}")
    try:
        header = msgspec.json.decode(file.read(length), type=_Header)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    start = 8 + length
    _check_extent(header, size - start)
    return header, start


def _check_extent(header: _Header, available: int) -> None:
    """Refuse tensors that do not fill the ``available`` bytes after the header exactly, one behind the other."""
    table, scale = header.embedding, header.scale
    if min(table.shape) < 1:
        raise ValueError(f"its shape is {table.shape}")
    if (table.dtype == "I8") != (scale is not None) or (scale and scale.shape != table.shape[:1]):
        raise ValueError("a table in I8, and no other, comes with a scale for every row")
    end = 0
    tensors: list[_Tensor | _Scale] = [table, *([scale] if scale else [])]
    for tensor in sorted(tensors, key=lambda tensor: tensor.data_offsets):
        needed = math.prod(tensor.shape) * _STORED[tensor.dtype].itemsize
        if tensor.data_offsets != (end, end + needed):
            raise ValueError(
                f"{tensor.shape} {tensor.dtype} needs {needed} bytes, the header says {tensor.data_offsets} and "
                f"the file has {available}"
            )
        end += needed
    if end != available:
        raise ValueError(f"its tensors need {end} bytes, the file has {available}")
