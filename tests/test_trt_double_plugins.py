"""The double builds and runs the project's plugins through their own code, whichever kind a release takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from export.lower import release_of, write_lowered
from kernels.ptx import SHIPPED, read_index
from kernels.register import register
from kernels.spec import gather_pool
from runtime.bundle import Bundle
from tests.trt.bindings import VERSIONS, run_with
from tests.trt.double import Double
from tests.trt.driver_calls import Launch
from tests.trt.expressions import evaluate
from tests.trt.gather_kernel import compute
from tests.trt.memory import Memory
from tests.trt.play import Machine

SM = {"10.3.0": (8, 7), "10.13.3.9": (11, 0)}  # Orin, Thor; others are desktops


def refine(version: str, folder: Path, *, plugin: bool = True) -> tuple[Path, Bundle, dict[str, Any]]:
    """The demo's SVR lowered for a version, its bundle, and a profile."""
    bundle = Bundle.open("demo-float")
    lowered = write_lowered(bundle.folder, "refine.onnx", release_of(version), folder, plugin=plugin)
    size = bundle.manifest.stages["refine"].inputs[0].shape[2:]
    return lowered, bundle, {"tokens": tuple((1, frames, *size) for frames in (3, 4, 8))}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_stage_with_the_plugin_equals_onnx_runtime(version: str, tmp_path: Path, random: np.random.Generator) -> None:
    sm = SM.get(version, (8, 9))
    with Double(version, sm=sm, cuda="13.5.0" if sm > (9, 0) else "12.9.10") as double:
        machine, registered = Machine(double), register(sm)
        assert registered.kind == ("v3" if version == "10.3.0" else "aot")
        lowered, bundle, profile = refine(version, tmp_path)
        context = machine.engine(lowered, profile).create_execution_context()
        (plugin,) = double.builds[-1][2].plugins
        assert plugin["kind"] == registered.kind
        session = onnxruntime.InferenceSession(str(bundle.path("refine.onnx")))
        for frames in (8, 3):
            feeds = {"tokens": random.standard_normal((1, frames, *profile["tokens"][0][2:]), dtype=np.float32)}
            found = machine.run(context, feeds)
            for output, value in zip(session.get_outputs(), session.run(None, feeds), strict=True):
                np.testing.assert_allclose(found[output.name], value, atol=1e-5 * max(np.abs(value).max(), 1))
        assert len(double.launches) == 2
        del context
        machine.close()
        assert double.leaks() == []


def test_an_engine_that_holds_its_kernel_runs_without_the_plugin_and_the_other_kind_does_not(tmp_path: Path) -> None:
    for version, runs in (("10.3.0", False), ("10.9.0.34", True)):
        with Double(version) as double:
            machine = Machine(double)
            register((8, 7))
            lowered, _, profile = refine(version, tmp_path)
            data = bytes(machine.build(lowered, profile))
        with Double(version) as double:
            machine = Machine(double)
            engine = machine.trt.Runtime(machine.logger).deserialize_cuda_engine(data)
            assert (engine is not None) is runs
            if not runs:
                assert "Cannot find plugin" in machine.lines[-1][1]
                register((8, 7))
                assert machine.trt.Runtime(machine.logger).deserialize_cuda_engine(data) is not None


def test_the_plugin_is_captured_in_a_graph(tmp_path: Path, random: np.random.Generator) -> None:
    for version in ("10.3.0", "11.4.0.106"):
        with Double(version) as double:
            machine = Machine(double)
            register((8, 7))
            lowered, bundle, profile = refine(version, tmp_path)
            context = machine.engine(lowered, profile).create_execution_context()
            shape = profile["tokens"][1]
            context.set_input_shape("tokens", shape)
            addresses = {"tokens": machine.memory(int(np.prod(shape)) * 4)}
            outputs = [machine.trt.TensorIOMode.OUTPUT]
            engine = context.engine
            for index in range(engine.num_io_tensors):
                name = engine.get_tensor_name(index)
                if engine.get_tensor_mode(name) in outputs:
                    addresses[name] = machine.memory(int(np.prod(tuple(context.get_tensor_shape(name)))) * 8)
            for name, address in addresses.items():
                context.set_tensor_address(name, address)
            machine.write(addresses["tokens"], np.zeros(shape, np.float32))
            assert context.execute_async_v3(machine.stream)
            launch = machine.captured(lambda: context.execute_async_v3(machine.stream))  # noqa: B023
            feeds = {"tokens": random.standard_normal(shape, dtype=np.float32)}
            machine.write(addresses["tokens"], feeds["tokens"])
            launch()
            machine.finish()
            expected = onnxruntime.InferenceSession(str(bundle.path("refine.onnx"))).run(["visual"], feeds)[0]
            found = machine.peek(addresses["visual"], expected.shape)
            np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_without_a_plugin_the_function_body_is_built(tmp_path: Path) -> None:
    for version in VERSIONS:
        with Double(version) as double:
            machine = Machine(double)
            lowered, _, profile = refine(version, tmp_path, plugin=False)
            machine.engine(lowered, profile)
            assert double.builds[-1][2].plugins == ()


