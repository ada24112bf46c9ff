"""How one stage is quantised, and the graph that follows from it.

A plan is made once from what a calibration run saw; any part of its groups can then be built: the sensitivity pass
builds many. Every build starts from the float graph's file, whose weights are read when the result is written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from calibration.blocks import Blocks
from calibration.choose import chosen_scale, judged
from calibration.choose_blocks import chosen_blocks
from calibration.insert import LEVELS, SMALLEST, Exponents, Factors, insert_int4, insert_int8
from calibration.linears import Linear, fold_constant_products, grouped, linears_of
from calibration.observe import Observer
from calibration.options import QuantizeOptions
from calibration.scales import LEAST_SCALE, TensorScale
from calibration.smooth import Fold, fold_of, overflowing, put_column_factors, put_factors
from runtime.errors import CalibrationError
from runtime.manifest import StageSpec

__all__ = ["DTYPES", "Plan", "built", "can_fold", "float_graph", "planned"]

DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


class CheckedTensor(ir.ExternalTensor):
    """A weight in a file that opening the bundle has checked.

    Package managers link installed files to their caches; ``onnx_ir`` refuses files with several hard links unless
    it is left to the caller where a location leads.
    """

    def __init__(self, tensor: ir.ExternalTensor, folder: Path) -> None:
        assert tensor.name is not None
        shape = ir.Shape(tensor.shape.numpy())
        super().__init__(tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=shape, name=tensor.name)
        self.folder = folder

    @property
    def path(self) -> str:
        """The file."""
        return str(self.folder / self.location)


@dataclass(frozen=True)
class Plan:
    """A stage's scales.

    Attributes:
        source: the float graph's file.
        spec: the float stage.
        scales: by activation.
        blocks: weights in blocks, by layer, where activations stay in floating point; empty for W8A8.
    """

    source: Path
    spec: StageSpec
    scales: Mapping[str, TensorScale]
    blocks: Mapping[str, Blocks] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[str, ...]:
        """Activations whose layers can be quantised."""
        return tuple(self.scales)


def planned(
    source: Path,
    spec: StageSpec,
    observers: Mapping[str, Observer],
    options: QuantizeOptions,
    *,
    narrow: bool,
    given: Mapping[str, TensorScale],
    progress: Callable[[int, int], None],
) -> Plan:
    """Choose the scales of one stage.

    Args:
        source: the float graph's file.
        spec: what the manifest says about it.
        observers: what was seen of every activation.
        options: the run's.
        narrow: 4-bit weights in place of W8A8.
        given: entries of a scale table that ``check_given`` found good; 4-bit weights are fitted anew.
        progress: told which activation of how many is on.

    Raises:
        CalibrationError: an activation that was always 0, or no weight that blocks divide.
    """
    _, layers = float_graph(source)
    groups = grouped(layers.values())
    scales: dict[str, TensorScale] = {}
    blocks: dict[str, Blocks] = {}
    for number, (name, linears) in enumerate(groups.items(), 1):
        progress(number, len(groups))
        if observers[name].histogram.largest / LEVELS < LEAST_SCALE:
            raise CalibrationError(
                f"activation {name} was 0 on all clips, which gives a scale of 0; calibrate with clips that show "
                "something, and check the float bundle"
            )
        fold = fold_of(linears, layers)
        chosen = partial(choice, linears, observers[name], options, spec, narrow=narrow, given=given.get(name))
        scales[name], of_layers = chosen(smooth=can_fold(fold, spec))
        exponents = np.array(scales[name].smooth, np.int8)
        if spec.compute != "float32" and exponents.size and name not in given:
            assert fold is not None, "nothing else is smoothed"
            if overflowing(fold, linears, layers, exponents, DTYPES[spec.compute]):
                scales[name], of_layers = chosen(smooth=False)
        blocks.update(of_layers)
    if narrow and not blocks:
        raise CalibrationError(
            f"{source.name} has no layer whose input channels a block of 16 or more divides, expected at least one; "
            "use --llm int8 or --llm float"
        )
    return Plan(source, spec, scales, blocks)


def choice(
    linears: Sequence[Linear],
    observer: Observer,
    options: QuantizeOptions,
    spec: StageSpec,
    *,
    narrow: bool,
    given: TensorScale | None,
    smooth: bool,
) -> tuple[TensorScale, dict[str, Blocks]]:
    """The scale of one activation, or the blocks of the layers that read it."""
    if narrow:
        return chosen_blocks(linears, observer, options.block, options.rounding, smooth=smooth)
    if given is not None:
        return judged(given, linears, observer), {}
    least = max(LEAST_SCALE, SMALLEST[DTYPES[spec.compute]])
    return chosen_scale(linears, observer, options.method, smooth=smooth, least=least), {}


def can_fold(fold: Fold | None, spec: StageSpec) -> bool:
    """Whether factors may go there: a feeder's columns, 2^-10 times as large, would leave float16's normal numbers."""
    return fold is not None and (fold.norm is not None or spec.compute == "float32")


def float_graph(source: Path) -> tuple[ir.Model, dict[str, Linear]]:
    """A float stage, of a bundle that was opened, and its layers; products of constants are folded."""
    model = ir.load(source)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = CheckedTensor(value.const_value, source.parent)
    fold_constant_products(model)
    return model, linears_of(model)


def built(plan: Plan, groups: Collection[str]) -> ir.Model:
    """The stage with the layers of ``groups`` quantised, all others as they were."""
    model, layers = float_graph(plan.source)
    by_activation = grouped(layers.values())
    chosen = [name for name in by_activation if name in groups]
    quantized = {linear.name: linear for group in chosen for linear in by_activation[group]}
    if plan.blocks:
        quantized = {name: linear for name, linear in quantized.items() if name in plan.blocks}
    rows, columns = smoothed(model, layers, plan, chosen, quantized)
    dtype = DTYPES[plan.spec.compute]
    if plan.blocks:
        blocks = {name: with_columns(plan.blocks[name], columns.get(name)) for name in quantized}
        insert_int4(model, quantized, blocks, dtype)
    else:
        scales = {name: plan.scales[name].threshold / LEVELS for name in chosen}
        factors = {name: Factors(rows.get(name), columns.get(name)) for name in quantized}
        insert_int8(model, quantized, scales, factors, dtype)
    drop_inner_types(model)
    return model


def drop_inner_types(model: ir.Model) -> None:
    """Leave out what engines infer: types and shapes take as much of a small graph's file as its nodes do."""
    inner = [output for node in model.graph for output in node.outputs]
    for value in (*inner, *model.graph.initializers.values()):
        if not value.is_graph_output() and not value.is_graph_input():
            value.shape, value.type = None, None


