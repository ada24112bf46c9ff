"""Plans become graphs: what is not asked for stays to the bit, what is folded changes nothing."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from calibration.blocks import Blocks, round_to_nearest
from calibration.choose_blocks import bits_of, block_of
from calibration.insert import Factors, scaled_weight
from calibration.linears import Linear, grouped, replace_constant
from calibration.plan import Plan, built, float_graph, smoothed
from calibration.smooth import fold_of
from calibration.stage_file import write_stage_file
from runtime.bundle import Bundle
from runtime.errors import BundleError
from runtime.manifest import StageSpec
from tests.graphs import Arrays, run
from tests.plans import entry, gated, stage_file
from tests.test_insert import assert_near, columns_round_trip, engine, fused, round_trip
from tests.test_lower_opset import random_feeds
from tests.text_graphs import assert_same_bits, normal

DEMO = Bundle.open("demo-float")
STAGES = ["vision", "refine", "aggregate", "decode"]

Exponents = NDArray[np.int8]


def demo_plan(stage: str, random: np.random.Generator, *, narrow: bool = False, smooth: bool = False) -> Plan:
    """A plan of the demo's stage with made-up scales, 8-bit or in blocks."""
    spec = DEMO.manifest.stages[stage]
    source = DEMO.path(spec.file)
    return plan_of(source, spec, random, narrow=narrow, smooth=smooth)


def plan_of(
    source: Path, spec: StageSpec, random: np.random.Generator, *, narrow: bool = False, smooth: bool = False
) -> Plan:
    _, layers = float_graph(source)
    scales, blocks = {}, {}
    for name, linears in grouped(layers.values()).items():
        width = linears[0].shape[0]
        exponents: Exponents = np.zeros(width, np.int8)
        block = block_of(width, 32)
        if smooth and fold_of(linears, layers) is not None and (block or not narrow):
            exponents = random.integers(-1, 2, width, dtype=np.int8)
        scales[name] = entry(random.uniform(9, 11), exponents if exponents.any() else ())
        if narrow and block:
            blocks |= {linear.name: rounded(linear, exponents, block) for linear in linears}
    return Plan(source, spec, scales, blocks)


def rounded(linear: Linear, exponents: Exponents, block: int) -> Blocks:
    return round_to_nearest(scaled_weight(linear.weight(), Factors(rows=exponents)), block, bits_of(linear))


def written(model: ir.Model, folder: Path) -> tuple[Path, Path]:
    """Both forms of a graph on disk."""
    folder.mkdir(exist_ok=True)
    spec = write_stage_file(model, folder, "stage", compute="float32", storage="int8")
    return folder / spec.file, folder / spec.older[0]


def results(model: ir.Model, folder: Path, feeds: Arrays) -> Arrays:
    return run(engine(written(model, folder)[1]), **feeds)


def demo_feeds(stage: str, random: np.random.Generator) -> Arrays:
    return random_feeds(engine(DEMO.path(DEMO.manifest.stages[stage].older[0])), random)


# --- what ONNX Runtime makes of the demo


@pytest.mark.parametrize("stage", STAGES)
def test_every_8_bit_layer_of_the_demo_is_fused(stage: str, random: np.random.Generator, tmp_path: Path) -> None:
    plan = demo_plan(stage, random, smooth=True)
    count = len(float_graph(plan.source)[1])
    graph, older = written(built(plan, plan.groups), tmp_path)
    found = fused(older, tmp_path)
    assert found["MatMulIntegerToFloat"] == count and not found["DequantizeLinear"]
    assert found["MatMul"] == (stage == "refine")  # LinVT's score, which is no layer
    operators = {node.op_type for node in ir.load(graph).graph}
    assert ("GatherPool" in operators) == (stage == "refine")


def test_every_4_bit_layer_of_the_demo_is_fused(random: np.random.Generator, tmp_path: Path) -> None:
    plan = demo_plan("decode", random, narrow=True, smooth=True)
    _, older = written(built(plan, plan.groups), tmp_path)
    found = fused(older, tmp_path)
    assert found["MatMulNBits"] == len(plan.blocks) == len(float_graph(plan.source)[1])
    assert not found["MatMul"] and not found["DequantizeLinear"]


def test_both_forms_of_a_quantised_stage_say_the_same(random: np.random.Generator, tmp_path: Path) -> None:
    plan = demo_plan("aggregate", random)
    model = built(plan, plan.groups)
    forms = written(model, tmp_path)
    assert [ir.load(form).opset_imports[""] for form in forms] == [24, 23]
    assert all(value.const_value is None for value in model.graph.initializers.values())  # gigabytes, let go
    feeds = demo_feeds("aggregate", random)
    assert_same_bits(*(run(engine(form), **feeds) for form in forms))


# --- what is not asked for stays


