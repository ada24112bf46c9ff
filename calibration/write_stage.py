"""One quantised stage: built, measured, written into the draft, and described.

Leaves in floating point what its target asks for. Chooses no scales.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx_ir as ir

from calibration.linears import exempt_weights, grouped
from calibration.lint import Lint, infinite_constants, lint
from calibration.measure import Examples, Loss, measured
from calibration.passes import lower_opset
from calibration.plan import Plan, built, float_graph
from calibration.report import StageReport
from calibration.sensitivity import Kept, Target, kept_groups
from calibration.stage_file import write_stage_file
from calibration.watch import InMemory
from runtime.errors import CalibrationError
from runtime.manifest import Manifest, QuantizedSpec, StageSpec

__all__ = ["StageWriter"]

QUICK = 2  # examples that rank layers


@dataclass(frozen=True)
class StageWriter:
    """Writes stages into a draft.

    Attributes:
        draft: the folder.
        manifest: of the float bundle.
        examples: what the float stages made of the clips that measure.
        threads: compute threads.
        progress: told what is on.
    """

    draft: Path
    manifest: Manifest
    examples: Examples
    threads: int | None
    progress: Callable[[str], None]

    def write(self, stage: str, plan: Plan, target: Target) -> tuple[StageSpec, StageReport]:
        """Quantise as much of a stage as its target allows.

        Raises:
            CalibrationError: the target does not hold.
        """
        last: list[StageSpec] = []

        def measure(groups: Collection[str]) -> Loss:
            last[:] = [self.file(stage, plan, groups)]
            forms = [self.draft / file for file in (last[0].file, *last[0].older)]
            return measured(stage, forms, self.examples, self.manifest, self.threads)

        def quick(groups: Collection[str]) -> Loss:
            model = built(plan, groups)
            lower_opset(model)  # which every ONNX Runtime of ours knows
            graph = InMemory(ir.serde.serialize_model(model).SerializeToString(), plan.source.parent)
            return measured(stage, [graph], self.examples.few(stage, QUICK), self.manifest, self.threads)

        kept = kept_groups(stage, plan.groups, measure, quick, target, self.progress)
        spec = self.file(stage, plan, kept.groups) if kept.floats else last[0]
        return self.described(stage, plan, kept, spec)

    def file(self, stage: str, plan: Plan, groups: Collection[str]) -> StageSpec:
        """Write the stage with ``groups`` quantised."""
        storage = "int4" if plan.blocks else "int8"
        return write_stage_file(built(plan, groups), self.draft, stage, compute=plan.spec.compute, storage=storage)  # type: ignore[arg-type]

    def described(self, stage: str, plan: Plan, kept: Kept, spec: StageSpec) -> tuple[StageSpec, StageReport]:
        """What the manifest and the report say about a written stage."""
        model, layers = float_graph(plan.source)
        names = {group: [linear.name for linear in linears] for group, linears in grouped(layers.values()).items()}
        floats = {name: damage for group, damage in kept.floats.items() for name in names[group]}
        quantized = [name for group in kept.groups for name in names[group]]
        without = [name for name in quantized if plan.blocks and name not in plan.blocks]  # no block divides them
        checks = self.checked(stage, spec, model, [*floats, *without])
        ratio = size_of(self.draft, spec) / float_size(plan.source)
        report = StageReport(
            weights="int4" if plan.blocks else "int8",
            activations="float" if plan.blocks else "int8",
            loss=kept.loss,
            layers=len(quantized) - len(without),
            floats={**floats, **dict.fromkeys(without, 0.0)},
            methods=counted(plan.scales[group].method for group in kept.groups),
            quantized_bytes=checks.quantized_bytes,
            float_bytes=checks.float_bytes,
            size_ratio=round(ratio, 4),
            tensorrt=dict(checks.supports),
        )
        summary = QuantizedSpec(
            weights=report.weights,
            activations=report.activations,
            block=max((blocks.block for blocks in plan.blocks.values()), default=0),
            layers=report.layers,
            floats=tuple(report.floats),
            cosine=round(kept.loss.cosine, 6),
            size_ratio=report.size_ratio,
        )
        return msgspec.structs.replace(spec, quantized=summary), report

    def checked(self, stage: str, spec: StageSpec, model: ir.Model, floats: Iterable[str]) -> Lint:
        """The written graph, linted; only ``floats`` and weights that are no layers may be in floating point."""
        allowed = {name.split("#")[0] for name in floats}
        allowed |= {f"{name}.smoothed" for name in allowed} | exempt_weights(model)
        meant = set(infinite_constants(model))
        found = lint(ir.load(self.draft / spec.file), floats=allowed, infinite=meant)
        if not found:
            raise CalibrationError(f"{stage}: {found.problems[0]}; this is a fault of the quantiser, please report it")
        return found


def size_of(folder: Path, spec: StageSpec) -> int:
    """Bytes of a stage's graph and weights; the form for older engines shares the weights and is not counted."""
    files = (folder / spec.file, folder / f"{spec.file}.data")
    return sum(path.stat().st_size for path in files if path.exists())


def float_size(source: Path) -> int:
    """Bytes of the float stage's graph, and of all its weights in float32."""
    tensors = (value.const_value for value in ir.load(source).graph.initializers.values())
    weights = (tensor for tensor in tensors if tensor is not None and tensor.dtype.is_floating_point())
    return source.stat().st_size + sum(4 * tensor.size for tensor in weights)


def counted(names: Iterable[str]) -> dict[str, int]:
    """How often each name comes."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts
