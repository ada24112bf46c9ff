"""``bundle.json``: what a bundle holds and how it wants to be fed.

The exporter writes it, the runtime believes nothing else. Decoding is strict: unknown fields, wrong types and stages
that do not fit together are refused with the place in the document.

Reads and writes bytes only; ``bundle`` looks at the files the manifest names.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, Literal

import msgspec

from runtime.errors import BundleError
from runtime.linvt import LinVTConfig
from runtime.options import GenerationDefaults
from runtime.preprocess import Preprocess
from runtime.text import PromptSpec

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "FileSpec",
    "FrameSpec",
    "Manifest",
    "StageSpec",
    "TensorSpec",
    "decode_manifest",
    "encode_manifest",
]

FORMAT = "linvt-bundle"
FORMAT_VERSION = 1

Dtype = Literal["float32", "float16", "bfloat16", "int64", "int32", "bool"]


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph input or output; a named axis is free."""

    name: str
    dtype: Dtype
    shape: tuple[int | str, ...]


class StageSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One graph of the bundle.

    Attributes:
        compute: dtype the graph calculates in.
        storage: dtype of the weights in the file; 16-bit storage is used where it loses nothing.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    compute: Dtype = "float32"
    storage: Dtype = "float32"


class FrameSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many frames the model takes, and N, the tokens a frame becomes."""

    minimum: int
    default: int
    maximum: int
    tokens: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.default <= self.maximum or self.tokens < 1:
            raise ValueError("frames must satisfy 1 <= minimum <= default <= maximum, tokens >= 1")


class FileSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and SHA-256 (hex) of a file."""

    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything about a bundle.

    Attributes:
        family: the backbone, e.g. "internvl2".
        linvt: the tokenizer's choices; None when frame tokens go straight to the LLM.
        context: longest sequence of the LLM in tokens, prompt and answer together.
        width: D, hidden size of the LLM.
        layers, heads_kv, head_dim: shape of the KV cache.
        stages: by name: vision, decode, and with LinVT refine and aggregate.
        files: by path inside the bundle.
        provenance: where it came from; shown, never acted on.
    """

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    family: str
    linvt: LinVTConfig | None
    context: int
    width: int
    layers: int
    heads_kv: int
    head_dim: int
    stages: dict[str, StageSpec]
    frames: FrameSpec
    preprocess: Preprocess
    prompt: PromptSpec
    generation: GenerationDefaults
    files: dict[str, FileSpec]
    provenance: dict[str, Any] = {}

    def __post_init__(self) -> None:
        expected = {"vision", "decode"} | ({"refine", "aggregate"} if self.linvt else set())
        if set(self.stages) != expected:
            raise ValueError(f"stages must be {sorted(expected)}, found {sorted(self.stages)}")
        missing = [stage.file for stage in self.stages.values() if stage.file not in self.files]
        if missing:
            raise ValueError(f"stage file {missing[0]!r} is not among the files")
        sizes = (self.context, self.width, self.layers, self.heads_kv, self.head_dim)
        if min(sizes) < 1:
            raise ValueError("context, width, layers, heads_kv and head_dim must all be at least 1")
        for path in self.files:
            check_inside(path)

    def visual_rows(self, frames: int) -> int:
        """Rows of the prompt that hold the video: Q with LinVT, frames * N without."""
        return self.linvt.queries if self.linvt else frames * self.frames.tokens


class Header(msgspec.Struct):
    """The two fields that every format version has."""

    format: str
    format_version: int


def check_inside(path: str) -> None:
    """Refuse a file path that could leave the bundle's folder."""
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path or ":" in path:
        raise ValueError(f"file path {path!r} leads outside the bundle")


def decode_manifest(data: bytes) -> Manifest:
    """``bundle.json`` -> manifest.

    Raises:
        BundleError: not JSON, another format or version, or fields that do not fit.
    """
    try:
        header = msgspec.json.decode(data, type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"bundle.json is not a LinVT manifest: {error}; export the bundle again") from error
    if header.format != FORMAT:
        raise BundleError(f"bundle.json has format {header.format!r}, expected {FORMAT!r}")
    if header.format_version != FORMAT_VERSION:
        raise BundleError(
            f"bundle.json has format version {header.format_version}, this release reads {FORMAT_VERSION}; "
            "export the bundle again or install the release that wrote it"
        )
    try:
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.ValidationError, RecursionError) as error:
        raise BundleError(f"bundle.json does not fit: {error}; export the bundle again") from error


def encode_manifest(manifest: Manifest) -> bytes:
    """Manifest -> indented JSON that is the same for equal manifests."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1) + b"\n"
