"""``bundle.json``: what a bundle holds and how it wants to be fed.

The exporter writes it, the runtime believes nothing else. Decoding is strict: unknown fields, wrong types and stages
that do not fit together are refused with the place in the document.

Reads and writes bytes only; ``bundle`` looks at the files the manifest names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from runtime.errors import BundleError
from runtime.linvt import LinVTConfig
from runtime.options import GenerationDefaults
from runtime.positions import PositionSpec
from runtime.preprocess import Preprocess
from runtime.text import PromptSpec

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "JSON_ERRORS",
    "Compute",
    "FileSpec",
    "FrameSpec",
    "Manifest",
    "QuantizedSpec",
    "StageSpec",
    "Storage",
    "TensorSpec",
    "decode_manifest",
    "encode_manifest",
]

FORMAT = "linvt-bundle"
FORMAT_VERSION = 3
READABLE = (2, 3)  # version 3 added quantised stages, nothing else
JSON_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)  # what decoding untrusted JSON raises

MAX_FRAMES = 2**16
PART = r"(?!\.+(?:/|$))[A-Za-z0-9_.+-]+"  # of a file path: neither "." nor ".."
FILE_PATH = re.compile(rf"(?=.{{1,200}}$){PART}(?:/{PART})*", re.ASCII)
SHA256 = re.compile("[0-9a-f]{64}")

Dtype = Literal["float32", "float16", "bfloat16", "int64", "int32", "bool"]
Compute = Literal["float32", "float16", "bfloat16"]
Storage = Literal["float32", "float16", "bfloat16", "int8", "int4"]
STAGES = ("vision", "refine", "aggregate", "decode")  # in the order in which a video meets them


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph input or output; a named axis is free."""

    name: str
    dtype: Dtype
    shape: tuple[int | str, ...]


class QuantizedSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a stage was quantised, and how far it is from the graph it was made of; shown, never acted on.

    Attributes:
        weights: what the quantised layers' weights are stored in.
        activations: what the quantised layers multiply in; "float" where the weights alone are narrow.
        block: weights of a column that share a scale; 0 for all of them.
        layers: how many linear layers are quantised.
        floats: layers left in floating point, the most harmful first.
        cosine: smallest cosine between this stage's output and the float stage's, over the measured examples.
        size_ratio: bytes of graph and weights over those of all weights in float32.
    """

    weights: Literal["int8", "int4"]
    activations: Literal["int8", "float"]
    block: int = 0
    layers: int
    floats: tuple[str, ...] = ()
    cosine: float
    size_ratio: float

    def __post_init__(self) -> None:
        if self.layers < 0 or not -1 <= self.cosine <= 1:
            raise ValueError(
                f"quantised layers are {self.layers} and their cosine {self.cosine:g}, 0 or more and -1 to 1"
            )


class StageSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One graph of the bundle.

    Attributes:
        older: the same graph for engines that know older opsets only, newest first; it shares the weights.
        compute: dtype the graph calculates in.
        storage: dtype of the weights in the file; 16-bit storage is used where it loses nothing.
        quantized: set where layers are quantised; the loss that was measured is in ``quantization.json``.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    older: tuple[str, ...] = ()
    compute: Compute = "float32"
    storage: Storage = "float32"
    quantized: QuantizedSpec | None = None


class FrameSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many frames the model takes, and what they become.

    Attributes:
        tokens: N, tokens of one set.
        group: frames that become one set of tokens together; the last frame fills up an incomplete group.
    """

    minimum: int
    default: int
    maximum: int
    tokens: int
    group: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.default <= self.maximum <= MAX_FRAMES or min(self.tokens, self.group) < 1:
            raise ValueError(
                f"frames must satisfy 1 <= minimum <= default <= maximum <= {MAX_FRAMES}, tokens and group >= 1"
            )

    def sets(self, frames: int) -> int:
        """T, the number of sets of tokens that so many frames become."""
        return math.ceil(frames / self.group)


class FileSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and SHA-256 (hex) of a file."""

    size: int
    sha256: str

    def __post_init__(self) -> None:
        if self.size < 0 or not SHA256.fullmatch(self.sha256):
            raise ValueError("a file needs a size of 0 or more and a SHA-256 of 64 lower-case hex digits")


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
        route: whether frames are encoded as pictures, or as the family encodes videos.
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
    route: Literal["images", "video"] = "images"
    preprocess: Preprocess
    prompt: PromptSpec
    positions: PositionSpec
    generation: GenerationDefaults
    files: dict[str, FileSpec]
    provenance: dict[str, Any] = {}

    def __post_init__(self) -> None:
        sizes = (self.context, self.width, self.layers, self.heads_kv, self.head_dim)
        if min(sizes) < 1:
            raise ValueError("context, width, layers, heads_kv and head_dim must all be at least 1")
        for path in self.files:
            if not FILE_PATH.fullmatch(path):
                raise ValueError(f"file path {path!r:.80} leads outside the bundle or has odd characters")
        if self.linvt:
            check_linvt(self.linvt, self.width, self.frames)
        check_stages(self)


class Header(msgspec.Struct):
    """The two fields that every format version has."""

    format: str
    format_version: int


def check_linvt(linvt: LinVTConfig, width: int, frames: FrameSpec) -> None:
    """LinVT, the LLM and the frame counts fit together."""
    if linvt.width != width:
        raise ValueError(f"LinVT has width {linvt.width}, the LLM {width}")
    least = (linvt.min_frames(frames.tokens) - 1) * frames.group + 1
    if frames.minimum < least:
        raise ValueError(f"LinVT's top_k {linvt.top_k} needs at least {least} frames, the minimum is {frames.minimum}")
    fits_positions = linvt.tokens_per_frame == frames.tokens and linvt.max_frames >= frames.sets(frames.maximum)
    if linvt.positions == "absolute" and not fits_positions:
        raise ValueError("LinVT's positions are not those of the frames and the tokens per frame")


def check_stages(manifest: Manifest) -> None:
    """The right stages, each with the tensors that the manifest's sizes ask for."""
    expected = {"vision", "decode"} | ({"refine", "aggregate"} if manifest.linvt else set())
    if set(manifest.stages) != expected:
        raise ValueError(f"stages must be {sorted(expected)}, found {sorted(manifest.stages)}")
    for name, stage in manifest.stages.items():
        for file in (stage.file, *stage.older):
            if file not in manifest.files or not file.endswith(".onnx"):
                raise ValueError(f"stage file {file!r:.80} is not an .onnx file among the files")
        shapes = {spec.name: spec.shape for spec in (*stage.inputs, *stage.outputs)}
        for tensor, wanted in contract(manifest, name):
            found = shapes.get(tensor)
            if found is None or len(found) != len(wanted) or not all(map(fits, found, wanted)):
                shown = "missing" if found is None else str(list(found))
                raise ValueError(f"stage {name}: {tensor} is {shown:.80}, expected {wanted}")
        caches = sum(tensor.startswith("past_") for tensor in shapes)
        if name == "decode" and caches != 2 * manifest.layers:
            raise ValueError(
                f"stage decode: {caches} cache inputs, expected a key and a value of {manifest.layers} layers"
            )


def fits(found: int | str, wanted: int | str) -> bool:
    """Whether an axis is as wanted: the same number, or for a name any number or name."""
    return isinstance(wanted, str) or found == wanted


def contract(manifest: Manifest, stage: str) -> Iterator[tuple[str, list[int | str]]]:
    """The tensors a stage must have, with their shapes; a family may add inputs."""
    tokens, width = manifest.frames.tokens, manifest.width
    if stage == "vision":
        yield "pixel_values", ["frames", 3, *manifest.preprocess.size]
        if manifest.preprocess.mask_patch:
            yield "pixel_mask", ["frames", manifest.preprocess.mask_patches]
        yield "tokens", ["frames", tokens, width]
    elif stage == "decode":
        yield "inputs_embeds", [1, "sequence", width]
        yield "position_ids", [1, "sequence"] if manifest.positions.axes == 1 else [3, 1, "sequence"]
        yield "write_index", [1]
        yield "logits", [1, "vocabulary"]
        for layer in range(manifest.layers):
            for tensor in ("past_key", "past_value", "present_key", "present_value"):
                yield f"{tensor}.{layer}", [1, manifest.heads_kv, "capacity", manifest.head_dim]
    elif manifest.linvt:
        if stage == "refine":
            yield "tokens", [1, "frames", tokens, width]
        else:
            yield "text", [1, "text", width]
            yield "tokens", [1, manifest.linvt.queries, width]
        yield "visual", [1, manifest.linvt.pooled_tokens, width]


def decode_manifest(data: bytes) -> Manifest:
    """``bundle.json`` -> manifest.

    Raises:
        BundleError: not JSON, another format or version, or fields that do not fit.
    """
    try:
        header = msgspec.json.decode(data, type=Header)
    except JSON_ERRORS as error:
        raise BundleError(f"bundle.json is not a LinVT manifest: {error!s:.200}; export the bundle again") from error
    if header.format != FORMAT:
        raise BundleError(
            f"bundle.json has format {header.format!r:.40}, expected {FORMAT!r}; give a folder that linvt-export wrote"
        )
    if header.format_version not in READABLE:
        raise BundleError(
            f"bundle.json has format version {header.format_version}, this release reads "
            f"{READABLE[0]} to {READABLE[-1]}; export the bundle again or install the release that wrote it"
        )
    try:
        return msgspec.json.decode(data, type=Manifest)
    except JSON_ERRORS as error:
        raise BundleError(f"bundle.json does not fit: {error!s:.400}; export the bundle again") from error


def encode_manifest(manifest: Manifest) -> bytes:
    """Manifest -> indented JSON that is the same for equal manifests."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1) + b"\n"