@pytest.mark.parametrize("stage", STAGES)
def test_without_any_group_a_stage_is_what_it_was_to_the_bit(
    stage: str, random: np.random.Generator, tmp_path: Path
) -> None:
    """The aggregate stage has a product of constants, which is rounded once here and several times by the engine."""
    plan, feeds = demo_plan(stage, random, smooth=True), demo_feeds(stage, random)
    found = results(built(plan, ()), tmp_path, feeds)
    expected = run(engine(plan.source.with_name(plan.spec.older[0])), **feeds)
    assert_near(found, {name: value for name, value in expected.items() if value.dtype == np.float32}, 1e-5)
    if stage != "aggregate":
        assert_same_bits(found, expected)


@pytest.mark.parametrize("narrow", [False, True])
def test_layers_of_other_groups_keep_every_bit(narrow: bool, random: np.random.Generator) -> None:
    plan = demo_plan("decode", random, narrow=narrow, smooth=True)
    model, layers = float_graph(plan.source)
    groups = grouped(layers.values())
    some = set(random.choice(plan.groups, 5, replace=False).tolist())
    found = {name: value.const_value for name, value in built(plan, some).graph.initializers.items()}
    suffix = ".int4" if narrow else ".int8"
    assert {name.removesuffix(suffix) for name in found if name.endswith(suffix)} == {
        linear.name for group in some for linear in groups[group]
    }
    norms = {value.name for group in some if (value := gain_of(groups[group], layers)) is not None}
    feeders = {fold.feeder for group in some if (fold := fold_of(groups[group], layers)) is not None}
    for name, value in model.graph.initializers.items():
        if name in norms or name in feeders or any(layers[name] in groups[group] for group in some if name in layers):
            assert name not in found
        else:
            expected, tensor = value.const_value, found[name]
            assert expected is not None and tensor is not None
            np.testing.assert_array_equal(tensor.numpy(), expected.numpy(), name)


def gain_of(linears: list[Linear], layers: Mapping[str, Linear]) -> ir.Value | None:
    fold = fold_of(linears, layers)
    return fold.norm.inputs[1] if fold is not None and fold.norm is not None else None


def test_a_branch_without_its_group_gives_the_bits_it_gave(random: np.random.Generator, tmp_path: Path) -> None:
    text = """
    net (float[1, rows, 32] x) => (float[1, rows, 24] y, float[1, rows, 24] z) {
        h = RMSNormalization (x, gain)
        y = MatMul (h, v)
        k = RMSNormalization (x, gain)
        z = MatMul (k, w)
    }
    """
    weights = {
        "gain": random.uniform(0.5, 1.5, 32).astype(np.float32),
        "v": normal(random, 32, 24),
        "w": normal(random, 32, 24),
    }
    plan = plan_of(tmp_path / "stage.onnx", stage_file(text, weights, tmp_path), random, smooth=True)
    assert all(plan.scales[name].smooth for name in "hk")
    feeds = {"x": normal(random, 1, 5, 32)}
    before = results(float_graph(plan.source)[0], tmp_path / "float", feeds)
    found = results(built(plan, ["h"]), tmp_path / "part", feeds)
    assert_same_bits({"z": found["z"]}, {"z": before["z"]})
    assert np.abs(found["y"] - before["y"]).max() > 1e-4
    assert_near(found, before, 0.1)


# --- smoothing


@pytest.mark.parametrize("stage", ["vision", "aggregate", "decode"])
def test_smoothing_a_stage_changes_no_bit_of_its_float_results(
    stage: str, random: np.random.Generator, tmp_path: Path
) -> None:
    """The graph with all factors folded, whose layers keep their weights in floating point."""
    plan, feeds = demo_plan(stage, random, smooth=True), demo_feeds(stage, random)
    before = results(built(plan, ()), tmp_path, feeds)
    model, layers = float_graph(plan.source)
    rows, columns = smoothed(model, layers, plan, plan.groups, layers)
    assert rows and bool(columns) == (stage == "decode")
    for name, linear in layers.items():
        if name in rows or name in columns:
            weight = scaled_weight(linear.weight(), Factors(rows.get(name), columns.get(name)))
            replace_constant(model.graph, linear.node, 1, f"{name}.scaled", weight)
    assert_same_bits(results(model, tmp_path, feeds), before)


def gated_outputs(x: NDArray[np.float32], gate: Any, up: Any, down: Any) -> Arrays:
    product: Any = (1 / (1 + np.exp(-(x @ gate)))) * (x @ up)
    return {"y": product @ down}


@pytest.mark.parametrize("groups", [("p",), ("x", "p"), ("x",)])
def test_a_feeder_takes_its_factors_quantised_or_not(
    groups: tuple[str, ...], random: np.random.Generator, tmp_path: Path
) -> None:
    spec, weights = gated(tmp_path, random, 32)
    exponents = random.integers(-1, 2, 64, dtype=np.int8)
    x = normal(random, 1, 5, 32)
    product = gated_outputs(x, weights["gate"], weights["up"], np.eye(64))["y"]
    limit = float(np.abs(np.ldexp(product, -exponents.astype(int))).max())
    plan = Plan(tmp_path / spec.file, spec, {"x": entry(4), "p": entry(limit, exponents)})
    found = results(built(plan, groups), tmp_path / "int8", {"x": x})
    if "x" in groups:
        weights |= {name: columns_round_trip(weights[name]) for name in ("gate", "up")}
        x = round_trip(x, 4 / 127)
    assert_near(found, gated_outputs(x, **weights), 0.1)


