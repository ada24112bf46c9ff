"""What a double does for TensorRT's build side: builder, its configuration, profiles, timing cache, plugin registry.

Building checks profiles as TensorRT does and returns None with a line in the log where they do not do; otherwise the
result holds the model, weights inside, as ``plan.py`` writes it. Nothing is optimised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnx

from tests.trt.network import NetworkBehaviour, plugin_nodes
from tests.trt.plan import DTYPES, Plan, PlanTensor, Shape, known_values
from tests.trt.plugin_host import Hosted, HostingError, host, plugin_tensors
from tests.trt.run_side import EngineBehaviour, HostMemory, RuntimeBehaviour

if TYPE_CHECKING:
    from tests.trt.double import Double

__all__ = ["BuilderBehaviour", "ConfigBehaviour", "Registry", "TimingCache"]

CACHE_MAGIC = b"trt-double-timing\0"
OBSOLETE = ("FP16", "BF16", "INT8", "FP8", "INT4", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS")


class ProfileBehaviour:
    """``IOptimizationProfile``."""

    face = "IOptimizationProfile"

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Shape, Shape, Shape]] = {}
        self.extra_memory_target = 1.0

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
        low, best, high = (tuple(int(size) for size in shape) for shape in (min, opt, max))
        shapes = (low, best, high)
        alike = len(low) == len(best) == len(high)
        if not alike or not all(0 <= a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
            raise RuntimeError(f"Shape provided for max is inconsistent with other shapes. {shapes}")  # pyCore.cpp
        self.shapes[input] = shapes

    def get_shape(self, input: str) -> list[Shape]:  # noqa: A002
        return list(self.shapes.get(input, ()))


class TimingCache:
    """``ITimingCache``: entries by layer."""

    face = "ITimingCache"

    def __init__(self, world: Double, entries: set[str]) -> None:
        self.world = world
        self.entries = entries

    def serialize(self) -> HostMemory:
        return HostMemory(self.world, header(self.world) + "\n".join(sorted(self.entries)).encode())

    def combine(self, input_cache: TimingCache, ignore_mismatch: bool) -> bool:
        self.entries |= input_cache.entries
        return True

    def reset(self) -> bool:
        self.entries.clear()
        return True


def header(world: Double) -> bytes:
    """What a timing cache belongs to."""
    return CACHE_MAGIC + f"{world.version} {world.facts.sm}\n".encode()


class ConfigBehaviour:
    """``IBuilderConfig``."""

    face = "IBuilderConfig"

    def __init__(self, world: Double) -> None:
        self.world = world
        self.flags = 1 << world.trt.BuilderFlag.TF32.value
        self.profiles: list[ProfileBehaviour] = []
        self.pools: dict[str, int] = {}
        self.previews: dict[str, bool] = {}
        self.cache: TimingCache | None = None
        self.builder_optimization_level = 3
        self.max_aux_streams = 0
        self.avg_timing_iterations = 1
        self.plugins_to_serialize: list[str] = []
        self.progress_monitor: Any = None
        self.profile_stream = 0
        for name, kind, value in (
            ("profiling_verbosity", "ProfilingVerbosity", "LAYER_NAMES_ONLY"),
            ("hardware_compatibility_level", "HardwareCompatibilityLevel", "NONE"),
            ("engine_capability", "EngineCapability", "STANDARD"),
            ("default_device_type", "DeviceType", "GPU"),
            ("runtime_platform", "RuntimePlatform", "SAME_AS_BUILD"),
            ("tiling_optimization_level", "TilingOptimizationLevel", "NONE"),
        ):
            if hasattr(world.trt, kind):
                setattr(self, name, getattr(getattr(world.trt, kind), value))

    def set_flag(self, flag: Any) -> None:
        self.flags |= 1 << flag.value

    def clear_flag(self, flag: Any) -> None:
        self.flags &= ~(1 << flag.value)

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags >> flag.value & 1)

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        self.previews[feature.name] = enable

    def get_preview_feature(self, feature: Any) -> bool:
        return self.previews.get(feature.name, False)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        assert pool_size >= 0, f"a memory pool of {pool_size} bytes"
        self.pools[pool.name] = int(pool_size)

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self.pools.get(pool.name, self.world.facts.memory)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def add_optimization_profile(self, profile: ProfileBehaviour) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: Any) -> TimingCache | None:
        data = bytes(memoryview(serialized_timing_cache))
        if not data:
            return TimingCache(self.world, set())
        if not data.startswith(CACHE_MAGIC):
            self.world.log(self.world.builder_logger, "ERROR", "The timing cache could not be deserialized.")
            return None
        if not data.startswith(header(self.world)):
            made = TimingCache(self.world, {"of another device"})
            self.world.log(self.world.builder_logger, "WARNING", "The timing cache is of another device or version.")
            return made
        return TimingCache(self.world, set(data[len(header(self.world)) :].decode().split("\n")) - {""})

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        if "of another device" in cache.entries and not ignore_mismatch:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self.cache


class BuilderBehaviour:
    """``Builder``."""

    face = "Builder"

    def __init__(self, world: Double, logger: Any) -> None:
        self.world = world
        self.logger = logger
        world.builder_logger = logger
        self.max_threads = 1
        self.num_DLA_cores = 0
        self.error_recorder = None
        self.platform_has_fast_fp16 = self.platform_has_fast_int8 = self.platform_has_tf32 = True

    def get_plugin_registry(self) -> Registry:
        return self.world.registry

    def create_network(self, flags: int = 0) -> NetworkBehaviour:
        kinds = self.world.trt.NetworkDefinitionCreationFlag
        known = sum(1 << kind.value for kind in kinds.__members__.values())
        assert not flags & ~known, (
            f"create_network: flags {flags:#b} are not of this version: {dict(kinds.__members__)}"
        )
        weak = self.world.release[0] < 11 and not flags >> kinds.STRONGLY_TYPED.value & 1
        assert not weak, "create_network: networks are to be strongly typed"
        return NetworkBehaviour(self.world, int(flags), self)

    def create_builder_config(self) -> ConfigBehaviour:
        return ConfigBehaviour(self.world)

    def create_optimization_profile(self) -> ProfileBehaviour:
        return ProfileBehaviour()

    def is_network_supported(self, network: NetworkBehaviour, config: ConfigBehaviour) -> bool:
        return True

    def reset(self) -> None:
        pass

    def build_engine_with_config(self, network: NetworkBehaviour, config: ConfigBehaviour) -> EngineBehaviour | None:
        host = self.build_serialized_network(network, config)
        return RuntimeBehaviour(self.world, self.logger).deserialize_cuda_engine(host.data) if host else None

    def build_serialized_network(
        self, network: NetworkBehaviour, config: ConfigBehaviour, kernel_text: Any = None
    ) -> HostMemory | None:
        world = self.world
        reason = world.fail_build or self._problem(network, config)
        if reason:
            world.log(self.logger, "ERROR", f"IBuilder::buildSerializedNetwork: Error Code 4: {reason}")
            return None
        assert network.model is not None
        names = [f"{node.op_type}:{node.name}" for node in network.model.graph.node]
        if not self._progress(config.progress_monitor, len(names)):
            world.log(self.logger, "ERROR", "IBuilder::buildSerializedNetwork: the build was cancelled.")
            return None
        if config.cache is not None:
            config.cache.entries |= {hashlib.sha256(name.encode()).hexdigest() for name in names}
        try:
            plan = self._plan(network, config)
        except HostingError as error:
            world.log(self.logger, "ERROR", f"IBuilder::buildSerializedNetwork: Error Code 10: {error}")
            return None
        world.builds.append((network, config, plan))
        return HostMemory(world, plan.to_bytes())

    def _progress(self, monitor: Any, layers: int) -> bool:
        """Whether the monitor lets the build go on."""
        if monitor is None:
            return True
        monitor.phase_start("Building Engine", None, max(layers, 1))
        for step in range(max(layers, 1)):
            if not monitor.step_complete("Building Engine", step):
                return False
        monitor.phase_finish("Building Engine")
        return True

    def _problem(self, network: NetworkBehaviour, config: ConfigBehaviour) -> str | None:
        if network.model is None:
            return "Network must have at least one output"
        kinds = self.world.trt.BuilderFlag.__members__
        weak = [name for name in OBSOLETE if name in kinds and config.get_flag(kinds[name])]
        if weak:
            return f"API Usage Error ({weak[0]} is set for a strongly typed network)"
        if config.pools.get("WORKSPACE", 1) == 0:
            return "Insufficient memory: the workspace is empty"
        stuck = [attention.name for attention in network.attentions if not attention.decomposable]
        if stuck and not self.world.fuses_attention:
            return f"Could not find any implementation for node {stuck[0]}: no fused kernel, and it is not decomposable"
        dynamic = [tensor for tensor in network.inputs if -1 in tensor.dims]
        if dynamic and not config.profiles:
            return "Network has dynamic or shape inputs, but no optimization profile has been defined."
        for profile in config.profiles:
            for tensor in network.inputs:
                reason = range_problem(tensor.name, tensor.dims, profile)
                if reason:
                    return reason
        return None

    def _plan(self, network: NetworkBehaviour, config: ConfigBehaviour) -> Plan:
        world, model = self.world, network.model
        assert model is not None
        flags = world.trt.BuilderFlag
        stripped = hasattr(flags, "STRIP_PLAN") and config.get_flag(flags.STRIP_PLAN)
        runnable = world.runnable(model).SerializeToString()
        tensors = [
            tuple(PlanTensor(t.name, DTYPES[t.elem_type], t.dims) for t in side)
            for side in (network.inputs, network.outputs)
        ]
        return Plan(
            tensorrt=world.version,
            sm=world.facts.sm,
            name=network.name,
            inputs=tensors[0],
            outputs=tensors[1],
            profiles=tuple(
                {tensor.name: profile.shapes.get(tensor.name, (tensor.dims,) * 3) for tensor in network.inputs}
                for profile in config.profiles
            ),
            model=runnable,
            aliases=aliases(model, world),
            plugins=tuple(self._hosted(network, config, runnable)),
            stripped=stripped,
            refittable=stripped or config.get_flag(flags.REFIT),
            layers=len(model.graph.node),
        )

    def _hosted(self, network: NetworkBehaviour, config: ConfigBehaviour, model: bytes) -> list[Hosted]:
        """The network's plugins, built."""
        assert network.model is not None
        pairs = plugin_nodes(self.world, network.model)
        if not pairs:
            return []
        assert len(pairs) == 1, "the double runs engines of at most one plugin node"
        fixed = {tensor.name: tensor.dims for tensor in network.inputs}
        ranges = config.profiles[0].shapes if config.profiles else {}
        points = []
        for point in range(3):
            shapes = {name: ranges[name][point] if name in ranges else shape for name, shape in fixed.items()}
            known = known_values(model, tuple(sorted(shapes.items())))
            points.append({name: shape for name, (_, shape) in known.items()})
        tensors = plugin_tensors(known_values(model, ()), points)
        kinds = self.world.trt.NetworkDefinitionCreationFlag.__members__
        prefer = "PREFER_AOT_PYTHON_PLUGINS" in kinds and network.get_flag(kinds["PREFER_AOT_PYTHON_PLUGINS"])
        return [host(self.world, node, creator, tensors, prefer_aot=prefer) for node, creator in pairs]


