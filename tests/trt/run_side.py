"""What a double does for TensorRT's run side: runtime, engine, execution context, on queues and device memory.

A context checks everything that would go wrong in silence: sizes of memory, overlaps, aliases, scratch memory that
was not given, a capture without a warm-up. An execution is work of its stream.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.trt.cuda_module import NotModelledError
from tests.trt.execution import Execution
from tests.trt.plan import Plan, Shape, bytes_of, output_shapes, read_plan
from tests.trt.plugin_run import PluginInstance, load_plugins

if TYPE_CHECKING:
    from tests.trt.double import Double

__all__ = ["ContextBehaviour", "EngineBehaviour", "HostMemory", "RuntimeBehaviour"]


class HostMemory:
    """``IHostMemory``."""

    face = "IHostMemory"

    def __init__(self, world: Double, data: bytes) -> None:
        self.data = data
        self.nbytes = len(data)
        self.dtype = world.trt.DataType.INT8


class RuntimeBehaviour:
    """``Runtime``."""

    face = "Runtime"

    def __init__(self, world: Double, logger: Any) -> None:
        self.world = world
        self.logger = logger
        self.max_threads = 1
        self.engine_host_code_allowed = False
        self.DLA_core = -1
        self.num_DLA_cores = 0

    def get_plugin_registry(self) -> Any:
        return self.world.registry

    def deserialize_cuda_engine(self, serialized_engine: Any = None, **other: Any) -> EngineBehaviour | None:
        if serialized_engine is None:
            raise NotModelledError(f"the double reads no {', '.join(other)}")
        world = self.world
        assert not world.device.queues.captures, "an engine is deserialised during a capture"
        try:
            plan = read_plan(bytes(memoryview(serialized_engine)))
        except ValueError as error:
            return self._refuse(f"IRuntime::deserializeCudaEngine: Error Code 1: Serialization ({error})")
        if plan.tensorrt != world.version:
            return self._refuse(
                "The engine plan file is not compatible with this version of TensorRT, expecting library version "
                f"{world.version} got {plan.tensorrt}, please rebuild."
            )
        if plan.sm != world.facts.sm:
            here, built = (".".join(map(str, sm)) for sm in (world.facts.sm, plan.sm))
            return self._refuse(
                "The engine plan file is generated on an incompatible device, expecting compute "
                f"{here} got compute {built}, please rebuild."
            )
        for plugin in plan.plugins:
            name, version, namespace = plugin["name"], plugin["version"], plugin["namespace"]
            if plugin["kind"] == "v3" and world.registry.find(name, version, namespace) is None:
                return self._refuse(f"Cannot find plugin: {name}, version: {version}, namespace: {namespace}.")
        weights = world.device.memory.allocate(max(len(plan.model), 1), "device", "weights of an engine")
        if weights is None:
            return self._refuse("Error Code 2: OutOfMemory (Requested size was too large.)")
        return EngineBehaviour(world, plan, self, weights.address)

    def _refuse(self, reason: str) -> None:
        self.world.log(self.logger, "ERROR", reason)


class EngineBehaviour:
    """``ICudaEngine``."""

    face = "ICudaEngine"

    def __init__(self, world: Double, plan: Plan, runtime: RuntimeBehaviour, weights: int) -> None:
        self.world = world
        self.plan = plan
        self.runtime = runtime
        self.usable = not plan.stripped
        self.name = plan.name
        self.num_io_tensors = len(plan.by_name)
        self.num_optimization_profiles = max(len(plan.profiles), 1)
        self.num_layers = plan.layers
        self.num_aux_streams = 0
        self.refittable = plan.refittable
        self.has_implicit_batch_dimension = False
        self.streamable_weights_size = 0
        self.error_recorder = None
        self.contexts = 0
        self.plugins = load_plugins(world, plan)
        world.engines.add(self)
        weakref.finalize(self, world.reclaim, weights, "weights of an engine")

    @property
    def device_memory_size(self) -> int:
        return max(map(self.plan.scratch, range(self.num_optimization_profiles)))

    device_memory_size_v2 = device_memory_size

    def get_device_memory_size_for_profile(self, profile_index: int) -> int:
        return self.plan.scratch(profile_index)

    get_device_memory_size_for_profile_v2 = get_device_memory_size_for_profile

    def get_tensor_name(self, index: int) -> str:
        return list(self.plan.by_name)[index]

    def get_tensor_mode(self, name: str) -> Any:
        mode = self.world.trt.TensorIOMode
        if name not in self.plan.by_name:
            return mode.NONE
        return mode.INPUT if any(tensor.name == name for tensor in self.plan.inputs) else mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self.world.trt.DataType, self.plan.by_name[name].dtype)

    def get_tensor_shape(self, name: str) -> Shape:
        return self.plan.by_name[name].shape

    def get_tensor_location(self, name: str) -> Any:
        return self.world.trt.TensorLocation.DEVICE

    def get_tensor_format(self, name: str, profile_index: int = 0) -> Any:
        return self.world.trt.TensorFormat.LINEAR

    def get_tensor_format_desc(self, name: str, profile_index: int = 0) -> str:
        return f"Row major linear {self.plan.by_name[name].dtype} format"

    def get_tensor_bytes_per_component(self, name: str, profile_index: int = 0) -> int:
        return bytes_of(self.plan.by_name[name].dtype, ())

    def get_tensor_components_per_element(self, name: str, profile_index: int = 0) -> int:
        return 1

    def get_tensor_vectorized_dim(self, name: str, profile_index: int = 0) -> int:
        return -1

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Shape]:
        fixed = self.plan.by_name[name].shape
        return list(self.plan.profiles[profile_index].get(name, (fixed,) * 3)) if self.plan.profiles else [fixed] * 3

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.plan.aliases.get(name)

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def is_debug_tensor(self, name: str) -> bool:
        return False

    def serialize(self) -> HostMemory:
        return HostMemory(self.world, self.plan.to_bytes())

    def create_execution_context(self, strategy: Any = None, runtime_config: Any = None) -> ContextBehaviour | None:
        if runtime_config is not None:
            strategy = runtime_config.strategy
        return self._context("STATIC" if strategy is None else strategy.name)

    def create_execution_context_without_device_memory(self) -> ContextBehaviour | None:
        return self._context("USER_MANAGED")

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.world)

    def _context(self, strategy: str) -> ContextBehaviour | None:
        world = self.world
        assert self.usable, "an engine without weights is used before it was refitted"
        assert not world.device.queues.captures, "a context is created during a capture"
        scratch = None
        if strategy != "USER_MANAGED":
            scratch = world.device.memory.allocate(self.device_memory_size, "device", "scratch memory of a context")
            if scratch is None:
                world.log(self.runtime.logger, "ERROR", "Error Code 2: OutOfMemory (Requested size was too large.)")
                return None
        made = ContextBehaviour(
            world, self, None if scratch is None else (scratch.address, scratch.size), self.contexts
        )
        self.contexts += 1
        if scratch is not None:
            weakref.finalize(made, world.reclaim, scratch.address, "scratch memory of a context")
        return made


class RuntimeConfig:
    """``IRuntimeConfig``."""

    face = "IRuntimeConfig"

    def __init__(self, world: Double) -> None:
        self.strategy = world.trt.ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def get_execution_context_allocation_strategy(self) -> Any:
        return self.strategy


class ContextBehaviour:
    """``IExecutionContext``."""

    face = "IExecutionContext"

    def __init__(self, world: Double, engine: EngineBehaviour, scratch: tuple[int, int] | None, number: int) -> None:
        self.world = world
        self.engine = engine
        self.plan = engine.plan
        self.scratch = scratch  # (address, bytes)
        self.owns_scratch = scratch is not None
        self.active_optimization_profile = 0 if number == 0 else -1  # the first context's is set, others must set it
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, Shape] = {}
        self.warm: object = None  # profile and shapes of the last execution outside a capture
        self.name = ""
        self.error_recorder = self.profiler = None
        self.debug_sync = False
        self.nvtx_verbosity = None
        self.persistent_cache_limit = 0
        self.enqueue_emits_profile = True
        self._fixed_shapes()
        self.plugins = [
            PluginInstance(world, self.plan, facts, loaded, self._largest())
            for facts, loaded in zip(self.plan.plugins, engine.plugins, strict=True)
        ]
        world.contexts.add(self)

    def _fixed_shapes(self) -> None:
        self.shapes = {tensor.name: tensor.shape for tensor in self.plan.inputs if -1 not in tensor.shape}

    def _largest(self) -> dict[str, Shape]:
        """The largest sizes of the inputs, over all profiles."""
        profiles = range(self.engine.num_optimization_profiles)
        most = {
            tensor.name: [self.engine.get_tensor_profile_shape(tensor.name, index)[2] for index in profiles]
            for tensor in self.plan.inputs
        }
        return {name: tuple(map(max, zip(*shapes, strict=True))) for name, shapes in most.items()}

    def _error(self, reason: str) -> bool:
        self.world.log(self.engine.runtime.logger, "ERROR", reason)
        return False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        stream = self.world.device.stream(stream_handle)
        assert not stream.capture, "the optimisation profile is set during a capture"
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            return self._error(f"IExecutionContext::setOptimizationProfileAsync: no profile {profile_index}")
        if self.active_optimization_profile != profile_index:
            self.warm = None
            self._fixed_shapes()
        self.active_optimization_profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        assert self.active_optimization_profile >= 0, "set_input_shape before a profile was set in this context"
        wanted = tuple(int(size) for size in shape)
        if not any(tensor.name == name for tensor in self.plan.inputs):
            return self._error(f"IExecutionContext::setInputShape: {name} is no input")
        low, _, high = self.engine.get_tensor_profile_shape(name, self.active_optimization_profile)
        if len(low) != len(wanted) or any(not a <= b <= c for a, b, c in zip(low, wanted, high, strict=True)):
            return self._error(
                f"IExecutionContext::setInputShape: Error Code 3: API Usage Error ({name}: {wanted} is out of range of "
                f"profile {self.active_optimization_profile}: {low} to {high})"
            )
        assert not (self.world.device.queues.captures and self.shapes.get(name) != wanted), (
            "a shape changes under capture"
        )
        self.shapes[name] = wanted
        return True

    def infer_shapes(self) -> list[str]:
        return [tensor.name for tensor in self.plan.inputs if tensor.name not in self.shapes]

    @property
    def all_binding_shapes_specified(self) -> bool:
        return not self.infer_shapes()

    def get_tensor_shape(self, name: str) -> Shape:
        if any(tensor.name == name for tensor in self.plan.inputs):
            return self.shapes.get(name, self.plan.by_name[name].shape)
        return self.plan.by_name[name].shape if self.infer_shapes() else output_shapes(self.plan, self.shapes)[name]

    def get_tensor_strides(self, name: str) -> Shape:
        shape = self.get_tensor_shape(name)
        return tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))

    def get_max_output_size(self, name: str) -> int:
        return bytes_of(self.plan.by_name[name].dtype, self.get_tensor_shape(name))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.plan.by_name:
            return self._error(f"IExecutionContext::setTensorAddress: {name} is no input or output")
        assert not isinstance(memory, bool) and int(memory) >= 0, f"{memory} is no address"
        self.addresses[name] = int(memory)
        return True

    def get_tensor_address(self, name: str) -> int:
        return self.addresses.get(name, 0)

    @property
    def device_memory(self) -> int:
        return self.scratch[0] if self.scratch else 0

    @device_memory.setter
    def device_memory(self, memory: int) -> None:
        self.set_device_memory(memory, self.engine.device_memory_size)

    def set_device_memory(self, memory: int, size: int) -> None:
        assert not self.owns_scratch, "scratch memory is given to a context that has its own"
        assert memory % 256 == 0, f"scratch memory at {memory:#x} is not aligned to 256 bytes"
        self.world.device.memory.view(int(memory), int(size), "IExecutionContext.set_device_memory", "device")
        self.scratch = (int(memory), int(size))

    def update_device_memory_size_for_shapes(self) -> int:
        assert not self.infer_shapes(), "update_device_memory_size_for_shapes before all shapes were set"
        return self.plan.scratch_of(self.shapes)

    def set_aux_streams(self, aux_streams: list[int]) -> None:
        for handle in aux_streams:
            self.world.device.stream(handle)

    def execute_async_v3(self, stream_handle: int) -> bool:
        device = self.world.device
        stream = device.stream(stream_handle)
        assert stream.handle, "execute_async_v3 on the default stream, which makes TensorRT wait for all others"
        assert self.active_optimization_profile >= 0, "execute_async_v3 before a profile was set in this context"
        if self.infer_shapes():
            return self._error(f"IExecutionContext::enqueueV3: shapes of {self.infer_shapes()} were not set")
        missing = [name for name in self.plan.by_name if name not in self.addresses]
        if missing:
            return self._error(f"IExecutionContext::enqueueV3: Error Code 3: address of {missing} was not set")
        shapes = {**self.shapes, **output_shapes(self.plan, self.shapes)}
        unknown = [name for name, shape in shapes.items() if -1 in shape]
        assert not unknown, f"the double cannot tell the shapes of {unknown}"
        state = (self.active_optimization_profile, tuple(sorted(self.shapes.items())))
        assert not stream.capture or self.warm == state, (
            "captured without an execution of the same profile and shapes before: TensorRT may allocate and update then"
        )
        if not stream.capture:
            self.warm = state
        assert self.scratch, "execute_async_v3 in a context whose device memory is the user's and was not set"
        need = self.plan.scratch_of(self.shapes)
        assert self.scratch[1] >= need, f"{self.scratch[1]} bytes of scratch memory were given, {need} are needed"
        made = Execution(self.world, self.plan, shapes, self.addresses, self.scratch, self)
        made.ask(stream, self.plugins)
        return True