@pytest.mark.parametrize(("width", "names"), [(32, ["gate", "up", "down"]), (24, ["down"])])
def test_a_feeder_that_no_block_divides_takes_its_factors_in_float(
    width: int, names: list[str], random: np.random.Generator, tmp_path: Path
) -> None:
    spec, weights = gated(tmp_path, random, width)
    plan = plan_of(tmp_path / spec.file, spec, random, narrow=True, smooth=True)
    assert plan.scales["p"].smooth and list(plan.blocks) == names
    forms = written(built(plan, plan.groups), tmp_path / "int4")
    x = normal(random, 1, 5, width)
    exact = {name: plan.blocks[name].dense() if name in plan.blocks else weight for name, weight in weights.items()}
    exact["down"] = np.ldexp(exact["down"], -np.array(plan.scales["p"].smooth)[:, None])
    found = run(engine(forms[1], optimize=False), x=x)
    assert_near(found, gated_outputs(x, **exact), 1e-5)


# --- dtypes and shapes


def test_a_float16_stage_is_quantised_in_float16(random: np.random.Generator, tmp_path: Path) -> None:
    text = """
    net (float16[1, rows, 32] x) => (float16[1, rows, 24] y) {
        h = RMSNormalization (x, gain)
        y = MatMul (h, w)
    }
    """
    weights = {
        "gain": random.uniform(0.5, 1.5, 32).astype(np.float32).astype(np.float16),
        "w": normal(random, 32, 24).astype(np.float16),
    }
    spec = stage_file(text, weights, tmp_path, compute="float16")
    plan = plan_of(tmp_path / spec.file, spec, random, smooth=True)
    feeds = {"x": normal(random, 1, 5, 32).astype(np.float16)}
    before = run(engine(tmp_path / spec.older[0]), **feeds)
    found = results(built(plan, plan.groups), tmp_path / "int8", feeds)
    assert found["y"].dtype == np.float16
    assert_near(found, before, 0.1)


def test_inner_types_are_left_out_and_those_of_inputs_and_outputs_kept(
    random: np.random.Generator, tmp_path: Path
) -> None:
    plan = demo_plan("refine", random)
    float_model = ir.load(plan.source)
    model = ir.load(written(built(plan, plan.groups), tmp_path)[0])
    inner = [output for node in model.graph for output in node.outputs if not output.is_graph_output()]
    assert inner and all(value.type is None and value.shape is None for value in inner)
    ends = [(value.name, value.dtype, value.shape) for value in (*model.graph.inputs, *model.graph.outputs)]
    expected = (*float_model.graph.inputs, *float_model.graph.outputs)
    assert ends == [(value.name, value.dtype, value.shape) for value in expected]
    assert model.functions.keys() == float_model.functions.keys() != set()


def test_a_product_with_a_product_of_constants_is_a_layer_of_the_stage(
    random: np.random.Generator, tmp_path: Path
) -> None:
    text = "net (float[1, rows, 32] x) => (float[1, rows, 24] y) { w = MatMul (a, b)\n y = MatMul (x, w) }"
    spec = stage_file(text, {"a": normal(random, 32, 48), "b": normal(random, 48, 24)}, tmp_path)
    assert {name: layer.shape for name, layer in float_graph(tmp_path / spec.file)[1].items()} == {"w.folded": (32, 24)}


# --- files


def test_weights_that_a_package_manager_linked_are_read(random: np.random.Generator, tmp_path: Path) -> None:
    shutil.copytree(DEMO.folder, tmp_path / "copy")
    shutil.copytree(tmp_path / "copy", tmp_path / "linked", copy_function=os.link)
    bundle = Bundle.open(tmp_path / "linked")
    spec = bundle.manifest.stages["decode"]
    assert bundle.path(f"{spec.file}.data").stat().st_nlink > 1
    plan = plan_of(bundle.path(spec.file), spec, random)
    feeds = demo_feeds("decode", random)
    some = plan.groups[:3]
    found = results(built(plan, some), tmp_path / "out", feeds)
    plain = dataclasses.replace(plan, source=DEMO.path(spec.file))
    assert_same_bits(found, results(built(plain, some), tmp_path / "plain", feeds))


def test_weights_that_lie_elsewhere_are_refused_when_the_bundle_is_opened(tmp_path: Path) -> None:
    shutil.copytree(DEMO.folder, tmp_path / "bundle")
    weights = tmp_path / "bundle" / "decode.onnx.data"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"decode\.onnx\.data leads outside the bundle"):
        Bundle.open(tmp_path / "bundle")
