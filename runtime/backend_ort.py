"""ONNX Runtime behind the backend protocol, on the CPU or through the CUDA execution provider.

The KV cache is bound as input and output of the same memory, so that the graph's TensorScatter writes in place. Opens
a graph when it is first needed. Chooses no frames and knows no tokens.
"""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from runtime.backend import Array, BackendName
from runtime.bundle import Bundle
from runtime.errors import BackendError
from runtime.manifest import Manifest, StageSpec, TensorSpec

__all__ = ["OrtBackend", "choose_provider"]

ORT_ERRORS: tuple[type[Exception], ...] = (  # its own share no base class, its bindings raise Python's
    RuntimeError,
    ValueError,
    *(error for error in vars(ort_errors).values() if isinstance(error, type) and issubclass(error, Exception)),
)
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
SILENT = 4  # only fatal messages: everything else arrives as an exception
CACHE_BLOCK = 64  # tokens: sizes of the cache are rounded up so that questions of similar length reuse memory
ANSWER_ROOM = 128  # tokens of an answer before the cache grows for the first time
MESSAGE_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
MESSAGE_LENGTH = 300  # characters; ONNX Runtime names C++ functions at length
# ONNX Runtime 1.27 and later cast weights once, while loading, up to 1 GiB unless told otherwise; a head of 152064
# tokens and 3584 channels would be cast for every token. Earlier releases know neither the limit nor the key.
CAST_LIMIT = ("optimization.constant_folding_max_output_size_in_bytes", str(2**34))
# Without VNNI, x86's 8-bit product of an unsigned and a signed number saturates in 16 bits; this makes both unsigned,
# which is right, and half as fast where VNNI is. ONNX Runtime 1.32 breaks 8-bit weights in blocks by it.
EXACT_INT8 = ("session.x64quantprecision", "1")
VNNI = {"avx512_vnni", "avx_vnni"}  # as Linux calls them
CPUINFO = Path("/proc/cpuinfo")
# Of the KV cache: its number in ONNX, and what holds it here. NumPy has no bfloat16, whose zero is 16 zero bits too.
CACHE_DTYPES: dict[str, tuple[int, np.dtype[Any]]] = {
    "float32": (1, np.dtype(np.float32)),
    "float16": (10, np.dtype(np.float16)),
    "bfloat16": (16, np.dtype(np.uint16)),
}
ELEMENTS = {"float": "float32", "double": "float64"}  # where ONNX Runtime's names are not the manifest's


def choose_provider(name: BackendName) -> str:
    """Resolve "auto" and check that the device is there: "cpu" or "cuda"."""
    available = ort.get_available_providers()
    if name == "auto":
        return "cuda" if PROVIDERS["cuda"] in available and cuda_starts() else "cpu"
    if name not in PROVIDERS:
        raise BackendError(f"unknown backend {name!r}; choose one of auto, {', '.join(PROVIDERS)}")
    if PROVIDERS[name] not in available:
        raise BackendError(
            f"backend {name!r} needs ONNX Runtime's {PROVIDERS[name]}, found {', '.join(available)}; "
            "replace onnxruntime by onnxruntime-gpu as README says, or use --backend cpu"
        )
    return name


def cuda_starts() -> bool:
    """Whether a device takes memory; that the library was built for one says nothing about this machine."""
    try:
        ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), "cuda", 0)
    except ORT_ERRORS:
        return False
    return True


@contextmanager
def translated(what: str, advice: str) -> Iterator[None]:
    """Turn ONNX Runtime's errors, and a memory that does not suffice, into ``BackendError``."""
    try:
        yield
    except MemoryError as error:
        raise BackendError(f"not enough memory to {what}; use fewer frames or tokens") from error
    except ORT_ERRORS as error:
        reason = MESSAGE_PREFIX.sub("", str(error))
        raise BackendError(f"ONNX Runtime failed to {what}: {reason:.{MESSAGE_LENGTH}}; {advice}") from error


