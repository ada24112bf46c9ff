"""The graph that TensorRT's parser gets for a stage: lowered for the release, and with a cache of one size where it
is written in place.

TensorRT updates a KV cache in place by its KVCacheUpdate layer (10.15 on, ONNX's TensorScatter), whose cache has to be
a network input of a fixed length (operator KVCacheUpdate of TensorRT's operator reference, "static sequence length
dimension"; Torch-TensorRT's in-place converter asks for the same). There the engine's cache has all its rows at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from export.engine.shapes import Profiles, Ranges, profiles_of
from export.lower import Release, lower
from export.lower.read import read_stage
from kernels.spec import DOMAIN, NAME
from runtime.bundle import Bundle

__all__ = ["LoweredStage", "lowered_stages"]


@dataclass(frozen=True)
class LoweredStage:
    """One stage, ready for the parser.

    Attributes:
        model: the graph; its weights stay in the bundle's files.
        path: the bundle's own graph, absolute: weights lie beside it.
        in_place: it writes its KV cache in place.
        pools: it has the node that the plugin is for.
        sha256: of the graph without its weights.
    """

    stage: str
    model: onnx.ModelProto
    path: Path
    profiles: Profiles
    in_place: bool
    pools: bool
    sha256: str


def lowered_stages(
    bundle: Bundle, stages: Iterable[str], release: Release, ranges: Ranges, *, plugin: bool
) -> dict[str, LoweredStage]:
    """Lower stages in memory; weights are not read.

    Raises:
        BundleError: a graph cannot be read or lowered.
    """
    return {stage: lowered_stage(bundle, stage, release, ranges, plugin) for stage in stages}


def lowered_stage(bundle: Bundle, stage: str, release: Release, ranges: Ranges, plugin: bool) -> LoweredStage:
    """Lower one."""
    path = bundle.path(bundle.manifest.stages[stage].file).absolute()
    lowered = read_stage(bundle, stage)
    lower(lowered, release, plugin=plugin)
    model: onnx.ModelProto = ir.to_proto(lowered)
    operators = {(node.domain, node.op_type) for node in model.graph.node}
    in_place = ("", "TensorScatter") in operators
    if in_place:
        fix_cache(model, ranges.tokens.most)
    return LoweredStage(
        stage=stage,
        model=model,
        path=path,
        profiles=profiles_of(bundle.manifest, stage, ranges, in_place=in_place),
        in_place=in_place,
        pools=(DOMAIN, NAME) in operators,
        sha256=hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest(),
    )


def fix_cache(model: onnx.ModelProto, rows: int) -> None:
    """Give the cache's free axis a length, wherever its name stands."""
    graph = model.graph
    cache = next(value for value in graph.input if value.name == "past_key.0")
    name = cache.type.tensor_type.shape.dim[2].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if name and axis.dim_param == name:
                axis.dim_value = rows
