"""ONNX Runtime behind the backend protocol, on the CPU or through the CUDA execution provider.

The KV cache is bound as input and output of the same memory, so that the graph's TensorScatter writes in place. Opens
a graph when it is first needed. On the CPU tensors are NumPy arrays, on a GPU they stay there between stages
(``ort_device``). Chooses no frames and knows no tokens.
"""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.backend import Array, Decoder, Graph, Tensor
from runtime.bundle import Bundle
from runtime.dtypes import name_of_ort
from runtime.errors import BackendError
from runtime.kv_cache import cache_dtype, grown, step_feeds
from runtime.limits import limits_of
from runtime.manifest import Manifest, StageSpec, TensorSpec
from runtime.ort_device import SILENT, OrtDeviceGraph, device_empty
from runtime.ort_errors import ort_errors, translated
from runtime.ort_provider import PROVIDERS, attention_note

if TYPE_CHECKING:
    from runtime.ort_decoders import SharedByDecoders

__all__ = ["OrtBackend", "ort_errors", "translated"]

# ONNX Runtime 1.27 and later cast weights once, while loading, up to 1 GiB unless told otherwise; a head of 152064
# tokens and 3584 channels would be cast for every token. Earlier releases know neither the limit nor the key.
CAST_LIMIT = ("optimization.constant_folding_max_output_size_in_bytes", str(2**34))
# Without VNNI, x86's 8-bit product of an unsigned and a signed number saturates in 16 bits; this makes both unsigned,
# which is right, and half as fast where VNNI is. ONNX Runtime 1.32 breaks 8-bit weights in blocks by it.
EXACT_INT8 = ("session.x64quantprecision", "1")
VNNI = {"avx512_vnni", "avx_vnni"}  # as Linux calls them
CPUINFO = Path("/proc/cpuinfo")


