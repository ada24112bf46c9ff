"""How much memory engines take, before any is built: weights, activations, buffers and KV cache of every stage.

Upper bounds, of the lowered graphs at their largest shapes; ``weights`` and ``liveness`` say what of. What was never
measured on a device is a constant here and says so. Compares with no device: ``fit`` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from export.engine.liveness import activation_bytes
from export.engine.lowered import LoweredStage
from export.engine.options import MIB
from export.engine.shapes import Ranges, profiles_of
from export.engine.sizes import Graph, graph_at, in_float32
from export.engine.weights import Weights, engine_weights
from runtime.manifest import Manifest

__all__ = ["WORKSPACE", "Estimate", "StageMemory", "estimate", "largest", "stage_memory"]

# Scratch memory of the hungriest layer where none is asked for; an assumption: twice the workspace that cuBLAS takes
# for itself on its largest GPUs (32 MiB on Hopper, cuBLAS documentation, "Results reproducibility").
WORKSPACE = 64 * MIB
STAGING = 2  # pinned copies of a vision run's input, filled in turns
CACHES = ("past_", "present_")
FEATURES = {"vision": ("tokens",), "refine": ("tokens", "visual"), "aggregate": ("visual",)}  # counted once, for all


@dataclass(frozen=True)
class StageMemory:
    """Bytes that one stage takes at its largest shapes.

    Attributes:
        activations: scratch memory between its layers, shared by all stages at run time.
        buffers: its inputs and outputs, but for what another stage gave and for the cache.
        cache: KV cache; two of them where it is not written in place.
        staging: pinned memory through which its inputs go.
    """

    stage: str
    weights: Weights
    activations: int
    buffers: int
    cache: int = 0
    staging: int = 0

    @property
    def kept(self) -> int:
        """What it takes while it is open, beside the shared scratch memory."""
        return self.weights.total + self.buffers + self.cache + self.staging


@dataclass(frozen=True)
class Estimate:
    """Bytes that a bundle's engines take.

    Attributes:
        features: of a video with most frames: all their tokens, and what refine makes of them.
        workspace: scratch memory within a layer.
    """

    stages: tuple[StageMemory, ...]
    features: int
    workspace: int

    @property
    def together(self) -> int:
        """All engines open at once; they run one after the other and share their scratch memory."""
        return sum(stage.kept for stage in self.stages) + max(map(self.scratch, self.stages)) + self.features

    @property
    def one_by_one(self) -> int:
        """The largest engine alone, and the features (``--low-memory``)."""
        return max(stage.kept + self.scratch(stage) for stage in self.stages) + self.features

    def scratch(self, stage: StageMemory) -> int:
        """What a stage needs between and within its layers."""
        return stage.activations + self.workspace

    def building(self, stage: StageMemory) -> tuple[int, int]:
        """What building a stage takes of the host and of the device, which may be the same memory.

        "At least two copies of the weights in host memory", the network's and the engine's (NVIDIA, TensorRT
        documentation, How TensorRT Works, Memory, The Build Phase); layers are timed with buffers of their own.
        """
        return 2 * stage.weights.total, self.scratch(stage) + stage.buffers + stage.cache


def estimate(
    manifest: Manifest, stages: Iterable[LoweredStage], ranges: Ranges, workspace: int | None, *, wide: bool = False
) -> Estimate:
    """Of lowered graphs at the largest sizes of their profiles.

    Args:
        manifest: of the bundle.
        stages: of it, all that will be open together.
        ranges: sizes of every key; those of the stages' profiles, or others to see what they would take.
        workspace: bytes one layer may take; None where it was not asked.
        wide: as if what the graphs have in 16 bits were float32.

    Raises:
        BackendError: the size of a tensor cannot be told.
    """
    return Estimate(
        stages=tuple(
            stage_memory(stage.stage, in_float32(graph) if wide else graph, stage.in_place)
            for stage in stages
            for graph in [graph_at(stage.model, largest(manifest, stage, ranges))]
        ),
        features=features(manifest, ranges),
        workspace=WORKSPACE if workspace is None else workspace,
    )


def largest(manifest: Manifest, stage: LoweredStage, ranges: Ranges) -> dict[str, tuple[int, ...]]:
    """Input shapes of the profile that needs most: the first, where there are several."""
    profile = profiles_of(manifest, stage.stage, ranges, in_place=stage.in_place)[0]
    return {name: shapes.most for name, shapes in profile.items()}


def stage_memory(stage: str, graph: Graph, in_place: bool = False) -> StageMemory:
    """One stage at given sizes."""
    inside = [name for name in graph.inputs if not name.startswith(CACHES)]
    outside = [name for name in graph.outputs if not name.startswith(CACHES)]
    shared = FEATURES.get(stage, ())
    inputs, outputs = (
        sum(graph.sizes[name].bytes for name in names if name not in shared) for names in (inside, outside)
    )
    cache = sum(graph.sizes[name].bytes for name in graph.inputs if name.startswith(CACHES))
    return StageMemory(
        stage=stage,
        weights=engine_weights(graph),
        activations=activation_bytes(graph),
        buffers=inputs + outputs,
        cache=cache if in_place else 2 * cache,
        staging=STAGING * inputs if stage == "vision" else 0,
    )


def features(manifest: Manifest, ranges: Ranges) -> int:
    """Bytes of what is kept of a video, in float32."""
    spec, linvt = manifest.frames, manifest.linvt
    most = ranges.frames.most if ranges.frames else spec.maximum
    rows = spec.sets(most) * spec.tokens + (linvt.pooled_tokens if linvt else 0)
    return 4 * rows * manifest.width
