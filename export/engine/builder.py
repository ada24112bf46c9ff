"""``engine_from_onnx``: a lowered graph -> a serialised, strongly typed engine.

Names differ between TensorRT 10.3 and 11.4; what a version lacks is looked up, never told by its number. Precision
lies in the graph, so no precision flag is set, and TensorRT's TF32 for float32 is off unless asked for: SVR's selection
is exported in float32 for its digits. Weights are part of the engine: a stripped one would have to be refitted from the
graph whenever its stage is opened, with both in memory at once, to save space on the disk only.

Lowers nothing, writes no file but the timing cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from export.engine.cache import BINDING_ERRORS, TimingCache
from export.engine.lowered import LoweredStage
from runtime.engines import EngineTensor, ShapeRange
from runtime.errors import BackendError
from runtime.manifest import Dtype
from runtime.trt_log import Log

__all__ = ["BuiltEngine", "Settings", "engine_facts", "engine_from_onnx"]

DTYPES: Mapping[str, Dtype] = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class Settings:
    """What the builder is told beside the graph and its shapes.

    Attributes:
        workspace: bytes of scratch memory for one layer; None for TensorRT's default.
        tactics: bytes of device memory that trying tactics may take; None for TensorRT's default.
        level: optimisation level; None for TensorRT's default.
        tf32: TensorRT may compute products of float32 in TF32, as it does by default.
        aot: the plugin is a quickly deployable one whose compiled kernel goes into the engine.
    """

    workspace: int | None = None
    tactics: int | None = None
    level: int | None = None
    tf32: bool = False
    aot: bool = False


@dataclass(frozen=True)
class BuiltEngine:
    """What an engine says about itself."""

    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    device_memory: int


def engine_from_onnx(
    trt: Any, stage: LoweredStage, settings: Settings, log: Log, cache: TimingCache, monitor: Any = None
) -> Any:
    """Parse and build.

    Args:
        trt: the module ``tensorrt``.
        stage: the graph and the shapes of its inputs.
        settings: limits and choices.
        log: with the logger to use.
        cache: read before and written after.
        monitor: TensorRT's progress monitor.

    Returns:
        The engine's bytes, as an object with a buffer. None where the build was stopped by the monitor, or failed:
        then ``log.reason`` says why.

    Raises:
        BackendError: TensorRT does not start, or does not take the graph or a shape.
        OutputError: the timing cache cannot be written.
    """
    with translated(log, f"build {stage.stage}"):
        builder = trt.Builder(log.logger)
        network = builder.create_network(network_flags(trt, settings))
        parser = trt.OnnxParser(network, log.logger)
        if not parser.parse(stage.model.SerializeToString(), str(stage.path)):  # the path leads to the weights
            raise BackendError(f"TensorRT does not take {stage.stage}: {parse_error(parser, log)}")
        allow_decomposition(trt, network)
        config = builder.create_builder_config()
        configure(trt, config, settings)
        if monitor is not None:
            config.progress_monitor = monitor
        for shapes in stage.profiles:
            if not add_profile(builder, network, config, shapes):
                raise BackendError(f"TensorRT does not take the shapes of {stage.stage}: {log.reason()}")
        cache.attach(config)
        blob = builder.build_serialized_network(network, config)
        if blob is not None:
            cache.keep(config)
        return blob


def network_flags(trt: Any, settings: Settings) -> int:
    """Strongly typed, which 11.x always is, and with compiled plugins first."""
    flags = trt.NetworkDefinitionCreationFlag
    wanted = ["STRONGLY_TYPED"] if hasattr(flags, "STRONGLY_TYPED") else []
    if settings.aot and hasattr(flags, "PREFER_AOT_PYTHON_PLUGINS"):
        wanted.append("PREFER_AOT_PYTHON_PLUGINS")
    return sum(1 << int(getattr(flags, name)) for name in wanted)


def allow_decomposition(trt: Any, network: Any) -> None:
    """Let attention that no fused kernel fits be built of single layers; TensorRT's default is to fail.

    Source: ``IAttention.decomposable`` of the API (10.14 on); NVIDIA/TensorRT issue 4705 has such a failure.
    """
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    if kind is None:
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == kind:
            layer.__class__ = getattr(trt, "IAttentionInputLayer")  # noqa: B009  the network hands out ILayer only
            layer.attention.decomposable = True


def configure(trt: Any, config: Any, settings: Settings) -> None:
    """Memory limits, level and arithmetic."""
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    if settings.tactics is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.TACTIC_DRAM, settings.tactics)
    if not settings.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if settings.level is not None:
        config.builder_optimization_level = settings.level
    config.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY


def add_profile(builder: Any, network: Any, config: Any, shapes: Mapping[str, ShapeRange]) -> bool:
    """One optimisation profile, with the inputs that have a free axis; whether TensorRT took it."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 in tuple(tensor.shape):
            wanted = shapes[tensor.name]
            profile.set_shape(tensor.name, wanted.least, wanted.best, wanted.most)
    added: int = config.add_optimization_profile(profile)
    return added >= 0


def parse_error(parser: Any, log: Log) -> str:
    """The parser's first error with its node."""
    if not parser.num_errors:
        return log.reason()
    error = parser.get_error(0)
    node = f"{error.node_operator()} {error.node_name()}".strip()
    more = f" ({parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    return f"{node or 'the graph'}: {' '.join(error.desc().split()):.300}{more}"


def engine_facts(trt: Any, blob: Any, log: Log) -> BuiltEngine:
    """Open an engine once: it works here, and these are its tensors.

    Raises:
        BackendError: it does not open.
    """
    with translated(log, "open the engine that was built"):
        engine = trt.Runtime(log.logger).deserialize_cuda_engine(blob)
        if engine is None:
            raise BackendError(f"the engine that was built does not open: {log.reason()}; build with --no-plugin")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        return BuiltEngine(
            inputs=tuple(engine_tensor(engine, name) for name in inputs),
            outputs=tuple(engine_tensor(engine, name) for name in outputs),
            device_memory=int(engine.device_memory_size_v2),
        )


def engine_tensor(engine: Any, name: str) -> EngineTensor:
    """Name and dtype of an engine's input or output."""
    dtype = engine.get_tensor_dtype(name).name
    if dtype not in DTYPES:
        raise BackendError(f"the engine has {dtype} for {name}, expected one of {', '.join(DTYPES)}; export again")
    return EngineTensor(name, DTYPES[dtype])


@contextmanager
def translated(log: Log, what: str) -> Iterator[None]:
    """Turn what TensorRT's bindings raise into ``BackendError``."""
    try:
        yield
    except BINDING_ERRORS as error:
        reason = log.reason() if log.lines else str(error)
        raise BackendError(f"TensorRT failed to {what}: {reason:.300}; check its installation and the GPU") from error