def smoothed(
    model: ir.Model, layers: Mapping[str, Linear], plan: Plan, groups: Collection[str], quantized: Collection[str]
) -> tuple[dict[str, Exponents], dict[str, Exponents]]:
    """Fold the smoothing of ``groups`` into the graph; what quantised layers' rows and columns are multiplied by, log2.

    Args:
        model: the graph.
        layers: all of it.
        plan: whose smoothing.
        groups: activations to smooth.
        quantized: names of the layers that will be quantised; a feeder that will not be gets other columns at once.
    """
    rows: dict[str, Exponents] = {}
    columns: dict[str, Exponents] = {}
    by_activation = grouped(layers.values())
    for group in groups:
        exponents = np.array(plan.scales[group].smooth, np.int8)
        if not exponents.size:
            continue
        fold = fold_of(by_activation[group], layers)
        assert fold is not None, "the plan smooths only what folds"
        assert all(linear.name in quantized for linear in by_activation[group]), "whose rows make good for it"
        rows.update((linear.name, exponents) for linear in by_activation[group])
        if fold.norm is not None:
            put_factors(model.graph, fold.norm, exponents)
        elif fold.feeder is not None and fold.feeder in quantized:
            columns[fold.feeder] = -exponents
        elif fold.feeder is not None:
            put_column_factors(model.graph, layers[fold.feeder], exponents)
    return rows, columns


def with_columns(blocks: Blocks, exponents: Exponents | None) -> Blocks:
    """Blocks of a weight whose columns are multiplied by 2^exponents."""
    if exponents is None:
        return blocks
    scales = np.ldexp(blocks.scales, exponents.astype(np.int32))
    return Blocks(blocks.values, scales, blocks.bits, blocks.block)
