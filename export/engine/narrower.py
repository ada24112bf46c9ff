"""The same model in a narrower bundle, and what its engines would take: another export, or quantised.

Offers what the exporter and the calibration accept for this bundle. Whether an LLM may compute in float16 is not
told by its bundle; so a quantised bundle, which cannot be had in bfloat16, is offered no 16 bits.

Estimates from the graphs that are there; exports and quantises nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from calibration.choose_blocks import block_of
from calibration.options import PRECISIONS, Precision, QuantizeOptions
from export.engine.estimate import Estimate, StageMemory
from export.engine.weights import Layer, Weights
from runtime.manifest import Manifest, StageSpec

__all__ = ["Change", "narrower"]

BLOCK = QuantizeOptions().block  # rows of a 4-bit weight that share a scale, as the quantiser has them
FLOAT = "refine"  # LinVT's SVR computes in float32 whatever an export asks for


@dataclass(frozen=True)
class Change:
    """Something to ask for in place of what was asked, and what it would take.

    Attributes:
        precision: what the bundle would be narrowed to; "" where it stays.
    """

    advice: str
    estimate: Estimate
    precision: str = ""


def narrower(manifest: Manifest, now: Callable[[bool], Estimate]) -> Iterator[Change]:
    """Other bundles, the least loss first.

    Args:
        manifest: of the bundle.
        now: what its engines take; with True, where all but SVR computed in float32.
    """
    specs = manifest.stages
    computes = {spec.compute for name, spec in specs.items() if name != FLOAT}
    if any(spec.quantized for spec in specs.values()):
        words = "quantise the float bundle it was made of: python -m calibration FLOAT CLIPS -o OTHER --precision"
        yield from quantised_changes(manifest, words, now(False))
        return
    if "float32" in computes:
        half = tuple(halved(stage, specs[stage.stage]) for stage in now(False).stages)
        yield Change("export with --dtype float16", replace(now(False), stages=half), "float16")
    if "bfloat16" in computes:  # calibration runs on the CPU, which has none
        words = "export with --dtype float32 --calibration CLIPS --precision"
        yield from quantised_changes(manifest, words, now(True))
    else:
        words = "quantise it: python -m calibration BUNDLE CLIPS -o OTHER --precision"
        yield from quantised_changes(manifest, words, now(False))


def quantised_changes(manifest: Manifest, words: str, now: Estimate) -> Iterator[Change]:
    """Both precisions, where they would make any stage narrower than it is."""
    for precision in PRECISIONS:
        stages = tuple(quantised(stage, manifest.stages[stage.stage], precision) for stage in now.stages)
        if stages != now.stages:
            yield Change(f"{words} {precision}", replace(now, stages=stages), precision.upper())


def halved(stage: StageMemory, spec: StageSpec) -> StageMemory:
    """A float32 stage in 16 bits, from above.

    Its weights and its cache shrink. Of its scratch memory the largest parts, scores, masks and angles, stay in
    float32; inputs and outputs do too, with copies in 16 bits.
    """
    if stage.stage == FLOAT or spec.compute != "float32":
        return stage
    layers = tuple(replace(layer, bytes=layer.bytes // 2) for layer in stage.weights.layers)
    return replace(
        stage,
        weights=Weights(layers, stage.weights.other // 2),
        activations=stage.activations + stage.buffers // 2,
        cache=stage.cache // 2,
    )


def quantised(stage: StageMemory, spec: StageSpec, precision: Precision) -> StageMemory:
    """A stage with the weights that calibration gives its linear layers; one that is quantised so stays."""
    wanted = precision if stage.stage == "decode" else "int8"
    if spec.quantized and (wanted == "int8" or spec.quantized.weights == "int4"):
        return stage
    itemsize = 2 if spec.compute == "float16" else 4  # a bfloat16 stage is exported in float32 first
    size_in = in_int4 if wanted == "int4" else in_int8
    layers = tuple(replace(layer, bytes=size_in(layer, itemsize), narrow=True) for layer in stage.weights.layers)
    return replace(stage, weights=Weights(layers, stage.weights.other))


def in_int8(layer: Layer, itemsize: int) -> int:
    """Bytes of a layer's weights in 8 bits, with a scale a column."""
    return layer.rows * layer.columns + itemsize * layer.columns


def in_int4(layer: Layer, itemsize: int) -> int:
    """Bytes of a layer's weights in 4 bits, with a scale a block; in floating point where there are no such weights.

    No block may divide the rows, and TensorRT's parser takes no odd number of columns in 4 bits; the quantiser gives
    such a column 8, which an engine multiplies in floating point.
    """
    elements, block = layer.rows * layer.columns, block_of(layer.rows, BLOCK)
    if not block or layer.columns % 2:
        return itemsize * elements
    return elements // 2 + itemsize * (elements // block)
