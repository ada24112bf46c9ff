"""Which LinVT a checkpoint or a separate weight file holds: its choices and where its tensors are.

Released files carry no sizes for heads, layers and top_k (the code fixes 4, 8 and 1024); layers, queries and width are
read off the tensors, the rest from ``linvt_*`` keys: of the weight file's own metadata, of a ``config.json`` beside it,
or of the checkpoint's ``config.json``, in that order.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from export.checkpoint import Checkpoint, TensorFiles, read_json
from export.fields import optional
from export.load import Names, OrZeros, prefixed
from runtime.errors import CheckpointError
from runtime.linvt import LinVTConfig

__all__ = ["LinVTWeights", "linvt_from_checkpoint", "linvt_from_file", "linvt_keys"]

QUERIES = "query_tokens"
LAYER = re.compile(r"linVT\.svt_module\.attention_network\.layers\.(\d+)\.")
# Key of config.json -> field of LinVTConfig. num_video_query_token is published; the others are ours.
KEYS = {
    "linvt_num_heads": "heads",
    "linvt_num_layers": "layers",
    "linvt_top_k": "top_k",
    "linvt_norm_eps": "norm_eps",
    "num_video_query_token": "queries",
    "linvt_pool_scales": "pool_scales",
    "linvt_axes": "axes",
    "linvt_select_from": "select_from",
    "linvt_positions": "positions",
    "linvt_query_self_attention": "query_self_attention",
    "linvt_residual": "residual",
    "linvt_order": "order",
    "linvt_tokens_per_frame": "tokens_per_frame",
    "linvt_max_frames": "max_frames",
}
LARGEST = 2**16  # tokens or frames; the released code keeps 1024 tokens
SIZES = ("linvt_num_layers", "num_video_query_token")  # the tensors say these themselves
# Stored in released files, read by no formula: query and key of the collapsed self attention stay in the packed tensor.
UNUSED = r"linVT\.tta_module\.layer_linagg\.linear_aggregator\.(wv|dense)\..*"
NAMES = Names(((UNUSED, lambda found: OrZeros(found[0])), prefixed("", "")))


@dataclass(frozen=True)
class LinVTWeights:
    """A LinVT's choices and its tensors."""

    config: LinVTConfig
    tensors: TensorFiles
    names: Names = NAMES

    @property
    def storage(self) -> str:
        """The dtype the weights are stored in."""
        return self.tensors.dtype(QUERIES)


def linvt_from_checkpoint(checkpoint: Checkpoint, width: int) -> LinVTWeights | None:
    """The LinVT inside a checkpoint, or None when it has none."""
    if QUERIES not in checkpoint.tensors.files:
        return None
    return linvt_from_tensors(checkpoint.tensors, checkpoint.config, width)


def linvt_from_file(path: str | os.PathLike[str], checkpoint: Checkpoint, width: int) -> LinVTWeights:
    """The LinVT in a safetensors file of its own, or in a folder of such files."""
    source = Path(path)
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    if not files or not files[0].is_file():
        raise CheckpointError(f"--linvt {path}: expected a safetensors file, a folder of them, or none")
    tensors = TensorFiles.scan(files)
    beside = files[0].parent / "config.json"
    inherited = {key: value for key, value in checkpoint.config.items() if key not in SIZES}
    config = (
        inherited
        | (read_json(beside) if beside.is_file() else {})
        | {key: parsed(value) for key, value in tensors.metadata().items() if key in KEYS}
    )
    return linvt_from_tensors(tensors, config, width)


def linvt_from_tensors(tensors: TensorFiles, config: Mapping[str, Any], width: int) -> LinVTWeights:
    """Choices from ``config``, with layers, queries and width checked against the tensors."""
    shape = tensors.shape(QUERIES)
    if len(shape) != 3 or shape[2] != width:
        raise CheckpointError(
            f"tensor {QUERIES} has shape {list(shape)}, expected [1, queries, {width}]; "
            "these LinVT weights belong to another LLM"
        )
    layers = {int(found[1]) for name in tensors.files if (found := LAYER.match(name))}
    sizes = {"queries": shape[1], "layers": len(layers)}
    for key in SIZES:
        if config.get(key) not in (None, sizes[KEYS[key]]):
            raise CheckpointError(
                f"config.json field {key} is {config[key]!r}, the LinVT weights hold {sizes[KEYS[key]]}; "
                "the configuration belongs to other weights"
            )
    fields = sizes | {field: config[key] for key, field in KEYS.items() if config.get(key) is not None}
    if not optional(config, "use_multi_scale", True):
        fields["pool_scales"] = [1]
    try:
        chosen = msgspec.convert(fields | {"width": width}, LinVTConfig)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"LinVT settings in config.json do not fit: {error}") from error
    if max(chosen.top_k, chosen.max_frames) > LARGEST:
        raise CheckpointError(
            f"LinVT settings in config.json do not fit: top_k {chosen.top_k} and max_frames {chosen.max_frames} must "
            f"be at most {LARGEST}, norm_eps {chosen.norm_eps} from 0 to 1"
        )
    return LinVTWeights(chosen, tensors)


def linvt_keys(config: LinVTConfig) -> dict[str, Any]:
    """The ``config.json`` keys that say what ``config`` says."""
    return {key: getattr(config, field) for key, field in KEYS.items()}


def parsed(value: str) -> Any:
    """A metadata string as JSON, or as it is."""
    try:
        return json.loads(value)
    except ValueError:
        return value
