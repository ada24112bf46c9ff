"""ONNX Runtime behind the backend protocol, on the CPU or through the CUDA execution provider.

The KV cache is bound as input and output of the same memory, so that the graph's TensorScatter writes in place. Opens
a graph when it is first needed. Chooses no frames and knows no tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from runtime.backend import Array, BackendName
from runtime.bundle import Bundle
from runtime.errors import BackendError
from runtime.manifest import Manifest

__all__ = ["OrtBackend", "choose_provider"]

ORT_ERRORS = tuple(  # ONNX Runtime's exceptions share no base class of their own
    error for error in vars(ort_errors).values() if isinstance(error, type) and issubclass(error, Exception)
)
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
SILENT = 4  # only fatal messages: everything else arrives as an exception
CACHE_BLOCK = 64  # tokens: capacities are rounded up so that questions of similar length reuse memory


def choose_provider(name: BackendName) -> str:
    """Resolve "auto" and check that the device is there: "cpu" or "cuda"."""
    available = ort.get_available_providers()
    if name == "auto":
        return "cuda" if PROVIDERS["cuda"] in available else "cpu"
    if name not in PROVIDERS:
        raise BackendError(f"unknown backend {name!r}; choose one of auto, {', '.join(PROVIDERS)}")
    if PROVIDERS[name] not in available:
        raise BackendError(
            f"backend {name!r} needs ONNX Runtime's {PROVIDERS[name]}, found {', '.join(available)}; "
            "install 'linvt-edge[cuda]' in an environment of its own or use --backend cpu"
        )
    return name


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn ONNX Runtime's errors, and a memory that does not suffice, into ``BackendError``."""
    try:
        yield
    except ORT_ERRORS as error:
        raise BackendError(f"ONNX Runtime failed to {what}: {error}") from error
    except (MemoryError, RuntimeError) as error:
        raise BackendError(
            f"not enough memory or device failure while trying to {what}: {error}; use fewer frames or tokens"
        ) from error


class OrtBackend:
    """The graphs of one bundle in ONNX Runtime."""

    def __init__(self, bundle: Bundle, name: str, threads: int | None) -> None:
        self.name = name
        self.bundle = bundle
        self.threads = threads
        self.sessions: dict[str, ort.InferenceSession] = {}

    def graph(self, stage: str) -> OrtGraph:
        """The stage's graph, opened on first use and kept."""
        return OrtGraph(self.session(stage), stage)

    def decoder(self, capacity: int) -> OrtDecoder:
        """A decoder with an empty cache for at least ``capacity`` tokens."""
        rounded = -(-capacity // CACHE_BLOCK) * CACHE_BLOCK
        with translated(f"allocate a KV cache of {rounded} tokens"):
            return OrtDecoder(self.session("decode"), self.bundle.manifest, self.name, rounded)

    def close(self) -> None:
        """Free all sessions."""
        self.sessions.clear()

    def session(self, stage: str) -> ort.InferenceSession:
        """The stage's session, created on first use."""
        if stage not in self.sessions:
            path = self.bundle.path(self.bundle.manifest.stages[stage].file)
            with translated(f"load {path.name}"):
                self.sessions[stage] = create_session(path, self.name, self.threads)
        return self.sessions[stage]


def create_session(path: Path, name: str, threads: int | None) -> ort.InferenceSession:
    """Load one graph."""
    options = ort.SessionOptions()
    options.log_severity_level = SILENT
    if threads is not None:
        options.intra_op_num_threads = threads
    providers = [PROVIDERS[name]] + ([PROVIDERS["cpu"]] if name != "cpu" else [])
    return ort.InferenceSession(str(path), options, providers=providers)


class OrtGraph:
    """A stage that maps arrays to arrays."""

    def __init__(self, session: ort.InferenceSession, stage: str) -> None:
        self.session = session
        self.stage = stage
        self.outputs = [output.name for output in session.get_outputs()]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs by name -> outputs by name."""
        options = ort.RunOptions()
        options.log_severity_level = SILENT
        with translated(f"run {self.stage}"):
            values = self.session.run(self.outputs, dict(feeds), options)
        return dict(zip(self.outputs, values, strict=True))


class OrtDecoder:
    """The LLM over a KV cache that is updated in place."""

    def __init__(self, session: ort.InferenceSession, manifest: Manifest, name: str, capacity: int) -> None:
        self.session = session
        self.capacity = capacity
        self.length = 0
        self.device = "cuda" if name == "cuda" else "cpu"
        shape = (1, manifest.heads_kv, capacity, manifest.head_dim)
        caches = [cache for i in range(manifest.layers) for cache in (f"key.{i}", f"value.{i}")]
        self.cache = {cache: self.on_device(np.zeros(shape, np.float32)) for cache in caches}
        self.binding = session.io_binding()
        for cache, value in self.cache.items():
            self.binding.bind_ortvalue_input(f"past_{cache}", value)
            self.binding.bind_ortvalue_output(f"present_{cache}", value)
        self.binding.bind_output("logits", "cpu")
        self.options = ort.RunOptions()
        self.options.log_severity_level = SILENT

    def on_device(self, array: Array) -> ort.OrtValue:
        """A copy of ``array`` where the session computes."""
        return ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)

    def step(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append rows (S, D) to the sequence -> logits (V,) of the last row."""
        rows = len(embeds)
        assert self.length + rows <= self.capacity, "the caller sizes the cache"
        feeds = {  # named until the run ends: the binding borrows their memory
            "inputs_embeds": np.ascontiguousarray(embeds[None]),
            "position_ids": np.arange(self.length, self.length + rows, dtype=np.int64)[None],
            "write_index": np.array([self.length], np.int64),
        }
        with translated("run decode"):
            for name, value in feeds.items():
                self.binding.bind_cpu_input(name, value)
            self.session.run_with_iobinding(self.binding, self.options)
            # A copy: the array is a view of memory that the next step writes to.
            logits: NDArray[np.float32] = self.binding.get_outputs()[-1].numpy()[0].copy()
        self.length += rows
        return logits