def test_a_plugin_whose_types_do_not_fit_is_not_built(tmp_path: Path) -> None:
    with Double("10.3.0") as double:
        machine = Machine(double)
        register((8, 7))
        lowered, _, profile = refine("10.3.0", tmp_path)
        creator = double.registry.find("GatherPool", "1", "linvt")
        create = type(creator).create_plugin

        def stubborn(*args: Any) -> Any:
            made = create(*args)
            made.supports_format_combination = lambda pos, in_out, num_inputs: pos == 0
            return made

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(creator), "create_plugin", stubborn)
            assert machine.build(lowered, profile) is None
        assert "supported formats" in machine.lines[-1][1]


def test_a_plugin_is_registered_once_under_its_name() -> None:
    with Double("10.3.0") as double:
        trt = double.trt

        class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.IPluginCreatorV3One.__init__(self)
                self.name, self.plugin_version, self.plugin_namespace = "Thing", "1", "ours"

        first, registry = Creator(), trt.get_plugin_registry()
        assert registry.register_creator(first, "ours") and not registry.register_creator(Creator(), "ours")
        assert registry.get_creator("Thing", "1", "ours") is first
        assert registry.get_creator("Thing", "2", "ours") is None
        assert registry.deregister_creator(first) and registry.get_creator("Thing", "1", "ours") is None


FIELD = """
import numpy as np, tensorrt as trt
field = trt.PluginField("scales", np.array([5, 6, 7], np.int32), trt.PluginFieldType.INT32)
print(field.name, field.size, field.data.tolist())
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_a_plugin_field_gives_what_the_real_one_gives_which_is_not_always_its_values(version: str) -> None:
    real = run_with(version, FIELD).stdout
    with Double(version) as double:
        kind = double.trt.PluginFieldType.INT32
        field = double.trt.PluginField("scales", np.array([5, 6, 7], np.int32), kind)
        assert f"{field.name} {field.size} {field.data.tolist()}\n" == real


def test_trees_of_sizes_are_evaluated() -> None:
    tree = ["SUM", ["FLOOR_DIV", ["dim", 1, 0], 2], ["CEIL_DIV", ["dim", 0, 1], ["MAX", 3, ["dim", 1, 0]]]]
    assert evaluate(tree, [(4, 11), (7,)]) == 7 // 2 + 2


@pytest.mark.parametrize("fault", ["none", "grid", "threads", "shared", "length"])
def test_the_kernel_s_stand_in_checks_its_launch(fault: str, random: np.random.Generator) -> None:
    entry = next(e for e in read_index(SHIPPED).kernels if e.dtype == "float32")
    memory = Memory(1 << 20, integrated=False)
    tokens, indices = random.standard_normal((2, 9, 40), np.float32), random.integers(0, 9, (2, 8))
    expected = gather_pool(tokens, indices, entry.scales)
    blocks = [memory.allocate(array.nbytes, "device", "test") for array in (tokens, indices, expected)]
    assert all(blocks)
    for block, array in zip(blocks, (tokens, indices), strict=False):
        block.data[:] = array.reshape(-1).view(np.uint8)
    grid = entry.layout.grid(2, 8, 40)
    launch = Launch(
        entry=entry.entry,
        grid=(grid[0] + (fault == "grid"), *grid[1:]),
        block=(32 * entry.layout.warps * (1 + (fault == "threads")), 1, 1),
        shared=entry.shared + (fault == "shared"),
        arguments=(blocks[0].address, blocks[1].address, 9 + (fault == "length"), 8, 40, blocks[2].address),
        memory=memory,
        image=b"",
    )
    if fault != "none":
        with pytest.raises(AssertionError):
            compute(launch, entry)
        return
    compute(launch, entry)
    np.testing.assert_array_equal(blocks[2].data.view(np.float32).reshape(expected.shape), expected)


def test_an_unknown_domain_is_refused_by_name(tmp_path: Path) -> None:
    lowered, _, _ = refine("10.3.0", tmp_path)
    assert not onnx.load(lowered, load_external_data=False).functions  # older parsers would take the body
    with Double("10.3.0") as double:
        parser = Machine(double).parser()
        assert not parser.parse_from_file(str(lowered)) and "Plugin not found" in parser.get_error(0).desc()
