"""How much memory engines take is told from graphs alone: hand-computed parts, and sizes of real models."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.trt_rules import RELEASES
from export.engine.advice import Asked, changes, suggestion
from export.engine.estimate import Estimate, StageMemory, estimate, largest, stage_memory
from export.engine.fit import Room, fits, room_of
from export.engine.liveness import activation_bytes
from export.engine.lowered import lowered_stages
from export.engine.options import MIB, BuildOptions, numbers
from export.engine.shapes import Ranges, ranges_of
from export.engine.sizes import graph_at
from export.engine.weights import Layer, Weights, engine_weights
from export.lower import release_of
from kernels.cuda import Device
from runtime.bundle import Bundle
from runtime.errors import BackendError
from runtime.manifest import STAGES
from tests.families import FIXTURES, Fixture

Tensor = onnx.TensorProto | onnx.NodeProto


def model_of(
    nodes: Sequence[onnx.NodeProto], inputs: dict[str, Sequence[int | str]], outputs: Sequence[str], *weights: Tensor
) -> onnx.ModelProto:
    """A float32 graph; shapes of the outputs are for inference to find."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [weight for weight in weights if isinstance(weight, onnx.TensorProto)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def elsewhere(name: str, *shape: int, dtype: int = TensorProto.FLOAT) -> onnx.TensorProto:
    """A weight whose values lie in a file that is not there."""
    tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="nowhere")
    return tensor


def scalar(name: str, value: float = 0.5) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value, np.float32), name)


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return Bundle.open("demo-float")


def demo_estimate(demo: Bundle, version: str = "10.3", **most: int) -> Estimate:
    """Of the demo in float32, with sizes as ``--max`` has them."""
    options = BuildOptions(most=most)
    ranges = ranges_of(demo.manifest, options)
    stages = lowered_stages(demo, STAGES, release_of(version), ranges, plugin=True)
    return estimate(demo.manifest, stages.values(), ranges, None)


def test_the_parts_of_a_tiny_stage_are_those_computed_by_hand() -> None:
    model = model_of(
        [
            helper.make_node("MatMul", ["x", "a"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "b"], ["m"]),
            helper.make_node("Add", ["m", "bias"], ["y"]),
        ],
        {"x": ["frames", 18]},
        ["y"],
        elsewhere("a", 18, 32),
        elsewhere("b", 32, 16),
        elsewhere("bias", 16),
    )
    memory = stage_memory("aggregate", graph_at(model, {"x": (10, 18)}))
    assert memory.weights == Weights((Layer(18, 32, 4 * 18 * 32), Layer(32, 16, 4 * 32 * 16)), other=4 * 16)
    assert memory.activations == 2 * 4 * 10 * 32  # h and r; then r and m, which is smaller
    assert memory.buffers == 4 * (10 * 18 + 10 * 16)
    assert (memory.cache, memory.staging) == (0, 0)


def test_shapes_that_a_graph_computes_are_found(random: np.random.Generator) -> None:
    rows, heads = int(random.integers(2, 50)), int(random.integers(2, 5))
    model = model_of(
        [
            helper.make_node("Shape", ["x"], ["length"], start=1, end=2),
            helper.make_node("Squeeze", ["length"], ["count"]),
            helper.make_node("Range", ["zero", "count", "one"], ["arange"]),
            helper.make_node("Concat", ["one_row", "length", "rest"], ["wanted"], axis=0),
            helper.make_node("Reshape", ["x", "wanted"], ["split"]),
        ],
        {"x": [1, "sequence", 8 * heads]},
        ["split", "arange"],
        *(numpy_helper.from_array(np.array(value, np.int64), name) for name, value in (("zero", 0), ("one", 1))),
        numpy_helper.from_array(np.array([1], np.int64), "one_row"),
        numpy_helper.from_array(np.array([heads, -1], np.int64), "rest"),
    )
    sizes = graph_at(model, {"x": (1, rows, 8 * heads)}).sizes
    assert sizes["split"].shape == (1, rows, heads, 8)
    assert (sizes["arange"].shape, sizes["arange"].bytes) == ((rows,), 8 * rows)


