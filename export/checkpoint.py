"""A published checkpoint on disk: its JSON files and its tensors by name, read one at a time.

Takes a folder, or a hub id where the network allows. Tensors come straight from safetensors files, or from files of
``torch.save`` where nothing else is published; no remote code runs and no model class is needed. Knows no family.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from export.pickled import PickleReader
from runtime.errors import CheckpointError

__all__ = ["Checkpoint", "TensorFiles"]

HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
BIN = "pytorch_model*.bin"
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class TensorFiles:
    """Tensors by name, each in one of several files."""

    files: dict[str, Path]

    @classmethod
    def scan(cls, paths: list[Path]) -> TensorFiles:
        """List the tensors of ``paths``; a name in two files is an error."""
        files: dict[str, Path] = {}
        for path in paths:
            with opened(path) as reader:
                for name in reader.keys():  # noqa: SIM118  a reader is no dict
                    if name in files:
                        raise CheckpointError(
                            f"tensor {name} is in both {files[name].name} and {path.name}; remove one file"
                        )
                    files[name] = path
        return cls(files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        with opened(self.file(name)) as reader:
            return tuple(reader.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Dtype of a tensor in safetensors' spelling, e.g. "BF16"."""
        with opened(self.file(name)) as reader:
            spelled: str = reader.get_slice(name).get_dtype()
        return spelled

    def tensor(self, name: str) -> Tensor:
        """Read one tensor in its stored dtype."""
        with opened(self.file(name)) as reader:
            tensor: Tensor = reader.get_tensor(name)
        return tensor

    def file(self, name: str) -> Path:
        """The file that holds ``name``."""
        if name not in self.files:
            if any(".lora_A." in known for known in self.files):
                raise CheckpointError(
                    f"tensor {name} is missing: the checkpoint holds unmerged LoRA weights; merge them first (peft's "
                    "merge_and_unload) and save the whole model"
                )
            raise CheckpointError(
                f"tensor {name} is missing among {len(self.files)} tensors; "
                "the checkpoint is incomplete or of another model"
            )
        return self.files[name]

    def metadata(self) -> dict[str, str]:
        """The ``__metadata__`` of all files, later files first."""
        merged: dict[str, str] = {}
        for path in dict.fromkeys(self.files.values()):
            with opened(path) as reader:
                merged |= reader.metadata() or {}
        return merged


@dataclass(frozen=True)
class Checkpoint:
    """A folder in a published layout.

    Attributes:
        config: ``config.json``.
    """

    folder: Path
    config: dict[str, Any]
    tensors: TensorFiles

    @classmethod
    def open(cls, source: str | os.PathLike[str]) -> Checkpoint:
        """Open a folder or a hub id.

        Raises:
            CheckpointError: neither a folder with ``config.json`` and weights nor a reachable hub id.
        """
        folder = find_folder(source)
        config = read_json(folder / "config.json")
        return cls(folder, config, TensorFiles.scan(weight_files(folder)))

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the checkpoint; empty when absent."""
        path = self.folder / name
        return read_json(path) if path.exists() else {}

    def fingerprint(self) -> str:
        """SHA-256 of the configuration and of every tensor's name, shape and dtype, however they are sharded."""
        lines = []
        for path in dict.fromkeys(self.tensors.files.values()):
            with opened(path) as reader:
                for name in reader.keys():  # noqa: SIM118  a reader is no dict
                    part = reader.get_slice(name)
                    lines.append(f"{name} {part.get_shape()} {part.get_dtype()}\n")
        config = json.dumps(self.config, sort_keys=True)
        return hashlib.sha256("".join([config, "\n", *sorted(lines)]).encode()).hexdigest()


def find_folder(source: str | os.PathLike[str]) -> Path:
    """The checkpoint's folder, downloaded when ``source`` is a hub id rather than a path."""
    folder = Path(source)
    if os.path.isfile(folder / "config.json"):  # noqa: PTH113  Path.is_file() raises where a folder is closed to us
        return folder
    if os.path.lexists(folder) or os.fspath(source).count("/") != 1 or folder.is_absolute():
        raise CheckpointError(
            f"{source} is not a checkpoint: expected a folder with config.json and *.safetensors, or a hub id"
        )
    return download(os.fspath(source))


def download(identifier: str) -> Path:
    """Fetch a checkpoint from the hub, or take it from the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # The root of the HTTP client's errors: another library in every major version of the hub's.
    transport: list[type[Exception]] = [kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception)]
    refusals: tuple[type[Exception], ...] = (HFValidationError, LocalEntryNotFoundError, OSError, *transport)
    try:
        folder = Path(snapshot_download(identifier, allow_patterns=HUB_PATTERNS))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(identifier, allow_patterns=[*HUB_PATTERNS, BIN]))
        return folder
    except refusals as error:
        raise CheckpointError(
            f"{identifier} is neither a folder nor a checkpoint that could be downloaded: {error}"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint, safetensors first; with an index, exactly those it names."""
    has_safetensors = any(folder.glob("*.safetensors"))
    index = next((folder / name for name in INDICES if (folder / name).exists()), None)
    if index is not None and not (has_safetensors and index.name == INDICES[1]):
        paths = indexed_files(index)
    else:
        paths = sorted(folder.glob("*.safetensors" if has_safetensors else BIN))
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{folder}: shard {path.name} is missing; download it again")
    if not paths:
        raise CheckpointError(f"{folder} holds no *.safetensors and no {BIN}; download the weights first")
    return paths


def indexed_files(index: Path) -> list[Path]:
    """The shards that an index names, which lie beside it."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files; download it again")
    paths = [index.parent / shard for shard in sorted(set(names.values()))]
    for path in paths:
        if path.parent != index.parent or path.name == "..":
            raise CheckpointError(f"{index} names {str(path)!r}, expected files beside it; download it again")
    return paths


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, expected a JSON object")
    return content


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors reader over ``path``, memory-mapped, or the same over a pytorch_model file."""
    if path.suffix == ".bin":
        yield PickleReader.open(path)
        return
    try:
        with safe_open(path, framework="pt") as reader:
            yield reader
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}; download it again") from error