class OrtBackend:
    """The graphs of one bundle in ONNX Runtime."""

    def __init__(self, bundle: Bundle, name: str, threads: int | None) -> None:
        self.name = name
        self.bundle = bundle
        self.threads = threads
        self.sessions: dict[str, ort.InferenceSession] = {}
        self.closed = False

    def graph(self, stage: str) -> OrtGraph:
        """The stage's graph, opened on first use and kept."""
        return OrtGraph(self.session(stage), stage)

    def decoder(self, capacity: int) -> OrtDecoder:
        """A decoder with an empty cache of its own, which may come to hold ``capacity`` tokens."""
        return OrtDecoder(self.session("decode"), self.bundle.manifest, self.name, capacity)

    def close(self) -> None:
        """Free all sessions."""
        self.closed = True
        self.sessions.clear()

    def session(self, stage: str) -> ort.InferenceSession:
        """The stage's session, created on first use."""
        if self.closed:
            raise BackendError("the backend is closed; open the bundle again")
        if stage not in self.sessions:
            spec = self.bundle.manifest.stages[stage]
            if spec.compute == "bfloat16" and self.name == "cpu":
                raise BackendError(
                    f"{spec.file} computes in bfloat16, which ONNX Runtime cannot on the CPU; use --backend cuda, or "
                    "export with --dtype float32"
                )
            paths = [self.bundle.path(file) for file in (spec.file, *spec.older)]
            session = first_session(paths, self.name, self.threads, w8a8_entries(spec))
            check_tensors(session, spec)
            self.sessions[stage] = session
        return self.sessions[stage]


def w8a8_entries(spec: StageSpec) -> dict[str, str]:
    """Session entries with which a stage's 8-bit products are exact on this processor."""
    narrow = spec.quantized is not None and spec.quantized.activations == "int8"
    return dict([EXACT_INT8]) if narrow and products_saturate() else {}


@functools.cache
def products_saturate() -> bool:
    """Whether this is an x86 processor without VNNI; where that cannot be told, it is taken for one."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = re.search(r"^flags\s*:(.*)$", CPUINFO.read_text("utf-8"), re.MULTILINE)
    except OSError:
        return True
    return flags is None or VNNI.isdisjoint(flags[1].split())


def first_session(
    paths: list[Path], name: str, threads: int | None, entries: Mapping[str, str]
) -> ort.InferenceSession:
    """Load the first of several forms of a graph whose opset this ONNX Runtime knows."""
    for path in paths:
        try:
            with translated(f"load {path.name}", "export the bundle again, or install a newer onnxruntime"):
                return create_session(path, name, threads, entries)
        except BackendError as error:
            if path == paths[-1] or "opset" not in str(error.__cause__).lower():
                raise
    raise AssertionError("a stage has at least one form")


def create_session(
    graph: Path | bytes, name: str, threads: int | None, entries: Mapping[str, str] | None = None
) -> ort.InferenceSession:
    """Load one graph; ONNX Runtime itself would go on quietly on the CPU where the device does not start.

    Args:
        graph: the file, or a serialised model.
        name: "cpu" or "cuda".
        threads: compute threads on the CPU.
        entries: further session configuration entries of ONNX Runtime.
    """
    options = ort.SessionOptions()
    options.log_severity_level = SILENT
    for entry in (CAST_LIMIT, *(entries or {}).items()):
        options.add_session_config_entry(*entry)
    if threads is not None:
        options.intra_op_num_threads = threads
    providers = [PROVIDERS[name]] + ([PROVIDERS["cpu"]] if name != "cpu" else [])
    source = graph if isinstance(graph, bytes) else str(graph)
    session = ort.InferenceSession(source, options, providers=providers)
    if PROVIDERS[name] not in session.get_providers():
        raise BackendError(f"{PROVIDERS[name]} does not start on this machine; check its driver or use --backend cpu")
    return session


def check_tensors(session: ort.InferenceSession, spec: StageSpec) -> None:
    """The graph takes and gives what the manifest says."""
    for nodes, tensors in ((session.get_inputs(), spec.inputs), (session.get_outputs(), spec.outputs)):
        found = {node.name: node for node in nodes}
        wanted = {tensor.name: tensor for tensor in tensors}
        for name in sorted(found.keys() | wanted.keys()):
            if name not in found or name not in wanted or not is_as_said(found[name], wanted[name]):
                raise BackendError(
                    f"{spec.file}: its tensor {name!r:.80} is not as bundle.json says; export the bundle again"
                )


def is_as_said(node: ort.NodeArg, tensor: TensorSpec) -> bool:
    """Same dtype, same rank, and the same numbers where both have one."""
    element = node.type.removeprefix("tensor(").removesuffix(")")
    axes = zip(node.shape, tensor.shape, strict=False)
    return (
        ELEMENTS.get(element, element) == tensor.dtype
        and len(node.shape) == len(tensor.shape)
        and all(a == b for a, b in axes if isinstance(a, int) and isinstance(b, int))
    )


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
        with translated(f"run {self.stage}", "use fewer frames, or open with --verify"):
            values = self.session.run(self.outputs, dict(feeds), options)
        return dict(zip(self.outputs, values, strict=True))


def cache_dtype(spec: StageSpec) -> tuple[int, np.dtype[Any]]:
    """The number of the cache's dtype in ONNX, and what holds it."""
    dtype = next(tensor.dtype for tensor in spec.inputs if tensor.name == "past_key.0")
    if dtype not in CACHE_DTYPES:
        raise BackendError(
            f"{spec.file} has a KV cache of {dtype}, expected {', '.join(CACHE_DTYPES)}; export the bundle again"
        )
    return CACHE_DTYPES[dtype]


