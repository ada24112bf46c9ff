"""A lowered graph on disk: small, beside its bundle's weights, which are neither read nor changed."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from export.lower import lower, lowerings, release_of, write_lowered
from runtime.errors import BundleError, OutputError
from tests.lowered import OLDEST, run, share, written_session

EXACT = 1e-6  # share of the largest value


def model_of(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 24]> {text}'))


def normal(random: np.random.Generator, *shape: int) -> NDArray[Any]:
    return random.normal(size=shape).astype(np.float32)


def stored(folder: Path, random: np.random.Generator) -> tuple[Path, NDArray[np.float32]]:
    """A bundle's folder with one graph whose weight lies in a file."""
    folder.mkdir()
    weight = normal(random, 48, 48)
    model = model_of(
        "net (float[B, S, 48] x, float[48] w) => (float[B, S, 48] y) {"
        " normed = RMSNormalization (x, w) y = MatMul (normed, weight) }",
    )
    tensor = ir.tensor(weight, name="weight")
    value = ir.Value(name="weight", shape=ir.Shape([48, 48]), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    model.graph.register_initializer(value)
    model.graph[1].replace_input_with(1, value)
    ir.save(model, folder / "decode.onnx", external_data="decode.onnx.data", size_threshold_bytes=0)
    return folder, weight


def test_a_lowered_graph_lies_beside_links_to_the_weights(tmp_path: Path, random: np.random.Generator) -> None:
    bundle, weight = stored(tmp_path / "bundle", random)
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    engines = bundle / "engines"
    engines.mkdir()
    for _ in range(2):  # what an interrupted run left there is replaced
        path = write_lowered(bundle, "decode.onnx", release_of("10.3"), engines, plugin=True)
    assert path == engines / "decode.onnx"
    assert sorted(file.name for file in engines.iterdir()) == ["decode.onnx", "decode.onnx.data"]
    link = engines / "decode.onnx.data"
    assert link.is_symlink() and link.resolve() == (bundle / "decode.onnx.data").resolve()
    assert path.stat().st_size < 4096 < weight.nbytes
    assert {name: (bundle / name).read_bytes() for name in before} == before
    x, scale = normal(random, 2, 5, 48), normal(random, 48)
    found = run(written_session(bundle, "decode.onnx", tmp_path / "copied"), {"x": x, "w": scale})["y"]
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale @ weight
    assert share({"y": found}, {"y": expected}) < EXACT


def test_weights_are_not_read(tmp_path: Path, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be larger than memory; here their file is not even opened."""
    bundle, _ = stored(tmp_path / "bundle", random)
    opened, genuine = set(), builtins.open

    def watched(file: Any, *arguments: Any, **options: Any) -> Any:
        opened.add(Path(file).name if isinstance(file, str | Path) else file)
        return genuine(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", watched)
    path = write_lowered(bundle, "decode.onnx", release_of("10.3"), tmp_path, plugin=True)
    assert opened == {"decode.onnx"}
    (tensor,) = (
        tensor for tensor in onnx.load(path, load_external_data=False).graph.initializer if tensor.external_data
    )
    assert (tensor.name, tensor.data_location) == ("weight", onnx.TensorProto.EXTERNAL)
    ir.external_data.load_to_model(ir.load(bundle / "decode.onnx"))
    assert "decode.onnx.data" in opened  # which reading them would have shown


def test_a_graph_in_a_folder_has_its_weights_beside_it(tmp_path: Path, random: np.random.Generator) -> None:
    bundle, _ = stored(tmp_path / "bundle", random)
    (tmp_path / "above").mkdir()
    bundle.rename(tmp_path / "above" / "inner")
    path = write_lowered(tmp_path / "above", "inner/decode.onnx", release_of("10.3"), tmp_path / "out", plugin=False)
    assert path == tmp_path / "out" / "inner" / "decode.onnx" and path.is_file()
    assert (path.parent / "decode.onnx.data").samefile(tmp_path / "above" / "inner" / "decode.onnx.data")


def test_where_links_cannot_be_made_weights_are_copied(
    tmp_path: Path, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = stored(tmp_path / "bundle", random)

    def refuse(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    (tmp_path / "out").mkdir()
    write_lowered(bundle, "decode.onnx", release_of("10.3"), tmp_path / "out", plugin=False)
    copy = tmp_path / "out" / "decode.onnx.data"
    assert not copy.is_symlink() and copy.read_bytes() == (bundle / "decode.onnx.data").read_bytes()


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path, random: np.random.Generator) -> None:
    bundle, _ = stored(tmp_path / "bundle", random)
    release = release_of("10.3")
    with pytest.raises(BundleError, match=r"cannot read .*vision\.onnx: .*No such file"):
        write_lowered(bundle, "vision.onnx", release, tmp_path, plugin=False)
    with pytest.raises(OutputError, match=r"cannot write .*decode\.onnx: "):
        write_lowered(bundle, "decode.onnx", release, bundle / "decode.onnx.data", plugin=False)
    (bundle / "broken.onnx").write_bytes(b"\xff\xff no graph")
    with pytest.raises(BundleError, match=r"cannot read .*broken\.onnx: "):
        write_lowered(bundle, "broken.onnx", release, tmp_path, plugin=False)


def test_what_would_be_lowered_is_listed() -> None:
    model = model_of(
        "net (float[1, 3, P, 4] key, float[1, 3, S, 4] k, int64[1] at) => (float[1, 3, P, 4] new_key)"
        "{ new_key = TensorScatter (key, k, at) }"
    )
    release = release_of(OLDEST)
    assert lowerings(model, release) == ("TensorScatter", "opset 24 -> 20")
    assert lowerings(model, release_of("11.4")) == ()
    lower(model, release, plugin=False)
    assert lowerings(model, release) == ()
