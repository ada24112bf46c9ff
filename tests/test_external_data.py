"""A graph may keep weights only in files that its bundle lists, however the graph spells their names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from runtime.external_data import external_files
from tests.bundles import forge, refusal


def graph_with_weights_in(location: str, *, inside_a_node: bool = False) -> bytes:
    """A graph of one tensor that lies elsewhere."""
    tensor = onnx.TensorProto(name="w", dims=[4], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    output = onnx.helper.make_tensor_value_info("tokens", 1, [4])
    nodes = [onnx.helper.make_node("Identity", ["w"], ["tokens"])]
    if inside_a_node:
        nodes.insert(0, onnx.helper.make_node("Constant", [], ["w"]))
        nodes[0].attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
    graph = onnx.helper.make_graph(nodes, "g", [], [output], [] if inside_a_node else [tensor])
    data: bytes = onnx.helper.make_model(graph, ir_version=10).SerializeToString()
    return data


@pytest.mark.parametrize("inside_a_node", [False, True])
@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "unlisted", "*/_ORT_MEM_ADDR_/*"])
def test_weights_in_a_file_that_is_not_listed(
    linvt_bundle: Path, tmp_path: Path, location: str, inside_a_node: bool
) -> None:
    graph = graph_with_weights_in(location, inside_a_node=inside_a_node)
    bundle = forge(linvt_bundle, tmp_path / "bundle", vision__onnx=graph)
    (tmp_path / "secret").write_bytes(bytes(16))
    (bundle / "unlisted").write_bytes(bytes(16))
    assert f"vision.onnx keeps weights in {location!r}, which bundle.json does not list" in refusal(bundle)


def test_exported_graphs_name_their_own_file(linvt_bundle: Path) -> None:
    for graph in linvt_bundle.glob("*.onnx"):
        stage = graph.name.split(".")[0]  # the form for older engines shares the weights
        assert external_files(graph.read_bytes()) == {f"{stage}.onnx.data"}


def test_no_spelling_hides_a_file() -> None:
    key, value = b"\x0a\x08location", b"\x12\x04evil"
    odd_length = b"\x0a\x88\x00location"
    for entry in (key + value, value + key, odd_length + value, key + b"\x0a\x01x" + value, b"\x18\x05" + key + value):
        tensor = b"\x6a" + bytes([len(entry)]) + entry
        graph = b"\x2a" + bytes([len(tensor)]) + tensor
        assert external_files(b"\x3a" + bytes([len(graph)]) + graph) == {"evil"}


def test_any_bytes_are_read_or_refused_with_a_value_error(linvt_bundle: Path) -> None:
    rng = np.random.default_rng()
    whole = np.frombuffer((linvt_bundle / "refine.onnx").read_bytes()[:3000], np.uint8)
    for _ in range(50):
        broken = whole.copy()
        broken[rng.integers(0, whole.size, 5)] = rng.integers(0, 256, 5)
        try:
            external_files(broken.tobytes())
        except ValueError as error:
            assert str(error)