def range_problem(name: str, dims: Shape, profile: ProfileBehaviour) -> str | None:
    """What is wrong with a profile's shapes of one input."""
    if name not in profile.shapes:
        return f"Network has dynamic or shape inputs, but {name} has no shapes in a profile." if -1 in dims else None
    for shape in profile.shapes[name]:
        if len(shape) != len(dims) or any(size not in (-1, given) for size, given in zip(dims, shape, strict=True)):
            return f"API Usage Error ({name}: profile has {shape}, the network {dims})"
        if 0 in shape:
            return f"API Usage Error ({name}: profile has an empty shape {shape})"
    return None


def aliases(model: onnx.ModelProto, world: Double) -> dict[str, str]:
    """Outputs of a TensorScatter over an input: updated in place where the release can."""
    if not hasattr(world.trt.ICudaEngine, "get_aliased_input_tensor"):
        return {}
    inputs, outputs = ({value.name for value in side} for side in (model.graph.input, model.graph.output))
    return {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "TensorScatter" and node.output[0] in outputs and node.input[0] in inputs
    }


class Registry:
    """``IPluginRegistry``."""

    face = "IPluginRegistry"

    def __init__(self) -> None:
        self.creators: list[tuple[Any, str]] = []
        self.error_recorder = None
        self.parent_search_enabled = True

    @property
    def all_creators(self) -> list[Any]:
        return [creator for creator, _ in self.creators]

    all_creators_recursive = plugin_creator_list = all_creators

    def register_creator(self, creator: Any, plugin_namespace: str = "") -> bool:
        space = plugin_namespace or getattr(creator, "plugin_namespace", "") or ""
        if self.find(creator.name, creator.plugin_version, space) is not None:
            return False
        self.creators.append((creator, space))
        return True

    def deregister_creator(self, creator: Any) -> bool:
        left = [pair for pair in self.creators if pair[0] is not creator]
        removed, self.creators = len(left) < len(self.creators), left
        return removed

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> Any:  # noqa: A002
        return self.find(type, version, plugin_namespace)

    def find(self, name: str, version: str, namespace: str) -> Any:
        """The creator, None where none is registered."""
        for creator, space in self.creators:
            if (creator.name, creator.plugin_version, space) == (name, version, namespace):
                return creator
        return None

    def describe(self, creator: Any) -> tuple[str, str, str, str]:
        """Name, version, namespace, and whether an engine needs it again when it runs."""
        space = next(space for known, space in self.creators if known is creator)
        quick: Sequence[str] = [base.__name__ for base in type(creator).__mro__]
        return creator.name, creator.plugin_version, space, "aot" if "IPluginCreatorV3Quick" in quick else "v3"
