"""A check says "ok" of graphs alone that compute a stage: what the runtime would not open is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import export.build
import export.check
from export.lower.read import read_graph, read_stage
from runtime.bundle import Bundle
from runtime.errors import BundleError, LinvtError
from tests.bundles import forge, refusal
from tests.commands import Captured, refused

FLOAT = Path(__file__).parent.parent / "runtime" / "demo" / "float"

Edit = Callable[[onnx.ModelProto], object]


def graph(stage: str, edit: Edit) -> bytes:
    """One of the demo's graphs, altered."""
    model = onnx.load(FLOAT / f"{stage}.onnx", load_external_data=False)
    edit(model)
    return bytes(model.SerializeToString())


def weight(model: onnx.ModelProto) -> TensorProto:
    """A tensor that lies in a file."""
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def place(tensor: TensorProto, **entries: object) -> None:
    """Alter where a tensor lies."""
    for key, value in entries.items():
        next(entry for entry in tensor.external_data if entry.key == key).value = str(value)


def outside(name: str) -> TensorProto:
    """One number that lies far behind the end of the demo's file of weights."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "vision.onnx.data", "offset": 2**40, "length": 4}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def add_body(model: onnx.ModelProto) -> None:
    """A function whose body holds such a number."""
    body = [
        helper.make_node("Constant", [], ["far"], value=outside("far")),
        helper.make_node("Add", ["x", "far"], ["y"], name="inside"),
    ]
    opsets = [helper.make_opsetid("", 24)]
    model.functions.append(helper.make_function("own", "Far", ["x"], ["y"], body, opsets))
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node.append(helper.make_node("Far", ["tokens"], ["moved"], domain="own"))


def kind(value: onnx.ValueInfoProto) -> onnx.TypeProto.Tensor:
    return value.type.tensor_type


def resize(model: onnx.ModelProto) -> None:
    kind(model.graph.output[0]).shape.dim[2].dim_value += 8


def lose_an_axis(model: onnx.ModelProto) -> None:
    del kind(model.graph.input[0]).shape.dim[0]


def lose_outputs(model: onnx.ModelProto) -> None:
    del model.graph.output[:]


def lose_nodes(model: onnx.ModelProto) -> None:
    del model.graph.node[:]


def narrow(model: onnx.ModelProto) -> None:
    kind(model.graph.input[0]).elem_type = TensorProto.FLOAT16


def add_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, [1]))


def add_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("lost", TensorProto.FLOAT, [1]))


def add_reader(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Abs", ["nowhere"], ["y"], name="reader"))


def add_constant(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["far"], value=outside("far")))


def lose_the_file(model: onnx.ModelProto) -> None:
    """A key that onnx does not know: the weight names no file."""
    next(entry for entry in weight(model).external_data if entry.key == "location").key = "locatiom"


def split(model: onnx.ModelProto) -> None:
    """In more parts than it says, of which ONNX's inference dies."""
    outputs = ["part.0", "part.1", "part.2"]
    model.graph.node.append(helper.make_node("Split", ["pixel_values"], outputs, name="split", num_outputs=2))


FAULTS: dict[str, tuple[Edit, str]] = {
    "no nodes": (lose_nodes, "found a graph without nodes, expected one that computes a stage"),
    "no outputs": (lose_outputs, "found a graph without outputs"),
    "another dtype": (
        narrow,
        "'pixel_values' is not as bundle.json says: found float16 [frames, 3, 64, 64], expected flo",
    ),
    "another size": (resize, "found float32 [frames, 16, 168], expected float32 [frames, 16, 160]"),
    "another rank": (lose_an_axis, "found float32 [3, 64, 64], expected float32 [frames, 3, 64, 64]"),
    "one input more": (add_input, "'mask' is not as bundle.json says: found bool [1], expected no such input"),
    "an output of no node": (add_output, "found no node that gives its output 'lost'"),
    "an input of no node": (add_reader, "Abs reader reads 'nowhere': found nothing that gives it"),
    "a weight too far": (lambda model: place(weight(model), offset=1607936), "found 1607936 bytes in vision.onnx.data"),
    "a weight too short": (lambda model: place(weight(model), length=64), "found 64 bytes of the weight "),
    "a weight in no file": (lose_the_file, "found no file '', in which its weight"),
    "a part too many": (split, "Split split: found 3 outputs, expected num_outputs, which is 2"),
    "a constant too far": (add_constant, "expected 1099511627780 or more, where its weight 'far' ends"),
    "a body's too far": (add_body, "expected 1099511627780 or more, where its weight 'far' ends"),
}
UNSEEN = {"another size", "a constant too far", "a part too many"}  # ONNX Runtime infers it; drops what nobody reads


def refused_by_all(bundle: Path, capfd: Captured) -> str:
    """The line of the check, which a rehearsed build says too."""
    line = refused(capfd, [str(bundle), "--tensorrt", "10.3", "11.4"], main=export.check.main)
    built = refused(capfd, [str(bundle), "--dry-run", "--tensorrt", "10.3"], main=export.build.main)
    assert built.partition(": ")[2] == line.partition(": ")[2]
    assert line.count("\n") == 1 and line.endswith(("export the bundle again\n", "export it again\n"))
    return line


@pytest.mark.parametrize("fault", FAULTS)
def test_a_graph_that_lacks_something_is_refused_as_the_runtime_refuses_it(
    fault: str, tmp_path: Path, capfd: Captured
) -> None:
    edit, words = FAULTS[fault]
    bundle = forge(FLOAT, tmp_path / "bundle", vision__onnx=graph("vision", edit))
    line = refused_by_all(bundle, capfd)
    print(line)
    assert "vision.onnx" in line and words in line
    if fault not in UNSEEN:
        assert "vision.onnx" in refusal(bundle, LinvtError)


