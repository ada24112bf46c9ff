"""The token embedding table, looked up in numpy straight from the memory-mapped file.

Reads ``embedding.safetensors``: eight bytes of header length, a JSON header, one tensor ``embedding`` (V, D)
in F32, F16 or BF16. Pages are read when a token is looked up: a table of a gigabyte costs almost no memory.

Does not read other safetensors files, does not write, and does not follow a file that changes while mapped.
"""

from __future__ import annotations

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
_STORED: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


class _Tensor(msgspec.Struct, forbid_unknown_fields=True):
    dtype: Literal["F32", "F16", "BF16"]
    shape: tuple[int, int]
    data_offsets: tuple[int, int]


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    embedding: _Tensor
    metadata: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict)


class EmbeddingTable:
    """Rows of the LLM's input embedding, by token id.

    Attributes:
        vocabulary: V, number of rows.
        width: D, length of a row.
        dtype: how the rows are stored, "F32", "F16" or "BF16".
    """

    def __init__(self, stored: NDArray[Any], dtype: Literal["F32", "F16", "BF16"]) -> None:
        self._stored = stored  # (V, D) f32, f16, or bf16 as u16
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
                tensor, start = _read_header(file)
                mapped: NDArray[Any] = np.memmap(file, _STORED[tensor.dtype], "r", start, tensor.shape)
        except OSError as error:
            reason = error.strerror or error
            raise BundleError(f"{path} cannot be read: {reason}; expected a file of the bundle") from error
        except ValueError as error:  # also what msgspec raises
            raise BundleError(
                f"{path} is not an embedding table: {error}; expected one tensor 'embedding' (V, D) in F32, "
                "F16 or BF16; copy or export the bundle again"
            ) from error
        return cls(np.asarray(mapped), tensor.dtype)

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


def _read_header(file: BufferedReader) -> tuple[_Tensor, int]:
    """The checked description of the tensor and the place where its bytes start."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
        raise ValueError(f"its header would have {length} bytes in a file of {size}")
    try:
        tensor = msgspec.json.decode(file.read(length), type=_Header).embedding
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    start = 8 + length
    _check_extent(tensor, size - start)
    return tensor, start


def _check_extent(tensor: _Tensor, available: int) -> None:
    """Refuse a tensor that does not fill the ``available`` bytes after the header exactly."""
    vocabulary, width = tensor.shape
    if vocabulary < 1 or width < 1:
        raise ValueError(f"its shape is {tensor.shape}")
    needed = vocabulary * width * _STORED[tensor.dtype].itemsize
    if tensor.data_offsets != (0, needed) or needed != available:
        raise ValueError(
            f"{tensor.shape} {tensor.dtype} needs {needed} bytes, the header says {tensor.data_offsets} and "
            f"the file has {available}"
        )