class OrtDecoder:
    """The LLM over a KV cache that is updated in place, and doubled when it is full."""

    def __init__(self, session: ort.InferenceSession, manifest: Manifest, name: str, capacity: int) -> None:
        self.session = session
        self.capacity = capacity
        self.length = 0
        self.room = 0  # tokens the cache can hold now
        self.device = "cuda" if name == "cuda" else "cpu"
        self.shape = (1, manifest.heads_kv, manifest.head_dim)
        self.element, self.dtype = cache_dtype(manifest.stages["decode"])
        caches = [cache for i in range(manifest.layers) for cache in (f"key.{i}", f"value.{i}")]
        self.cache: dict[str, ort.OrtValue | None] = dict.fromkeys(caches)
        self.binding = session.io_binding()
        self.binding.bind_output("logits", "cpu")
        self.options = ort.RunOptions()
        self.options.log_severity_level = SILENT

    def step(self, embeds: NDArray[np.float32], position_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append rows (S, D) at positions (axes, S) -> logits (V,) of the last row."""
        rows = len(embeds)
        assert self.length + rows <= self.capacity, "the caller sizes the cache"
        if self.length + rows > self.room:
            self.grow(max(2 * self.room, rows + ANSWER_ROOM))
        feeds = {  # named until the run ends: the binding borrows their memory
            "inputs_embeds": np.ascontiguousarray(embeds[None]),
            "position_ids": np.ascontiguousarray(position_ids if len(position_ids) == 1 else position_ids[:, None]),
            "write_index": np.array([self.length], np.int64),
        }
        with translated("run decode", "use fewer frames or tokens, or open with --verify"):
            for name, value in feeds.items():
                self.binding.bind_cpu_input(name, value)
            self.session.run_with_iobinding(self.binding, self.options)
            # A copy: the array is a view of memory that the next step writes to.
            logits: NDArray[np.float32] = self.binding.get_outputs()[0].numpy()[0].copy()
        self.length += rows
        return logits

    def grow(self, room: int) -> None:
        """Move to a cache of ``room`` tokens, at most the capacity; one tensor is held twice at a time."""
        self.room = min(-(-room // CACHE_BLOCK) * CACHE_BLOCK, self.capacity)
        with translated(f"allocate a KV cache of {self.room} tokens", "use fewer frames or tokens"):
            for name, value in self.cache.items():
                self.cache[name] = value = self.moved(value)
                memory = (self.device, 0, self.element, value.shape(), value.data_ptr())
                self.binding.bind_input(f"past_{name}", *memory)
                self.binding.bind_output(f"present_{name}", *memory)

    def moved(self, value: ort.OrtValue | None) -> ort.OrtValue:
        """A cache tensor of ``room`` tokens, zero behind what ``value`` holds: what is masked must still be finite."""
        shape = (*self.shape[:2], self.room, self.shape[2])
        array = np.zeros(shape, self.dtype)
        if value is not None:
            array[:, :, : self.length] = value.numpy()[:, :, : self.length]
        return ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)
