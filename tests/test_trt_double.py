"""The double of TensorRT has the real surface, parses and builds as TensorRT does, and refuses what it would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from runtime.bundle import Bundle
from tests import trt_fixtures
from tests.trt.bindings import VERSIONS, run_with
from tests.trt.claims import answers
from tests.trt.double import Double
from tests.trt.play import Machine
from tests.trt.small import SHAPES, graph

BOTH = ("10.3.0", "11.4.0.106")
CLAIMS = Path(__file__).parent / "trt" / "claims.py"

machine = trt_fixtures.machine


@pytest.mark.parametrize("version", VERSIONS)
def test_what_needs_no_libraries_is_answered_as_by_the_real_bindings(version: str) -> None:
    real = run_with(version, CLAIMS)
    assert real.returncode == 0, real.stderr
    expected = [line for line in real.stdout.splitlines() if "  ->  " in line]
    assert len(expected) > 50
    with Double(version) as double:
        assert answers(double.trt) == expected


def test_names_and_arguments_that_tensorrt_lacks_are_refused(machine: Machine) -> None:
    trt, logger = machine.trt, machine.logger
    builder = trt.Builder(logger)
    with pytest.raises(AttributeError):
        trt.Bilder  # noqa: B018
    with pytest.raises(AttributeError):
        builder.build_cuda_engine  # noqa: B018
    with pytest.raises(AttributeError):
        builder.max_workspace_size = 1
    with pytest.raises(TypeError, match="incompatible"):
        builder.create_network("strong")
    with pytest.raises(TypeError, match="incompatible"):
        builder.create_network(flag=1)
    with pytest.raises(TypeError, match="incompatible"):
        trt.Builder(None, None)
    with pytest.raises(TypeError, match="No constructor"):
        trt.IBuilderConfig()
    with pytest.raises(TypeError, match="incompatible"):
        trt.OnnxParser(machine.network(), logger).parse_from_file(Path("a"))  # a path is no str


def test_what_only_one_version_has_only_that_version_s_double_has() -> None:
    for version, newest in zip(BOTH, (False, True), strict=True):
        with Double(version) as double:
            assert hasattr(double.trt.BuilderFlag, "FP16") is not newest
            assert hasattr(double.trt.ICudaEngine, "get_aliased_input_tensor") is newest
            assert hasattr(double.trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH") is not newest


def test_enums_and_shapes_have_the_traps_of_the_real_ones(machine: Machine) -> None:
    trt = machine.trt
    assert trt.DataType.FLOAT != 0 and int(trt.DataType.FLOAT) == 0 and trt.float32 == trt.DataType.FLOAT
    assert str(trt.BuilderFlag.TF32) == "BuilderFlag.TF32" and trt.BuilderFlag.TF32.name == "TF32"
    shape = trt.Dims((2, 3))
    assert tuple(shape) == (2, 3) and shape == (2, 3) and len(shape) == 2 and shape[1] == 3
    with pytest.raises(TypeError):
        assert shape == trt.Dims((2, 3))


def test_a_class_whose_bases_were_not_initialised_is_refused(machine: Machine) -> None:
    class Silent(machine.trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            pass

        def log(self, severity: Any, msg: str) -> None:
            pass

    with pytest.raises(TypeError, match="must be called"):
        Silent()

    class Half(machine.trt.IPluginV3, machine.trt.IPluginV3OneCore):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            machine.trt.IPluginV3.__init__(self)

    with pytest.raises(TypeError, match="must be called"):  # the bindings of 10.3 crash
        Half()


def test_a_weakly_typed_network_is_an_assertion_where_there_is_such_a_thing() -> None:
    with Double("10.3.0") as double, pytest.raises(AssertionError, match="strongly typed"):
        Machine(double).builder.create_network(0)
    with Double("11.4.0.106") as double:
        Machine(double).builder.create_network(0)


def test_flags_of_another_version_are_an_assertion() -> None:
    with Double("11.4.0.106") as double, pytest.raises(AssertionError, match="not of this version"):
        Machine(double).builder.create_network(1 << 5)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda path: graph(path, "Attention"), "no importer registered"),
        (lambda path: graph(path, "GatherPool", domain="linvt"), "Plugin not found"),
        (lambda path: path.write_bytes(b"\xff nothing"), "Failed to parse"),
        (lambda path: path.unlink(), "Failed to open"),
    ],
    ids=["operator", "plugin", "garbage", "missing"],
)
def test_the_parser_says_what_it_refuses(tmp_path: Path, change: Callable[[Path], object], reason: str) -> None:
    path = graph(tmp_path / "small.onnx")
    change(path)
    with Double("10.3.0") as double:
        machine = Machine(double)
        parser = machine.parser()
        assert parser.parse_from_file(str(path)) is False
        assert parser.num_errors == 1 and reason in parser.get_error(0).desc()
        assert any(severity == "ERROR" and reason in text for severity, text in machine.lines)


def test_the_parser_refuses_what_it_is_told_to(machine: Machine, tmp_path: Path) -> None:
    machine.double.refuse["MatMul"] = "no MatMul today"
    parser = machine.parser()
    assert not parser.parse_from_file(str(graph(tmp_path / "small.onnx")))
    error = parser.get_error(0)
    assert (error.desc(), error.node_name(), error.node_operator()) == ("no MatMul today", "product", "MatMul")
    with pytest.raises(AttributeError):
        error.reason  # noqa: B018


def test_operators_of_later_releases_are_taken_by_later_releases(tmp_path: Path) -> None:
    bundle = Bundle.open("demo-float")
    for version in VERSIONS:
        with Double(version) as double:
            taken = Machine(double).parser().parse_from_file(str(bundle.path("decode.onnx")))
            assert taken is (double.release >= (10, 15))


def test_external_weights_are_found_beside_the_graph(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    path = graph(tmp_path / "far" / "small.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.data", size_threshold=0)
    near = tmp_path / "near"
    near.mkdir()
    (near / "small.onnx").write_bytes(path.read_bytes())
    assert not machine.parser().parse_from_file(str(near / "small.onnx"))
    (near / "w.data").symlink_to(tmp_path / "far" / "w.data")
    engine = machine.engine(near / "small.onnx", SHAPES)
    found = machine.run(engine.create_execution_context(), {"x": np.eye(4, dtype=np.float32)})
    np.testing.assert_array_equal(found["y"], np.arange(12).reshape(4, 3))


@pytest.mark.parametrize(
    "shapes, reason",
    [
        ({}, "no optimization profile"),
        ({"z": ((1, 4), (2, 4), (8, 4))}, "x has no shapes"),
        ({"x": ((1, 5), (2, 5), (8, 5))}, "the network"),
        ({"x": ((1, 4, 1), (2, 4, 1), (8, 4, 1))}, "the network"),
    ],
    ids=["none", "other", "size", "rank"],
)
def test_a_build_without_fitting_profiles_gives_nothing_and_says_why(
    machine: Machine, tmp_path: Path, shapes: Any, reason: str
) -> None:
    assert machine.build(graph(tmp_path / "small.onnx"), shapes) is None
    assert reason in machine.lines[-1][1]


@pytest.mark.parametrize("shapes", [((2, 4), (1, 4), (8, 4)), ((1, 4), (9, 4), (8, 4)), ((1, 4), (2, 4), (8,))])
def test_a_profile_out_of_order_is_refused_at_once(machine: Machine, shapes: Any) -> None:
    with pytest.raises(RuntimeError, match="inconsistent"):
        machine.builder.create_optimization_profile().set_shape("x", *shapes)


def test_a_build_fails_when_it_is_told_to_and_when_its_monitor_says_no(machine: Machine, tmp_path: Path) -> None:
    path, steps = graph(tmp_path / "small.onnx"), []

    class Monitor(machine.trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self, lets: bool) -> None:
            machine.trt.IProgressMonitor.__init__(self)
            self.lets = lets

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            steps.append(num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self.lets

        def phase_finish(self, phase_name: str) -> None:
            steps.append(-1)

    assert machine.build(path, SHAPES, progress_monitor=Monitor(True)) is not None and steps == [1, -1]
    assert machine.build(path, SHAPES, progress_monitor=Monitor(False)) is None and "cancelled" in machine.lines[-1][1]
    machine.double.fail_build = "out of tactics"
    assert machine.build(path, SHAPES) is None and "out of tactics" in machine.lines[-1][1]


def test_a_precision_flag_is_refused_for_a_strongly_typed_network(tmp_path: Path) -> None:
    with Double("10.3.0") as double:
        machine = Machine(double)
        config = machine.builder.create_builder_config()
        config.set_flag(machine.trt.BuilderFlag.FP16)
        assert machine.build(graph(tmp_path / "small.onnx", rows=2), {}, config=config) is None
        assert "FP16" in machine.lines[-1][1]


def test_timing_caches_are_kept_combined_and_refused_when_foreign(machine: Machine, tmp_path: Path) -> None:
    config = machine.builder.create_builder_config()
    cache = config.create_timing_cache(b"")
    empty = bytes(cache.serialize())
    assert config.set_timing_cache(cache, False)
    assert machine.build(graph(tmp_path / "small.onnx"), SHAPES, config=config) is not None
    filled = bytes(config.get_timing_cache().serialize())
    assert len(filled) > len(empty)
    other = machine.builder.create_builder_config().create_timing_cache(empty)
    assert other.combine(config.create_timing_cache(filled), False) and bytes(other.serialize()) == filled
    assert config.create_timing_cache(b"no cache") is None
    with Double(machine.double.version, sm=(9, 0)) as elsewhere:
        config = Machine(elsewhere).builder.create_builder_config()
        foreign = config.create_timing_cache(filled)
        assert not config.set_timing_cache(foreign, False)


def test_every_call_is_recorded_with_its_arguments(machine: Machine, tmp_path: Path) -> None:
    machine.build(graph(tmp_path / "small.onnx"), SHAPES)
    calls = {call.name: call.arguments for call in machine.double.calls}
    assert calls["IOptimizationProfile.set_shape"] == {
        "input": "x",
        **dict(zip(("min", "opt", "max"), SHAPES["x"], strict=True)),
    }
    assert calls["OnnxParser.parse_from_file"] == {"model": str(tmp_path / "small.onnx")}


def test_a_network_is_parsed_into_once(machine: Machine, tmp_path: Path) -> None:
    path, parser = str(graph(tmp_path / "small.onnx")), machine.parser()
    assert parser.parse_from_file(path)
    with pytest.raises(AssertionError, match="twice"):
        parser.parse_from_file(path)


@pytest.mark.parametrize("version", ["10.16.1.11", "11.4.0.106"])
def test_attention_without_a_fused_kernel_is_built_where_it_may_be_decomposed(version: str, tmp_path: Path) -> None:
    path = Bundle.open("demo-float").path("vision.onnx")
    with Double(version) as double:
        machine = Machine(double)
        network, config = machine.network(), machine.builder.create_builder_config()
        assert machine.trt.OnnxParser(network, machine.logger).parse_from_file(str(path))
        profile = machine.builder.create_optimization_profile()
        profile.set_shape("pixel_values", *([frames, *tuple(network.get_input(0).shape)[1:]] for frames in (1, 2, 4)))
        config.add_optimization_profile(profile)
        double.fuses_attention = False
        assert machine.builder.build_serialized_network(network, config) is None
        for layer in (network.get_layer(index) for index in range(network.num_layers)):
            if layer.type == machine.trt.LayerType.ATTENTION_INPUT:
                assert type(layer) is machine.trt.ILayer and not hasattr(layer, "attention")
                layer.__class__ = machine.trt.IAttentionInputLayer
                layer.attention.decomposable = True
        assert machine.builder.build_serialized_network(network, config) is not None