def test_a_file_without_a_byte_is_no_graph(tmp_path: Path, capfd: Captured) -> None:
    bundle = forge(FLOAT, tmp_path / "bundle", refine__onnx=b"")
    assert "refine.onnx: found a graph without nodes" in refused_by_all(bundle, capfd)


def test_graphs_in_each_other_s_place_are_refused(tmp_path: Path, capfd: Captured) -> None:
    vision, refine = ((FLOAT / f"{stage}.onnx").read_bytes() for stage in ("vision", "refine"))
    bundle = forge(FLOAT, tmp_path / "bundle", vision__onnx=refine, refine__onnx=vision)
    line = refused_by_all(bundle, capfd)
    assert "refine.onnx: its tensor 'pixel_values' is not as bundle.json says: found float32 [frames, 3, " in line
    assert line.endswith("expected no such input; export the bundle again\n")


@pytest.mark.parametrize("kept", [0, 1000, 1607935])
def test_weights_that_were_cut_are_refused(kept: int, tmp_path: Path, capfd: Captured) -> None:
    data = (FLOAT / "vision.onnx.data").read_bytes()
    assert len(data) == 1607936
    bundle = forge(FLOAT, tmp_path / "bundle", vision__onnx__data=data[:kept])
    assert f"found {kept} bytes in vision.onnx.data, expected " in refused_by_all(bundle, capfd)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.replace(b"node_conv2d", b"node_conv2\xff"),  # no text
        lambda data: data + b"\x42\x02\xff\xff",  # an opset that is none
    ],
)
def test_bytes_that_onnx_does_not_read_are_refused_in_one_line(
    spoil: Callable[[bytes], bytes], tmp_path: Path, capfd: Captured
) -> None:
    bundle = forge(FLOAT, tmp_path / "bundle", vision__onnx=spoil((FLOAT / "vision.onnx").read_bytes()))
    assert f"cannot read {bundle / 'vision.onnx'}: " in refused_by_all(bundle, capfd)


def test_a_dtype_that_onnx_does_not_have_is_a_problem(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["tokens"], ["odd"], name="odd", to=111)
    bundle = forge(
        FLOAT, tmp_path / "bundle", vision__onnx=graph("vision", lambda model: model.graph.node.append(node))
    )
    (line,) = export.check.check_bundle(Bundle.open(bundle), ["10.3"]).problems
    assert line.startswith("10.3 vision: graph: found 111 is not ") and "expected valid ONNX" in line


def test_a_body_of_another_opset_is_a_problem_and_not_written(tmp_path: Path, capfd: Captured) -> None:
    data = graph("refine", lambda model: setattr(model.opset_import[0], "version", 22))
    bundle, folder = forge(FLOAT, tmp_path / "bundle", refine__onnx=data), tmp_path / "lowered"
    assert export.check.main([str(bundle), "--tensorrt", "10.3", "--write", str(folder)]) == 1
    out, err = capfd.readouterr()
    assert "10.3 refine: graph: found " in out and "expected valid ONNX; export the bundle again\n" in out
    assert err == f"linvt-check: wrote aggregate, decode, vision to {folder}; refine could not be lowered\n"
    assert not (folder / "refine.onnx").exists() and (folder / "vision.onnx").is_file()


def test_any_byte_may_be_another(tmp_path: Path, random: np.random.Generator) -> None:
    whole = np.frombuffer((FLOAT / "refine.onnx").read_bytes(), np.uint8)
    for number in range(20):
        data = whole.copy()
        at = random.integers(0, data.size, random.integers(1, 5))
        data[at] = random.integers(0, 256, at.size)
        try:
            bundle = forge(FLOAT, tmp_path / str(number), refine__onnx=data.tobytes())
            export.check.check_bundle(Bundle.open(bundle), ["10.3"])
        except BundleError as error:
            assert "\n" not in str(error) and len(str(error)) < 800


def test_what_is_read_is_the_stage(random: np.random.Generator, tmp_path: Path) -> None:
    bundle = Bundle.open("demo")
    for stage, spec in bundle.manifest.stages.items():
        model = read_stage(bundle, stage)
        assert [value.name for value in model.graph.inputs] == [tensor.name for tensor in spec.inputs]
        assert read_graph(bundle.path(spec.file))[1] == {f"{spec.file}.data"}


def test_a_weight_may_end_where_its_file_ends(tmp_path: Path, random: np.random.Generator) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> net (float[B, 6] x) => (float[B, 6] y) { y = Add (x, w) }'
    model = onnx.parser.parse_model(text)
    rows = random.normal(size=(1, 6)).astype(np.float32)
    model.graph.initializer.append(ir.to_proto(ir.tensor(rows, name="w")))
    path, data = tmp_path / "net.onnx", tmp_path / "net.data"
    onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=0)
    data.write_bytes(rows.tobytes())
    assert read_graph(path)[1] == {data.name}
    data.write_bytes(rows.tobytes()[:-1])
    with pytest.raises(BundleError, match=r"found 23 bytes in net\.data, expected 24 or more"):
        read_graph(path)
    data.unlink()
    with pytest.raises(BundleError, match=r"net\.onnx: found no file 'net\.data', in which its weight 'w' should lie"):
        read_graph(path)
