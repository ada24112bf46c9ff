"""Every rule of TensorRT's parsers is broken by one fault, reported once and by node."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from calibration.trt_rules import OPERATORS, RELEASES, supports
from export.lower import lowerings, release_of
from export.lower.graph import EDITS
from export.lower.infer import infer_types
from export.lower.rules import graph_problems

ROOT = Path(__file__).parent.parent
FLOAT = ROOT / "runtime" / "demo" / "float"

Weights = dict[str, NDArray[Any]]


def problems(text: str, version: str, weights: Weights | None = None, opset: int | None = None) -> list[str]:
    """What is wrong with a graph in ONNX's text form, as it stands; nodes are called by their first output."""
    release = release_of(version)
    header = f'<ir_version: 10, opset_import: ["" : {opset or release.opset}, "linvt" : 1, "com.microsoft" : 1]>\n'
    proto = onnx.parser.parse_model(f"{header}{text}")
    proto.graph.initializer.extend(ir.to_proto(ir.tensor(array, name=name)) for name, array in (weights or {}).items())
    model = ir.from_proto(proto)
    for node in model.graph:
        node.name = node.outputs[0].name
    infer_types(model)
    return list(graph_problems(model, release))


# --- one fault, one problem

INPUTS = (
    "net (float[B, H, S, 8] x, float[B, S, 8] r, float[B, H, C, 8] cache, bool[B, 1, S, S] mask, bool[B, S] b,"
    " int64[1] n, int64[B, S] i, int32[B, S] j, float16 half, double[B, S] d, float[B, S, 4] a, float[1, 8, 9] line,"
    " float[1, 2, 9, 9] image, float[8] w) => (float y) {{ {} }}"
)
ATTENTION = "y = Attention (x, x, x, mask)"
FAULTS: dict[str, tuple[str, str, str]] = {  # text, version, what is found
    "too many tokens": ("k = Constant <value_ints: ints = [4000]> () v, y = TopK (r, k)", "10.3", "K 4000"),
    "a computed K": ("v, y = TopK (r, n)", "11.4", "a computed K"),
    "an unsorted top-k": (
        "k = Constant <value_ints: ints = [4]> () y, v = TopK <sorted: int = 0> (r, k)",
        "10.3",
        "sorted 0",
    ),
    "three axes": ("y = Attention <q_num_heads: int = 2, kv_num_heads: int = 2> (r, r, r)", "11.4", "3 axes"),
    "a mask of three axes": (
        "z = Constant <value_ints: ints = [1]> () m = Squeeze (mask, z) y = Attention (x, x, x, m)",
        "11.4",
        "3 axes",
    ),
    "a cache to attend to": ("y = Attention (x, x, x, , cache, cache)", "11.4", "a cache"),
    "outputs nobody reads": ("y, , , scores = Attention (x, x, x, mask)", "11.4", "4 outputs"),
    "a soft cap": ("y = Attention <softcap: float = 30.0> (x, x, x)", "10.16", "softcap"),
    "a mask and a causal flag": ("y = Attention <is_causal: int = 1> (x, x, x, mask)", "11.4", "is_causal"),
    "attention before 10.14": (ATTENTION, "10.13", "TensorRT 10.13 lacks"),
    "attention without its opset": (ATTENTION, "10.14", "TensorRT 10.14 lacks"),
    "an rms norm too early": ("y = RMSNormalization (r, w)", "10.3", "TensorRT 10.3 lacks"),
    "a cache of three axes": ("y = TensorScatter (r, r, n)", "11.4", "3 axes"),
    "a cache along its heads": ("y = TensorScatter <axis: int = 1> (cache, x, n)", "11.4", "axis 1"),
    "a ring": ('y = TensorScatter <mode: string = "circular"> (cache, x, n)', "11.4", "circular"),
    "a cache in int64": (
        "l = Cast <to: int = 7> (cache) m = Cast <to: int = 7> (x) y = TensorScatter (l, m, n)",
        "11.4",
        "int64",
    ),
    "rotated rows of three axes": ("y = RotaryEmbedding <num_heads: int = 1> (r, a, a)", "11.4", "3 axes"),
    "positions in int32": ("y = RotaryEmbedding (x, a, a, j)", "11.4", "position_ids"),
    "computed axes to reduce": ("y = ReduceMean (r, n)", "11.4", "computed axes"),
    "computed axes to squeeze": ("y = Squeeze (r, n)", "10.3", "computed axes"),
    "computed axes to unsqueeze": ("y = Unsqueeze (r, n)", "11.4", "computed axes"),
    "computed axes to pad": ("y = Pad (r, i2, zero, n)", "10.3", "computed axes"),
    "the mean of a norm": ("y, mean = LayerNormalization (r, w) z = Abs (mean)", "10.3", "several outputs"),
    "pooling in one dimension": ("y = AveragePool <kernel_shape: ints = [2]> (line)", "10.3", "3 axes"),
    "a dilated pool": (
        "y = MaxPool <kernel_shape: ints = [2, 2], dilations: ints = [2, 2]> (image)",
        "10.3",
        "dilations",
    ),
    "indices of a pool": (
        "y, where = MaxPool <kernel_shape: ints = [2, 2]> (image) z = Abs (where)",
        "10.3",
        "several outputs",
    ),
    "cubic resizing": (
        'y = Resize <mode: string = "cubic"> (image, , twice)',
        "10.3",
        "mode cubic",
    ),
    "smoothed resizing": (
        'y = Resize <mode: string = "linear", antialias: int = 1> (image, , twice)',
        "10.3",
        "antialias",
    ),
    "a scatter that adds": (
        'z = Unsqueeze (i, last) y = ScatterND <reduction: string = "add"> (r, z, r)',
        "10.3",
        "reduction add",
    ),
    "words": ('y = Constant <value_strings: strings = ["a", "b"]> ()', "10.3", "string"),
    "float64 added": ("y = Add (d, d)", "10.3", "double"),
    "a cast to float64": ("y = Cast <to: int = 11> (r)", "10.3", "double"),
    "a choice of float64": ("y = Where (b, d, d)", "10.3", "double"),
    "booleans compared": ("y = Equal (b, b)", "10.3", "bool"),
    "numbers negated as booleans": ("y = Not (j)", "10.3", "int32"),
    "a narrow range": ("y = Range (half, half, half)", "10.3", "float16"),
    "a sine of float64": ("y = Sin (d)", "10.3", "double"),
    "float64 made": ("y = ConstantOfShape <value: tensor = double[1] {1.0}> (n)", "10.3", "double"),
    "an operator of no table": ("y = Det (x)", "10.3", "outside the table"),
    "an operator of ONNX Runtime": ("y = com.microsoft.FastGelu (r)", "10.3", "com.microsoft"),
    "an own operator without a body": ("y = linvt.GatherPool (r, i)", "10.3", "without a body"),
}
GIVEN = {
    "last": np.array([-1]),
    "twice": np.float32([1, 1, 2, 2]),
    "zero": np.float32(0),
    "i2": np.array([0, 1]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_fault_is_one_problem(name: str) -> None:
    text, version, words = FAULTS[name]
    used = {key: array for key, array in GIVEN.items() if re.search(rf", {key}[,)]", text)}
    (line,) = problems(INPUTS.format(text), version, used)
    print(line)
    assert words in line.split(", expected ")[0]
    assert ": found " in line and "\n" not in line


@pytest.mark.parametrize("version", RELEASES)
def test_what_a_release_takes_is_no_problem(version: str) -> None:
    text = (
        "k = Constant <value_ints: ints = [3840]> () v, t = TopK (r, k) h = Cast <to: int = 10> (r)"
        " s = Softmax (h) m = ReduceMean (r, o) p = MaxPool <kernel_shape: ints = [2, 2]> (image) y = Where (b, i, i)"
    )
    assert problems(INPUTS.format(text), version, {"o": np.array([1])}) == []
    if "Attention" in release_of(version).operators:
        text = f"{ATTENTION} z = RotaryEmbedding (x, a, a) u = TensorScatter (cache, x, n) q = RMSNormalization (r, w)"
        assert problems(INPUTS.format(text), version) == []


def test_axes_of_slice_and_later_of_pad_may_be_computed() -> None:
    slices, pads = INPUTS.format("y = Slice (r, n, n, n)"), INPUTS.format("y = Pad (r, i2, zero, n)")
    assert problems(slices, "10.3") == problems(pads, "10.4", GIVEN) == []
    plain = INPUTS.format("z = Slice (r, n, n) y = Pad (z, six, zero)")
    assert problems(plain, "10.3", {**GIVEN, "six": np.zeros(6, np.int64)}) == []


@pytest.mark.parametrize(("version", "opset"), [("10.3", 21), ("10.13", 24), ("10.16", 25), ("11.4", 25)])
def test_an_opset_that_is_too_new_is_one_problem(version: str, opset: int) -> None:
    newest = release_of(version).opset
    assert problems(INPUTS.format("y = Abs (r)"), version, opset=opset) == [
        f"graph: found opset {opset}, expected at most {newest}"
    ]


def test_bodies_of_functions_are_looked_into() -> None:
    text = INPUTS.format("y = linvt.Pool (r)") + (
        ' <domain: "linvt", opset_import: ["" : 20]> Pool (x) => (y) { h = Abs (x) y = Det (h) }'
    )
    (line,) = problems(text, "10.3")
    assert line.startswith("Det ") and "outside the table" in line


# --- quantised weights

BLOCKED = (
    "net (float[B, S, 64] x) => (float y) {{"
    " w = DequantizeLinear <axis: int = {axis}, block_size: int = 16> (q, s) y = MatMul (x, w) }}"
)
PAIR = (
    "net (float[B, S, 64] x, float[64, 8] w) => (float y) { q = QuantizeLinear (x, s, z)"
    " x_dq = DequantizeLinear (q, s, z) y = MatMul (x_dq, w) }"
)


def int4(*shape: int) -> NDArray[Any]:
    return np.ones(shape, np.int8).astype(ml_dtypes.int4)


def scales(*shape: int) -> NDArray[np.float32]:
    return np.full(shape, 0.5, np.float32)


@pytest.mark.parametrize(
    ("axis", "weights", "words"),
    [
        (1, {"q": int4(2, 64, 8), "s": scales(2, 4, 8)}, "a weight of shape [2, 64, 8]"),
        (0, {"q": int4(64, 7), "s": scales(4, 7)}, "7 int4 values a row"),
        (1, {"q": int4(64, 32), "s": scales(64, 2)}, "blocks along axis 1"),
        (0, {"q": int4(64, 8), "s": scales(8, 8)}, "scales of shape [8, 8]"),
    ],
)
def test_one_fault_of_a_4_bit_weight_is_one_problem(axis: int, weights: Weights, words: str) -> None:
    (line,) = problems(BLOCKED.format(axis=axis), "10.3", weights, opset=21)
    assert line.startswith("DequantizeLinear w: found ") and words in line


def test_4_bits_bring_their_opset_with_them() -> None:
    good = {"q": int4(64, 8), "s": scales(4, 8)}
    assert problems(BLOCKED.format(axis=0), "10.3", good, opset=21) == []
    assert problems(BLOCKED.format(axis=0), "10.3", good, opset=22) == ["graph: found opset 22, expected at most 21"]


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        (np.array(0, np.int8), []),
        (np.array(3, np.int8), ["the zero point 3"] * 2),
        (np.array(0, np.uint8), ["uint8 values written", "values of uint8"]),
    ],
)
def test_pairs_are_symmetric_int8(zero: NDArray[Any], expected: list[str]) -> None:
    found = problems(PAIR, "10.3", {"s": np.array(0.5, np.float32), "z": zero})
    assert len(found) == len(expected)
    assert all(words in line for words, line in zip(expected, found, strict=True))