def test_a_size_that_depends_on_values_is_refused_in_one_line() -> None:
    model = model_of([helper.make_node("NonZero", ["x"], ["where"], name="find")], {"x": [4]}, ["where"])
    with pytest.raises(BackendError, match="NonZero find have no size that could be told"):
        graph_at(model, {"x": (4,)})


def test_an_input_that_the_manifest_lacks_is_refused_in_one_line() -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": [4]}, ["y"])
    with pytest.raises(BackendError, match="the manifest has no input 'x'"):
        graph_at(model, {"pixels": (4,)})


def test_an_output_that_nothing_gives_is_refused_in_one_line() -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": [4]}, ["y", "z"])
    with pytest.raises(BackendError, match="z have no size that could be told"):
        graph_at(model, {"x": (4,)})


def test_a_graph_that_lost_something_is_refused_in_one_line_or_has_sizes(
    demo: Bundle, random: np.random.Generator
) -> None:
    ranges = ranges_of(demo.manifest, BuildOptions())
    stages = lowered_stages(demo, ("vision", "refine"), release_of("10.3"), ranges, plugin=True)
    refusals = 0
    for _ in range(60):
        stage = stages[str(random.choice(["vision", "refine"]))]
        model = onnx.ModelProto.FromString(stage.model.SerializeToString())
        node = model.graph.node[int(random.integers(len(model.graph.node)))]
        for part in (node.input, node.output, node.attribute):
            if part and random.random() < 0.5:
                del part[int(random.integers(len(part)))]
        try:
            stage_memory(stage.stage, graph_at(model, largest(demo.manifest, stage, ranges)))
        except BackendError as error:
            assert "\n" not in str(error) and "could be told" in str(error)
            refusals += 1
    assert refusals


def test_a_weight_of_negative_size_is_refused_in_one_line() -> None:
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [4, 4]}, ["y"], elsewhere("w", 4, -1))
    with pytest.raises(BackendError, match=r"w has the shape \[4, -1\]"):
        graph_at(model, {"x": (4, 4)})


def product(weight: str, *before: onnx.NodeProto, x: str = "x") -> list[onnx.NodeProto]:
    return [*before, helper.make_node("MatMul", [x, weight], ["y"])]


def weights_of(nodes: list[onnx.NodeProto], *weights: onnx.TensorProto) -> Weights:
    return engine_weights(graph_at(model_of(nodes, {"x": [3, 64]}, ["y"], *weights), {"x": (3, 64)}))


def test_weights_behind_a_cast_count_as_what_they_are_cast_to() -> None:
    cast = helper.make_node("Cast", ["half"], ["w"], to=TensorProto.FLOAT)
    found = weights_of(product("w", cast), elsewhere("half", 64, 32, dtype=TensorProto.FLOAT16))
    assert found == Weights((Layer(64, 32, 4 * 64 * 32),), other=0)


def test_a_weight_that_two_layers_share_counts_once() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    assert weights_of(nodes, elsewhere("w", 64, 64)).total == 4 * 64 * 64


def test_8_bit_weights_stay_narrow_where_the_other_side_is_8_bit_too() -> None:
    weight = helper.make_node("DequantizeLinear", ["q", "scale"], ["w"], axis=1)
    narrow = [
        helper.make_node("QuantizeLinear", ["x", "step", "none"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "step"], ["xd"]),
    ]
    parts = (elsewhere("q", 64, 32, dtype=TensorProto.INT8), elsewhere("scale", 32), scalar("step"))
    zero = numpy_helper.from_array(np.array(0, np.int8), "none")
    both = weights_of(product("w", weight, *narrow, x="xd"), *parts, zero)
    assert (both.narrow, both.linear) == (64 * 32 + 4 * 32, 0)
    alone = weights_of(product("w", weight), *parts[:2])
    assert (alone.narrow, alone.linear) == (0, 4 * 64 * 32)


