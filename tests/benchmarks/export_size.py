"""``python -m tests.benchmarks.export_size [MODEL ...]``: what does an export of a real-size checkpoint cost?

Writes random checkpoints of real sizes (``real_size``), exports each in a process of its own and compares the peak of
its resident memory with the float32 weights of the largest stage. Another process opens every graph of the bundle in
ONNX Runtime and runs vision and decode once; where there is a LinVT, one more answers about the sample video.
Takes minutes a model and up to 30 GB of disk in the temporary folder.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.backend import Array, Backend, open_backend
from runtime.bundle import MANIFEST, Bundle
from runtime.manifest import Manifest, decode_manifest
from runtime.run import SAMPLE
from tests.benchmarks.real_size import MODELS

USUAL = [name for name in MODELS if name != "molmo-7b-d"]  # whose LLM takes 28 GB as float32
ALLOWED = 1.3  # times the largest stage's float32 weights, and a gigabyte for everything else
CALL = """
import sys
from importlib import import_module
module, name, *arguments = sys.argv[1:]
code = getattr(import_module(module), name)(arguments)
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
sys.exit(code)
"""
ROWS = 4  # of a prompt
QUESTION = "What is happening in this video?"
ANSWER = ("--frames", "4", "--max-new-tokens", "8", "--ignore-eos", "--json")


class Called(NamedTuple):
    """A finished process.

    Attributes:
        text: what it printed.
        seconds: on the clock.
        cpu_seconds: of all its threads, which other work on the machine lengthens less.
        peak: of its resident memory, in bytes.
    """

    text: str
    seconds: float
    cpu_seconds: float
    peak: int


def main() -> None:
    for name in sys.argv[1:] or USUAL:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measured(name, Path(folder))), flush=True)


def measured(name: str, folder: Path) -> dict[str, object]:
    """One model: its export, its graphs and, with a LinVT, an answer."""
    model = MODELS[name]
    checkpoint, bundle, linvt = folder / "checkpoint", folder / "bundle", folder / "linvt"
    stored = int(called(folder, "tests.benchmarks.real_size", "main", name, str(folder)).text)
    options = ("-o", str(bundle), "--linvt", str(linvt) if model.linvt else "none")
    export = called(folder, "export.__main__", "main", str(checkpoint), *options)
    shutil.rmtree(checkpoint)
    opened = called(folder, __spec__.name, "open_stages", str(bundle))
    row = {"model": name, "cut": model.cut, "checkpoint_gb": gigabytes(stored), **cost(bundle, export)}
    row |= {"open_seconds": json.loads(opened.text), "open_peak_gb": gigabytes(opened.peak)}
    if model.linvt:
        answer = called(folder, "runtime.run", "main", str(bundle), str(SAMPLE), QUESTION, *ANSWER)
        spent = {"seconds": round(answer.seconds, 1), "cpu_seconds": round(answer.cpu_seconds, 1)}
        row["answer"] = spent | {"peak_gb": gigabytes(answer.peak)} | told(answer.text)
    return row


def called(folder: Path, module: str, name: str, *arguments: str) -> Called:
    """Call ``module.name(arguments)`` in a process that remembers nothing in the user's home."""
    begin, used = time.perf_counter(), children_seconds()
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-c", CALL, module, name, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    text, _, peak = done.stdout.rstrip().rpartition("\n")
    return Called(text, time.perf_counter() - begin, children_seconds() - used, int(peak) * 1024)


def children_seconds() -> float:
    """Processor time of all processes that were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cost(folder: Path, export: Called) -> dict[str, object]:
    """Seconds and gigabytes of an export, and what is allowed."""
    manifest = decode_manifest((folder / MANIFEST).read_bytes())
    largest = max(float32_bytes(manifest, stage) for stage in manifest.stages)
    allowed = ALLOWED * largest + 1e9
    return {
        "bundle_gb": gigabytes(sum(spec.size for spec in manifest.files.values())),
        "seconds": round(export.seconds, 1),
        "cpu_seconds": round(export.cpu_seconds, 1),
        "peak_gb": gigabytes(export.peak),
        "largest_stage_fp32_gb": gigabytes(largest),
        "allowed_gb": gigabytes(allowed),
        "within": export.peak <= allowed,
    }


def float32_bytes(manifest: Manifest, stage: str) -> int:
    """Weights of a stage as float32; nearly all of them are stored in the dtype that the manifest names."""
    spec = manifest.stages[stage]
    return manifest.files[f"{spec.file}.data"].size * (1 if spec.storage == "float32" else 2)


def open_stages(arguments: list[str]) -> int:
    """Open every graph of a bundle, one at a time, and run vision and decode; prints the seconds of each as JSON."""
    bundle = Bundle.open(arguments[0])
    seconds = {}
    for stage in bundle.manifest.stages:
        begin = time.perf_counter()
        backend = open_backend(bundle, "cpu")
        graph = backend.graph(stage)
        if stage == "vision":
            tokens = graph.run(random_frames(bundle.manifest))["tokens"]
            check(tokens, (1, bundle.manifest.frames.tokens, bundle.manifest.width))
        if stage == "decode":
            check(decoded(backend, bundle.manifest), bundle.manifest.stages["decode"].outputs[0].shape[1:])
        seconds[stage] = round(time.perf_counter() - begin, 1)
        backend.close()
        del graph
    print(json.dumps(seconds))
    return 0


def check(result: Array, shape: tuple[int | str, ...]) -> None:
    """A result of the right shape that is neither constant nor infinite."""
    assert result.shape == shape, f"got {result.shape}, expected {shape}"
    assert np.isfinite(result).all() and result.std() > 0


def decoded(backend: Backend, manifest: Manifest) -> Array:
    """Logits (V,) behind a few random rows."""
    rows = np.random.default_rng(0).standard_normal((ROWS, manifest.width)).astype(np.float32)
    return backend.decoder(ROWS).step(rows, np.tile(np.arange(ROWS), (manifest.positions.axes, 1)))


def random_frames(manifest: Manifest) -> dict[str, Array]:
    """One set of frames: pixel_values (F, 3, H, W) and, where vision takes it, pixel_mask (F, patches)."""
    random = np.random.default_rng(0)
    sizes = {"pixel_values": (3, *manifest.preprocess.size), "pixel_mask": (manifest.preprocess.mask_patches,)}
    names = [spec.name for spec in manifest.stages["vision"].inputs]
    return {name: random.random((manifest.frames.group, *sizes[name]), np.float32) for name in names}


def told(text: str) -> dict[str, object]:
    """What an answer's JSON says about time and tokens."""
    content = json.loads(text)
    kept = ("prompt_tokens", "first_token_ms", "tokens_per_second", "milliseconds")
    return {"tokens": len(content["token_ids"]), **{name: content[name] for name in kept}}


def gigabytes(count: float) -> float:
    """Bytes in 10^9 bytes."""
    return round(count / 1e9, 2)


if __name__ == "__main__":
    main()
