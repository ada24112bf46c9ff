"""Lowered graphs beside their originals: made plain, fed alike, and held against each other in ONNX Runtime."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from calibration.trt_rules import RELEASES
from export.check import check_bundle
from export.lower import lower, release_of, write_lowered
from runtime.bundle import Bundle
from runtime.manifest import Manifest, TensorSpec

Arrays = dict[str, NDArray[Any]]

OLDEST = next(iter(RELEASES))
NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FLOAT = ir.DataType.FLOAT


def session(model: Path | ir.Model) -> ort.InferenceSession:
    """Products of 4-bit weights would round their activations to 8 bits, level 4: here they do not."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # quiet about caches that are not bound in place
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    data = model if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(model: Path | ir.Model | ort.InferenceSession, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
    opened = model if isinstance(model, ort.InferenceSession) else session(model)
    return dict(zip([value.name for value in opened.get_outputs()], opened.run(None, dict(feeds)), strict=True))


def written_session(bundle: Path, file: str, folder: Path, version: str = OLDEST) -> ort.InferenceSession:
    """ONNX Runtime refuses weights behind a link that leads out of the graph's folder: the file itself for the link."""
    folder.mkdir()
    path = write_lowered(bundle, file, release_of(version), folder, plugin=False)
    for link in folder.iterdir():
        if link.is_symlink():
            target = link.resolve()
            link.unlink()
            shutil.copyfile(target, link)
    return session(path)


def loaded(path: Path) -> ir.Model:
    """A small graph with its weights in memory."""
    return ir.external_data.load_to_model(ir.load(path))


def plain(model: ir.Model) -> ir.Model:
    """A copy that computes in float32 and rounds no activation to 8 bits.

    Where a graph rounds, one that is the same to 1e-7 may round to the other side, and 8 bits are far apart.
    """
    copied = ir.from_proto(ir.to_proto(model))
    for value in copied.graph.initializers.values():
        assert value.const_value is not None
        if value.const_value.dtype in NARROW:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
    outputs = [output for node in copied.graph for output in node.outputs]
    for value in (*copied.graph.inputs, *copied.graph.initializers.values(), *outputs):
        if value.dtype in NARROW:
            value.dtype = FLOAT
    for node in list(copied.graph):
        if node.op_type == "Cast" and node.attributes.get_int("to") in NARROW:
            node.attributes["to"] = ir.AttrInt64("to", int(FLOAT))
        before = node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] else None
        if before is not None and before.op_type == "QuantizeLinear":
            node.outputs[0].replace_all_uses_with(before.inputs[0])
            copied.graph.remove(node)
            if not before.outputs[0].uses():
                copied.graph.remove(before)
    return copied


def share(found: Arrays, expected: Arrays) -> float:
    """The largest difference of any output as a share of that output's largest value."""
    assert found.keys() == expected.keys()
    shares = [0.0]
    for name, wanted in expected.items():
        assert found[name].shape == wanted.shape and found[name].dtype == wanted.dtype, name
        got, wanted = found[name].astype(np.float32), wanted.astype(np.float32)
        assert np.isfinite(got).all(), name
        shares.append(float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-30)))
    return max(shares)


def feeds_of(
    inputs: tuple[TensorSpec, ...], random: np.random.Generator, free: Mapping[str, int], at: int = 0
) -> Arrays:
    """Random inputs in float32; ``at`` is where new rows go in the cache."""
    feeds: Arrays = {
        spec.name: random.normal(size=sizes(spec, free)).astype(np.float32) for spec in inputs if "float" in spec.dtype
    }
    if "inputs_embeds" in feeds:
        positions = next(spec for spec in inputs if spec.name == "position_ids")
        feeds["position_ids"] = np.broadcast_to(at + np.arange(free["sequence"]), sizes(positions, free)).copy()
        feeds["write_index"] = np.array([at])
    return feeds


def sizes(spec: TensorSpec, free: Mapping[str, int]) -> list[int]:
    """A shape with its free axes, which may be a multiple such as "2*sets", filled in."""
    found = []
    for axis in spec.shape:
        *factors, name = str(axis).split("*")
        found.append(axis if isinstance(axis, int) else int("".join(factors) or 1) * free[name])
    return found


def cases(manifest: Manifest, stage: str) -> Iterator[tuple[dict[str, int], int]]:
    """Sizes of the free axes, and where to write: prompts and single rows; caches empty, partly filled and full."""
    if stage == "decode":
        yield {"sequence": 9, "capacity": 32}, 0
        yield {"sequence": 5, "capacity": 24}, 7
        yield {"sequence": 1, "capacity": 24}, 11
        yield {"sequence": 1, "capacity": 17}, 16
    elif stage == "aggregate":
        yield {"text": 1}, 0
        yield {"text": 13}, 0
    else:
        least, most = (manifest.frames.sets(count) for count in (manifest.frames.minimum, manifest.frames.maximum))
        for count in {least, min(least + 3, most)}:
            yield {"frames": count, "sets": count}, 0


def largest_shares(bundle: Path, random: np.random.Generator, version: str = OLDEST) -> dict[str, float]:
    """By stage, how far its lowered graph is from the original over all cases, both made plain."""
    manifest = Bundle.open(bundle).manifest
    found = {}
    for stage, spec in manifest.stages.items():
        original, lowered = loaded(bundle / spec.file), loaded(bundle / spec.file)
        lower(lowered, release_of(version), plugin=False)
        assert rounded_nodes(lowered) == rounded_nodes(original)
        before, after = (session(plain(model)) for model in (original, lowered))
        assert [(value.name, value.shape) for value in after.get_inputs()] == [
            (value.name, value.shape) for value in before.get_inputs()
        ]
        found[stage] = max(
            share(run(after, feeds), run(before, feeds))
            for free, at in cases(manifest, stage)
            for feeds in [feeds_of(spec.inputs, random, free, at)]
        )
        print(f"{bundle.name} {stage} for {version}: {found[stage]:.1e} of the largest value")
    return found


def rounded_nodes(model: ir.Model) -> list[tuple[str | None, ...]]:
    """QuantizeLinear and DequantizeLinear with the constants they read."""
    nodes = [node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return [(node.op_type, node.name, *(value and value.name for value in node.inputs[1:])) for node in nodes]


def assert_taken(bundle: Path) -> None:
    """Every listed TensorRT takes every stage."""
    opened = Bundle.open(bundle)
    report = check_bundle(opened, list(RELEASES))
    assert report.problems == () and report
    assert {(check.stage, check.version) for check in report.checks} == {
        (stage, version) for stage in opened.manifest.stages for version in RELEASES
    }