def test_4_bit_weights_count_half_a_byte_and_their_scales_however_they_are_moved() -> None:
    weight = [
        helper.make_node("DequantizeLinear", ["q", "scale"], ["rows"], axis=0, block_size=16),
        helper.make_node("Transpose", ["rows"], ["w"], perm=[0, 1]),
    ]
    found = weights_of(product("w", *weight), elsewhere("q", 64, 31, dtype=TensorProto.INT4), elsewhere("scale", 4, 31))
    assert found == Weights((Layer(64, 31, 64 * 31 // 2 + 4 * 4 * 31, narrow=True),), other=0)


def test_a_tensor_lives_until_its_last_use_and_views_take_no_memory(random: np.random.Generator) -> None:
    size = int(random.integers(3, 30))
    nodes = [
        helper.make_node("Relu", ["x"], ["kept"]),
        helper.make_node("Reshape", ["kept", "flat"], ["view"]),
        helper.make_node("Relu", ["view"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Reshape", ["b", "back"], ["c"]),
        helper.make_node("Add", ["c", "kept"], ["y"]),
    ]
    shapes = [
        numpy_helper.from_array(np.array(shape, np.int64), name) for name, shape in (("flat", [-1]), ("back", [4, -1]))
    ]
    graph = graph_at(model_of(nodes, {"x": [4, size]}, ["y"], *shapes), {"x": (4, size)})
    assert activation_bytes(graph) == 3 * 4 * 4 * size  # kept, a and b


def test_scores_of_attention_are_counted_although_no_tensor_has_them() -> None:
    attention = helper.make_node("Attention", ["q", "k", "v"], ["a"])
    shapes = {"q": (1, 6, 50, 8), "k": (1, 2, 70, 8), "v": (1, 2, 70, 8)}
    model = model_of([attention, helper.make_node("Relu", ["a"], ["y"])], {key: [*s] for key, s in shapes.items()}, "y")
    a, scores = 4 * 6 * 50 * 8, 2 * 4 * 6 * 50 * 70
    assert activation_bytes(graph_at(model, shapes)) == a + scores


def test_more_frames_and_more_tokens_take_more(demo: Bundle) -> None:
    small, frames, tokens, batch = (
        demo_estimate(demo, **sizes)
        for sizes in ({"frames": 8, "tokens": 200}, {"tokens": 200}, {"frames": 8}, {"batch": 12})
    )
    assert small.features < frames.features and small.stages[1].activations < frames.stages[1].activations
    assert small.stages[3].cache < tokens.stages[3].cache and small.stages[3].activations < tokens.stages[3].activations
    assert small.stages[0].activations < batch.stages[0].activations
    assert max(small.together, small.one_by_one) < min(frames.together, tokens.together, batch.together)


def test_the_cache_is_held_once_where_it_is_written_in_place(demo: Bundle) -> None:
    manifest = demo.manifest
    tensors = 2 * manifest.layers * manifest.heads_kv * manifest.head_dim * 4 * manifest.context
    assert demo_estimate(demo, "10.3").stages[3].cache == 2 * tensors
    assert demo_estimate(demo, "11.4").stages[3].cache == tensors


@pytest.mark.parametrize("name", ["demo-float", "demo"])
def test_weights_of_the_demo_are_those_of_its_files(name: str) -> None:
    bundle = Bundle.open(name)
    ranges = ranges_of(bundle.manifest, BuildOptions())
    stages = lowered_stages(bundle, STAGES, release_of("10.3"), ranges, plugin=True)
    for stage in estimate(bundle.manifest, stages.values(), ranges, None).stages:
        weights, file = stage.weights, bundle.manifest.files[f"{stage.stage}.onnx.data"].size
        stored = weights.narrow + (weights.linear + weights.other) / 2  # floats are stored in 16 bits
        assert stored == pytest.approx(file, rel=0.06), stage
        assert bool(weights.narrow) == (name == "demo")


@pytest.mark.parametrize("fixture", FIXTURES, ids=str)
def test_sizes_of_every_familys_tensors_can_be_told(fixture: Fixture, export_bundle: Callable[..., Path]) -> None:
    bundle = Bundle.open(export_bundle(fixture.name, linvt="none", **fixture.options))
    manifest = bundle.manifest
    ranges = ranges_of(manifest, BuildOptions(most={"tokens": min(1024, manifest.context)}))
    for version in RELEASES:
        stages = lowered_stages(bundle, manifest.stages, release_of(version), ranges, plugin=True)
        found = estimate(manifest, stages.values(), ranges, None)
        for stage in found.stages:
            stored = sum(spec.size for file, spec in manifest.files.items() if file == f"{stage.stage}.onnx.data")
            assert stage.weights.total >= 0.9 * stored, stage
            assert min(stage.activations, stage.buffers) > 0


def test_a_decoder_of_7_billion_parameters_has_their_weights() -> None:
    width, inner, heads_kv, vocabulary, layers = 3584, 18944, 512, 152064, 28
    shapes = [(width, width), (width, heads_kv), (width, heads_kv), (width, inner), (width, inner)]
    nodes, weights, row = [], [], "x"
    for layer in range(layers):
        for index, shape in enumerate(shapes):
            weights.append(elsewhere(f"{layer}.{index}", *shape, dtype=TensorProto.FLOAT16))
            nodes.append(helper.make_node("MatMul", [row, f"{layer}.{index}"], [f"{layer}.{index}.out"]))
        weights.append(elsewhere(f"{layer}.down", inner, width, dtype=TensorProto.FLOAT16))
        nodes.append(helper.make_node("MatMul", [f"{layer}.4.out", f"{layer}.down"], [f"{layer}.down.out"]))
        row = f"{layer}.down.out"
    weights.append(elsewhere("head", width, vocabulary, dtype=TensorProto.FLOAT16))
    nodes.append(helper.make_node("MatMul", [row, "head"], ["logits"]))
    model = model_of(nodes, {"x": ["rows", width]}, ["logits"], *weights)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    found = engine_weights(graph_at(model, {"x": (1, width)}))
    parameters = layers * (width * width + 2 * width * heads_kv + 3 * width * inner) + width * vocabulary
    assert (found.linear, found.total) == (2 * parameters, 2 * parameters)
    print(f"{parameters / 1e9:.2f} billion parameters, {found.total / 2**30:.2f} GiB")


def synthetic(random: np.random.Generator) -> Estimate:
    stages = tuple(
        StageMemory(name, Weights((Layer(2, 3, sizes.pop()),), sizes.pop()), *sizes)
        for name in STAGES
        for sizes in [[int(random.integers(1, 200) * MIB) for _ in range(4)]]
    )
    return Estimate(stages, features=5 * MIB, workspace=7 * MIB)


def test_engines_together_share_their_scratch_memory_and_one_by_one_only_the_largest_counts(
    random: np.random.Generator,
) -> None:
    found = synthetic(random)
    kept = [stage.weights.linear + stage.weights.other + stage.buffers for stage in found.stages]
    scratch = [stage.activations + 7 * MIB for stage in found.stages]
    assert found.together == sum(kept) + max(scratch) + 5 * MIB
    assert found.one_by_one == max(a + b for a, b in zip(kept, scratch, strict=True)) + 5 * MIB
    assert found.building(found.stages[0]) == (2 * found.stages[0].weights.total, scratch[0] + found.stages[0].buffers)


def test_what_fits_depends_on_whose_memory_it_is(random: np.random.Generator) -> None:
    found = synthetic(random)
    building = [found.building(stage) for stage in found.stages]
    plenty = max(found.together, *map(sum, building))
    assert fits(found, Room(plenty, unified=True)) == "together"
    device, host = max(found.together, *(device for _, device in building)), max(host for host, _ in building)
    assert fits(found, Room(device, host)) == "together"
    assert fits(found, Room(device, host - 1)) is None
    assert fits(found, Room(device)) == "together"  # the host's memory is not known
    largest = max(map(sum, building))
    assert fits(found, Room(largest - 1, unified=True)) is None
    if largest > found.one_by_one:
        assert fits(found, Room(largest - 1, unified=True, swap=2 * MIB)) is not None


def test_engines_that_fit_one_at_a_time_only_are_said_to(demo: Bundle) -> None:
    found = demo_estimate(demo)
    assert fits(found, Room(found.together - 1)) == "one by one"
    assert fits(found, Room(found.one_by_one - 1)) is None


@pytest.mark.parametrize("share", [0.99, 0.9, 0.7, 0.5, 0.3, 0.1])
def test_every_suggestion_makes_the_estimate_fit(demo: Bundle, share: float) -> None:
    ranges = ranges_of(demo.manifest, BuildOptions())
    stages = lowered_stages(demo, STAGES, release_of("10.3"), ranges, plugin=True)

    def estimated(other: Ranges, wide: bool = False) -> Estimate:
        return estimate(demo.manifest, stages.values(), other, MIB, wide=wide)

    room = Room(int(estimated(ranges).one_by_one * share))
    advice = suggestion(changes(Asked(demo.manifest, BuildOptions(workspace=1), ranges, estimated)), room)
    print(advice)
    if found := re.search(r"--max (\S+)", advice):
        asked = ranges_of(demo.manifest, BuildOptions(most=numbers(found.group(1))))
        less = estimated(asked)
        assert less.one_by_one < estimated(ranges).one_by_one
        if advice.startswith("give"):
            assert fits(less, room) == ("one by one" if "--low-memory" in advice else "together")
    else:
        assert "float16" in advice or "int8" in advice or "int4" in advice or advice.startswith("no smaller")


def test_where_nothing_helps_that_is_said(demo: Bundle) -> None:
    ranges = ranges_of(demo.manifest, BuildOptions())
    stages = lowered_stages(demo, STAGES, release_of("10.3"), ranges, plugin=True)
    asked = Asked(
        demo.manifest,
        BuildOptions(),
        ranges,
        lambda other, wide: estimate(demo.manifest, stages.values(), other, None, wide=wide),
    )
    assert suggestion(changes(asked), Room(MIB)).startswith("no smaller size, workspace, float16, INT8 or INT4")


def test_a_quantised_bundle_is_told_of_no_16_bits_and_of_nothing_that_it_is_already() -> None:
    bundle = Bundle.open("demo")
    ranges = ranges_of(bundle.manifest, BuildOptions())
    stages = lowered_stages(bundle, STAGES, release_of("10.3"), ranges, plugin=True)
    asked = Asked(
        bundle.manifest,
        BuildOptions(),
        ranges,
        lambda other, wide: estimate(bundle.manifest, stages.values(), other, None, wide=wide),
    )
    assert {change.precision for change in changes(asked)} == {"", "INT4"}


def test_the_memory_of_a_jetson_is_what_linux_would_give() -> None:
    orin = Device("Orin", (8, 7), 8, 8 << 30, integrated=True, cuda=(12, 6))
    room = room_of(orin, 1 << 30, None)
    assert room.unified and (1 << 30) <= room.device <= 8 << 30
    assert room_of(orin, 1 << 30, 512 * MIB).device == 512 * MIB
    desktop = room_of(replace(orin, integrated=False), 1 << 30, None)
    assert not desktop.unified and desktop.device == 1 << 30