class OrtBackend:
    """The graphs of one bundle in ONNX Runtime."""

    def __init__(
        self, bundle: Bundle, name: str, threads: int | None, *, reason: str = "", cuda_graph: bool = False
    ) -> None:
        """Open nothing yet.

        Args:
            bundle: a checked bundle.
            name: "cpu" or "cuda".
            threads: compute threads on the CPU; None takes one per core.
            reason: why it is this one.
            cuda_graph: decode as a CUDA graph.
        """
        self.name = name
        self.reason = reason
        self.notes: list[str] = [attention_note()] if name == "cuda" and attention_note() else []
        self.limits = limits_of(bundle.manifest)
        self.bundle = bundle
        self.threads = threads
        self.on_device = name != "cpu"
        self.cuda_graph = cuda_graph
        self.shared: SharedByDecoders | None = None
        self.sessions: dict[str, ort.InferenceSession] = {}
        self.closed = False

    def graph(self, stage: str) -> Graph:
        """The stage's graph, opened on first use and kept."""
        session = self.session(stage)
        if self.on_device:
            return OrtDeviceGraph(session, stage, self.bundle.manifest.stages[stage], self.name)
        return OrtGraph(session, stage)

    def decoder(self, capacity: int) -> Decoder:
        """A decoder with an empty cache of its own, which may come to hold ``capacity`` tokens."""
        session, manifest = self.session("decode"), self.bundle.manifest
        if self.on_device or self.cuda_graph:
            from runtime.ort_decoders import OrtDeviceDecoder, OrtGraphDecoder, SharedByDecoders

            self.shared = self.shared or SharedByDecoders()
            kind = OrtGraphDecoder if self.cuda_graph else OrtDeviceDecoder
            return kind(session, manifest, self.name, capacity, self.shared)
        return OrtDecoder(session, manifest, self.name, capacity)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Memory for float32 values where the graphs compute."""
        if self.on_device:
            return device_empty(shape, np.dtype(np.float32), self.name)
        return np.empty(shape, np.float32)

    def finish(self) -> None:
        """Nothing is left to wait for: ONNX Runtime waits for every run."""

    def close(self) -> None:
        """Free all sessions."""
        self.closed = True
        self.shared = None
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
            captured = self.cuda_graph and stage == "decode"
            session = first_session(paths, self.name, self.threads, w8a8_entries(spec), captured)
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
    paths: list[Path], name: str, threads: int | None, entries: Mapping[str, str], cuda_graph: bool
) -> ort.InferenceSession:
    """Load the first of several forms of a graph whose opset this ONNX Runtime knows."""
    # Its CUDA provider refuses to capture a graph of which it leaves any node to the CPU.
    advice = "leave out --cuda-graph" if cuda_graph else "export the bundle again"
    for path in paths:
        try:
            with translated(f"load {path.name}", f"{advice}, or install a newer onnxruntime"):
                return create_session(path, name, threads, entries, cuda_graph)
        except BackendError as error:
            if path == paths[-1] or "opset" not in str(error.__cause__).lower():
                raise
    raise AssertionError("a stage has at least one form")


def create_session(
    graph: Path | bytes,
    name: str,
    threads: int | None,
    entries: Mapping[str, str] | None = None,
    cuda_graph: bool = False,
) -> ort.InferenceSession:
    """Load one graph; ONNX Runtime itself would go on quietly on the CPU where the device does not start.

    Args:
        graph: the file, or a serialised model.
        name: "cpu" or "cuda".
        threads: compute threads on the CPU.
        entries: further session configuration entries of ONNX Runtime.
        cuda_graph: let runs be captured and replayed; only for "cuda".
    """
    options = ort.SessionOptions()
    options.log_severity_level = SILENT
    for entry in (CAST_LIMIT, *(entries or {}).items()):
        options.add_session_config_entry(*entry)
    if threads is not None:
        options.intra_op_num_threads = threads
    providers = [(PROVIDERS[name], provider_options(name, cuda_graph))]
    providers += [(PROVIDERS["cpu"], {})] if name != "cpu" else []
    source = graph if isinstance(graph, bytes) else str(graph)
    session = ort.InferenceSession(source, options, providers=providers)
    if PROVIDERS[name] not in session.get_providers():
        raise BackendError(f"{PROVIDERS[name]} does not start on this machine; check its driver or use --backend cpu")
    return session


def provider_options(name: str, cuda_graph: bool) -> dict[str, str]:
    """How an execution provider computes.

    ONNX Runtime's CUDA provider rounds products of float32 to TF32 by default (its option ``use_tf32``); SVR is
    exported in float32 because its selection needs the digits.
    """
    if name == "cpu":
        return {}
    return {"use_tf32": "0"} | ({"enable_cuda_graph": "1"} if cuda_graph else {})


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
    axes = zip(node.shape, tensor.shape, strict=False)
    return (
        name_of_ort(node.type) == tensor.dtype
        and len(node.shape) == len(tensor.shape)
        and all(a == b for a, b in axes if isinstance(a, int) and isinstance(b, int))
    )


class OrtGraph:
    """A stage that maps arrays to arrays."""

    def __init__(self, session: ort.InferenceSession, stage: str) -> None:
        self.session = session
        self.stage = stage
        self.outputs = [output.name for output in session.get_outputs()]

    def run(self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None) -> dict[str, Array]:
        """Inputs by name -> outputs by name; those given are written in place."""
        options = ort.RunOptions()
        options.log_severity_level = SILENT
        arrays = {name: np.asarray(value) for name, value in feeds.items()}
        with translated(f"run {self.stage}", "use fewer frames, or open with --verify"):
            values = self.session.run(self.outputs, arrays, options)
        return written(dict(zip(self.outputs, values, strict=True)), outputs)


def written(values: dict[str, Array], targets: Mapping[str, Tensor] | None) -> dict[str, Array]:
    """Outputs, of which some are copied into arrays that were given."""
    for name, target in (targets or {}).items():
        assert isinstance(target, np.ndarray), "without a device all tensors are arrays"
        np.copyto(target, values[name])
        values[name] = target
    return values


class OrtDecoder:
    """The LLM over a KV cache that is updated in place, and doubled when it is full."""

    def __init__(self, session: ort.InferenceSession, manifest: Manifest, name: str, capacity: int) -> None:
        self.session = session
        self.capacity = capacity
        self.length = 0
        self.room = 0  # tokens the cache can hold now
        self.device = "cuda" if name == "cuda" else "cpu"
        self.outputs = [output.name for output in session.get_outputs()]
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
            self.grow(grown(self.room, rows, self.capacity))
        # Kept until the run ends: the binding borrows their memory.
        feeds = step_feeds(embeds, position_ids, self.length)
        with translated("run decode", "use fewer frames or tokens, or open with --verify"):
            for name, value in feeds.items():
                self.binding.bind_cpu_input(name, value)
            self.session.run_with_iobinding(self.binding, self.options)
            # A copy: the array is a view of memory that the next step writes to.
            logits: NDArray[np.float32] = self.binding.get_outputs()[0].numpy()[0].copy()
        self.length += rows
        return logits

    def grow(self, room: int) -> None:
        """Move to a cache of ``room`` tokens; one tensor is held twice at a time."""
        self.room = room
        with translated(f"allocate a KV cache of {self.room} tokens", "use fewer frames or tokens"):
            for name, value in self.cache.items():
                self.cache[name] = self.moved(value)
            self.bind_cache(self.binding, self.cache)

    def bind_cache(self, binding: ort.IOBinding, cache: Mapping[str, ort.OrtValue]) -> None:
        """Have the graph read and write the same memory."""
        for name, value in cache.items():
            memory = (self.device, 0, self.element, value.shape(), value.data_ptr())
            binding.bind_input(f"past_{name}", *memory)
            binding.bind_output(f"present_{name}", *memory)

    def moved(self, value: ort.OrtValue | None) -> ort.OrtValue:
        """A cache tensor of ``room`` tokens, zero behind what ``value`` holds: what is masked must still be finite."""
        shape = (*self.shape[:2], self.room, self.shape[2])
        array = np.zeros(shape, self.dtype)
        if value is not None:
            array[:, :, : self.length] = value.numpy()[:, :, : self.length]
        return ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)
