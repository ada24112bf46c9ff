"""``python -m tests.benchmarks.int8_vision [MODEL LAYERS]``: a vision stage of a real size, 8 bits against float32.

Random weights in the sizes of a published model, frames with the spectrum of natural pictures. The stage is calibrated
on some frames and timed on others, both forms in turns in one run on the CPU. Prints seconds, where they go, the ratio,
sizes and the cosine of the outputs; ends in one JSON line.
"""

from __future__ import annotations

import collections
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn

from calibration.observe import Observer
from calibration.options import QuantizeOptions
from calibration.parity import cosine
from calibration.plan import built, planned
from calibration.stage_file import write_stage_file
from calibration.watch import watched_session
from export.checkpoint import Checkpoint
from export.families import Backbone, backbone_from_checkpoint
from export.families.base import FrameRoute
from export.stages import vision_stage
from export.trace import onnx_from_stage
from runtime.backend_ort import create_session
from runtime.manifest import FrameSpec, StageSpec
from runtime.preprocess import vision_feeds
from tests.benchmarks.real_size import GOLDEN, MODELS, Shapes, edit

CALIBRATED, TIMED = 4, 4  # frames, rounds
SPREAD = 0.02  # standard deviation of every weight
DEPTH = "vision_config.num_hidden_layers"


def main(arguments: list[str]) -> int:
    """Export, calibrate, time."""
    name = arguments[0] if arguments else "internvl2-1b"
    layers = int(arguments[1]) if len(arguments) > 1 else 0
    with tempfile.TemporaryDirectory() as folder:
        floats, narrow = Path(folder) / "float", Path(folder) / "int8"
        floats.mkdir(), narrow.mkdir()
        backbone = sized_backbone(name, layers, Path(folder) / "checkpoint")
        spec = write_vision(backbone, floats)
        frames = [natural_frame(seed, *backbone.preprocess.size) for seed in range(CALIBRATED + 1)]
        feeds = [vision_feeds([frame], backbone.preprocess) for frame in frames]
        began = time.perf_counter()
        calibrate(floats, spec, narrow, feeds[:-1])
        print(f"calibrated in {time.perf_counter() - began:.0f} s")
        report(name, floats, narrow, feeds[-1])
    return 0


def sized_backbone(name: str, layers: int, target: Path) -> Backbone:
    """The model's backbone from its config alone."""
    model = MODELS[name]
    shutil.copytree(GOLDEN / model.fixture, target, ignore=shutil.ignore_patterns("*.npz", "*.safetensors", "*.md"))
    if layers:
        fields = {**model.edits["config.json"], DEPTH: layers}
        model = replace(model, edits={**model.edits, "config.json": fields})
    for file, edits in model.edits.items():
        edit(target / file, edits)
    tensors = Shapes(dict.fromkeys(model.shapes, target))
    object.__setattr__(tensors, "known", model.shapes)
    config = json.loads((target / "config.json").read_text("utf-8"))
    return backbone_from_checkpoint(Checkpoint(target, config, tensors), FrameRoute())


def write_vision(backbone: Backbone, folder: Path) -> StageSpec:
    """Trace the stage with random weights."""
    torch.manual_seed(0)
    module = backbone.vision()
    for name, parameter in module.named_parameters():
        ones = parameter.ndim == 1 and not name.endswith("bias")
        nn.init.normal_(parameter, 1.0 if ones else 0.0, SPREAD)
    stage = vision_stage(module, backbone.preprocess, FrameSpec(1, 8, 16, backbone.tokens_per_frame))
    return write_stage_file(onnx_from_stage(stage), folder, "vision", compute="float32", storage="float32")


def natural_frame(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """(H, W, 3) whose amplitudes fall with frequency, as those of natural pictures do, and whose channels agree."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1
    planes = np.fft.ifft2(np.fft.fft2(random.normal(size=(4, height, width))) / frequency).real
    planes /= planes.std(axis=(1, 2), keepdims=True)
    colour = 0.9 * planes[:1] + 0.4 * planes[1:]
    return (127 + 60 * colour).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def calibrate(source: Path, spec: StageSpec, target: Path, feeds: list[dict[str, NDArray[np.float32]]]) -> None:
    """Observe, choose scales, write the quantised stage."""
    path = source / spec.file
    from calibration.linears import grouped
    from calibration.plan import float_graph

    observers = {name: Observer(name) for name in grouped(float_graph(path)[1].values())}
    session = watched_session([path], list(observers), None)
    for feed in feeds:
        for name, values in zip(observers, session.run(list(observers), feed), strict=True):
            observers[name].add(values)
    del session
    plan = planned(
        path, spec, observers, QuantizeOptions(), narrow=False, given={}, progress=lambda number, count: None
    )
    write_stage_file(built(plan, plan.groups), target, "vision", compute="float32", storage="int8")


def report(name: str, floats: Path, narrow: Path, feeds: dict[str, NDArray[np.float32]]) -> None:
    """Time both in turns and print."""
    sessions = {kind: create_session(folder / "vision.onnx", "cpu", None) for kind, folder in forms(floats, narrow)}
    seconds: dict[str, list[float]] = {kind: [] for kind in sessions}
    outputs = {}
    for number in range(TIMED + 1):
        for kind, session in sessions.items():
            began = time.perf_counter()
            outputs[kind] = session.run(["tokens"], feeds)[0]
            if number:  # the first run warms up
                seconds[kind].append(time.perf_counter() - began)
    sizes = {kind: (folder / "vision.onnx.data").stat().st_size for kind, folder in forms(floats, narrow)}
    fastest = {kind: min(took) for kind, took in seconds.items()}
    for kind, folder in forms(floats, narrow):
        print(f"{kind:8} {fastest[kind]:7.3f} s a frame, {sizes[kind] / 1e6:7.1f} MB")
        print("         " + ", ".join(f"{operator} {share:.1%}" for operator, share in shares(folder, feeds)))
    result = {
        "model": name,
        "seconds": fastest,
        "speedup": fastest["float32"] / fastest["int8"],
        "size_ratio": sizes["int8"] / sizes["float32"],
        "cosine": cosine(outputs["int8"], outputs["float32"]),
    }
    print(json.dumps(result))


def forms(floats: Path, narrow: Path) -> Iterator[tuple[str, Path]]:
    """The two forms and where they are."""
    yield "float32", floats
    yield "int8", narrow


def shares(folder: Path, feeds: dict[str, NDArray[np.float32]]) -> list[tuple[str, float]]:
    """Which operators take the time, most first."""
    options = ort.SessionOptions()
    options.enable_profiling, options.log_severity_level = True, 3
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(str(folder / "vision.onnx"), options, providers=["CPUExecutionProvider"])
    session.run(["tokens"], feeds)
    took: collections.Counter[str] = collections.Counter()
    for event in json.loads(Path(session.end_profiling()).read_text("utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            took[event["args"]["op_name"]] += event["dur"]
    total = sum(took.values())
    return [(operator, duration / total) for operator, duration in took.most_common(5)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