def test_every_operator_that_a_release_takes_is_in_its_opset() -> None:
    assert set(OPERATORS) == set(release_of("11.4").operators)
    for version in (*RELEASES, "10.7", "10.14", "10.15"):
        release = release_of(version)
        for operator in release.operators:
            onnx.defs.get_schema(operator, release.opset)  # raises where there is none


@pytest.mark.parametrize("version", [*RELEASES, "10.14", "10.15"])
@pytest.mark.parametrize("blocked", [False, True], ids=["float", "4 bits"])
def test_the_quantisers_lint_and_the_check_say_the_same_of_a_version(
    version: str, blocked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "net (float[B, H, S, 8] x, float[B, H, C, 8] cache, int64[1] n, float[8] w) => (float y) {"
        " u = TensorScatter (cache, x, n) a = Attention (x, u, u) y = RMSNormalization (a, w) }"
    )
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 24]> {text}'))
    if blocked:
        weight, scale = (ir.tensor(array, name=name) for name, array in (("q", int4(64, 8)), ("s", scales(4, 8))))
        inputs = [ir.Value(name=tensor.name, const_value=tensor) for tensor in (weight, scale)]
        for value in inputs:
            model.graph.register_initializer(value)
        model.graph.append(ir.node("DequantizeLinear", inputs, {"axis": 0, "block_size": 16}))
    monkeypatch.setitem(RELEASES, version, release_of(version).opset)
    said = supports(model)[version]
    done = lowerings(model, release_of(version))
    assert (said == "as written") == (done == ())
    assert [name for name in EDITS if name in said] == [name for name in EDITS if name in done]
    opset = [edit.split()[-1] for edit in done if edit.startswith("opset")]
    assert opset == [part.split()[-1] for part in said.split("; ") if part.startswith("opset")]
    assert opset == ([] if release_of(version).opset == 24 else ["21" if blocked else "20"])
