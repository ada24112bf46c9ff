"""Every edit for older TensorRT releases means the same as the operator it replaces; what it cannot replace it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator

from calibration.trt_rules import RELEASES
from export.lower import lower, release_of
from export.lower.attention import lower_attention
from export.lower.infer import infer_types
from export.lower.opset import lower_opset
from export.lower.rms_norm import lower_rms_norm
from export.lower.rotary import lower_rotary
from export.lower.tensor_scatter import lower_tensor_scatter
from kernels.function import function_body
from kernels.spec import gather_pool, plugin_attributes
from runtime.errors import BundleError
from tests.lowered import run, session, share

Arrays = dict[str, NDArray[Any]]
Edit = Callable[[ir.Model], None]

EXACT = 1e-6  # share of the largest value
OPSET = 20


def model_of(text: str, opset: int = 24) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}'))


def lowered(model: ir.Model, edit: Edit) -> ir.Model:
    """A copy under the oldest opset, valid and of the same interface."""
    copied = ir.from_proto(ir.to_proto(model))
    infer_types(copied)
    edit(copied)
    lower_opset(copied, OPSET)
    proto = ir.to_proto(copied)
    onnx.checker.check_model(proto, full_check=True)
    assert [value.name for value in proto.graph.output] == [value.name for value in model.graph.outputs]
    return copied


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def normal(random: np.random.Generator, *shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    return random.normal(size=shape).astype(dtype)


# --- Attention

FORMS = {
    "plain": "",
    "scaled": "<scale: float = 0.37>",
    "told its precision": "<softmax_precision: int = 1>",
    "with what holds anyway": "<is_causal: int = 0, softcap: float = 0.0>",
}


def attention_model(form: str, mask: str, heads: tuple[int, int], dtype: str = "float") -> ir.Model:
    masked = f", {mask} mask" if mask else ""
    queries, keys = heads
    return model_of(
        f"net ({dtype}[B, {queries}, S, 6] q, {dtype}[B, {keys}, P, 6] k, {dtype}[B, {keys}, P, 4] v{masked})"
        f" => ({dtype}[B, {queries}, S, 4] y) {{ y = Attention {form} (q, k, v{', mask' if mask else ''}) }}"
    )


def attention_feeds(
    random: np.random.Generator, mask: str, heads: tuple[int, int], batch: int, rows: int, columns: int
) -> Arrays:
    feeds = {"q": normal(random, batch, heads[0], rows, 6), "k": normal(random, batch, heads[1], columns, 6)}
    feeds["v"] = normal(random, batch, heads[1], columns, 4)
    if "bool" in mask:
        shape = (1, 1, rows, columns) if "[1" in mask else (batch, heads[0], rows, columns)
        feeds["mask"] = random.random(shape) < 0.5
        feeds["mask"][..., 0] = True  # no row is closed altogether
    elif mask:
        feeds["mask"] = 3 * normal(random, batch, 1, rows, columns)
    return feeds


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", ["", "bool[1, 1, S, P]", "bool[B, H, S, P]", "float[B, 1, S, P]"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
def test_attention_is_the_same(form: str, mask: str, heads: tuple[int, int], random: np.random.Generator) -> None:
    model = attention_model(FORMS[form], mask, heads)
    after = lowered(model, lower_attention)
    assert "Attention" not in operators(after)
    for batch, rows, columns in ((1, 1, 1), (1, 1, 9), (2, 7, 7), (3, 5, 11)):
        feeds = attention_feeds(random, mask, heads, batch, rows, columns)
        assert share(run(after, feeds), run(model, feeds)) < EXACT


def test_keys_and_values_are_not_repeated_for_grouped_queries() -> None:
    after = lowered(attention_model("", "bool[1, 1, S, P]", (4, 2)), lower_attention)
    assert not operators(after).keys() & {"Expand", "Tile", "Concat", "Gather"}
    assert operators(lowered(attention_model("", "", (4, 4)), lower_attention))["Reshape"] == 0


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_scores_of_16_bit_graphs_are_float32_or_rounded_once_to_float16(kind: Any, random: np.random.Generator) -> None:
    """Scores of several hundred, between which 16 bits see steps of 1/4 and 2: exp is off by half a step at most."""
    name = "float16" if kind is np.float16 else "bfloat16"
    after = lowered(attention_model("<softmax_precision: int = 1>", "bool[1, 1, S, P]", (4, 2), name), lower_attention)
    feeds = attention_feeds(random, "bool[1, 1, S, P]", (4, 2), 1, 8, 16)
    feeds = {name: array if array.dtype == bool else (12 * array).astype(kind) for name, array in feeds.items()}
    wide = {name: array if array.dtype == bool else array.astype(np.float32) for name, array in feeds.items()}
    expected = run(attention_model("", "bool[1, 1, S, P]", (4, 2)), wide)
    (found,) = ReferenceEvaluator(ir.to_proto(after)).run(None, feeds)
    step = float(ml_dtypes.finfo(kind).eps)
    bound = 2 * step  # of weights and of their sum
    if kind is np.float16:
        query, key = (wide[part].astype(np.float64) for part in "qk")
        scores = np.einsum("bhsd,bhpd->bhsp", query, np.repeat(key, 2, axis=1)) / np.sqrt(query.shape[-1])
        bound += 2 * np.expm1(np.abs(scores).max() * step / 2)  # of each weight, and of the sum that divides it
        assert share({"y": run(after, feeds)["y"].astype(np.float32)}, expected) < bound
    assert share({"y": np.asarray(found, np.float32)}, expected) < bound


# --- RMSNormalization


@pytest.mark.parametrize("form", ["", "<axis: int = -1, epsilon: float = 0.01, stash_type: int = 1>"])
def test_rms_norm_is_the_same(form: str, random: np.random.Generator) -> None:
    text = f"net (float[B, S, 24] x, float[24] w) => (float[B, S, 24] y) {{ y = RMSNormalization {form} (x, w) }}"
    model = model_of(text)
    after = lowered(model, lower_rms_norm)
    assert "RMSNormalization" not in operators(after)
    for shape in ((1, 1), (2, 9)):
        feeds = {"x": normal(random, *shape, 24), "w": normal(random, 24)}
        assert share(run(after, feeds), run(model, feeds)) < EXACT


def test_rms_norm_over_several_axes_is_the_same(random: np.random.Generator) -> None:
    text = "net (float[B, 5, 6] x, float[5, 6] w) => (float[B, 5, 6] y) { y = RMSNormalization <axis: int = 1> (x, w) }"
    model = model_of(text)
    feeds = {"x": normal(random, 3, 5, 6), "w": normal(random, 5, 6)}
    assert share(run(lowered(model, lower_rms_norm), feeds), run(model, feeds)) < EXACT


def test_squares_that_leave_float16_do_no_harm(random: np.random.Generator) -> None:
    text = "net (float16[B, 24] x, float16[24] w) => (float16[B, 24] y) { y = RMSNormalization (x, w) }"
    feeds = {"x": 400 + 100 * normal(random, 7, 24), "w": normal(random, 24)}
    feeds = {name: array.astype(np.float16) for name, array in feeds.items()}
    wide = {name: array.astype(np.float64) for name, array in feeds.items()}
    expected = wide["x"] / np.sqrt((wide["x"] ** 2).mean(-1, keepdims=True) + 1e-5) * wide["w"]
    found = run(lowered(model_of(text), lower_rms_norm), feeds)["y"]
    assert share({"y": found.astype(np.float64)}, {"y": expected}) < 2**-10  # two roundings of half a step


# --- RotaryEmbedding


@pytest.mark.parametrize(
    ("shape", "form", "dims"),
    [
        ("B, 3, S, 8", "", 8),
        ("B, 3, S, 8", "<interleaved: int = 0, num_heads: int = 3>", 8),
        ("B, 3, S, 8", "<rotary_embedding_dim: int = 4>", 4),
        ("B, S, 24", "<num_heads: int = 3>", 8),
        ("B, S, 24", "<num_heads: int = 3, rotary_embedding_dim: int = 4>", 4),
    ],
)
def test_rotary_is_the_same(shape: str, form: str, dims: int, random: np.random.Generator) -> None:
    angles = f"float[B, S, {dims // 2}] c, float[B, S, {dims // 2}] s"
    model = model_of(
        f"net (float[{shape}] x, {angles}) => (float[{shape}] y) {{ y = RotaryEmbedding {form} (x, c, s) }}"
    )
    after = lowered(model, lower_rotary)
    assert "RotaryEmbedding" not in operators(after)
    for batch, rows in ((1, 1), (2, 7)):
        turns = normal(random, batch, rows, dims // 2)
        size = [{"B": batch, "S": rows}.get(axis) or int(axis) for axis in shape.split(", ")]
        feeds = {"x": normal(random, *size), "c": np.cos(turns), "s": np.sin(turns)}
        assert share(run(after, feeds), run(model, feeds)) < EXACT


def test_layers_share_the_planes_of_their_angles(random: np.random.Generator) -> None:
    model = model_of(
        "net (float[B, 3, S, 8] x, float[B, S, 4] c, float[B, S, 4] s) => (float[B, 3, S, 8] y)"
        "{ once = RotaryEmbedding (x, c, s) y = RotaryEmbedding (once, c, s) }"
    )
    after = lowered(model, lower_rotary)
    assert operators(after)["Unsqueeze"] == 2
    turns = normal(random, 2, 5, 4)
    feeds = {"x": normal(random, 2, 3, 5, 8), "c": np.cos(turns), "s": np.sin(turns)}
    assert share(run(after, feeds), run(model, feeds)) < EXACT


# --- TensorScatter

CACHES = (
    "net (float[1, 3, P, 4] key, float[1, 3, P, 4] value, float[1, 3, S, 4] k, float[1, 3, S, 4] v, int64[1] at)"
    " => (float[1, 3, P, 4] new_key, float[1, 3, P, 4] new_value) {"
    " new_key = TensorScatter <axis: int = -2> (key, k, at)"
    ' new_value = TensorScatter <mode: string = "linear"> (value, v, at) }'
)


def test_a_cache_is_written_the_same(random: np.random.Generator) -> None:
    model = model_of(CACHES)
    after = lowered(model, lower_tensor_scatter)
    assert "TensorScatter" not in operators(after)
    before, later = session(model), session(after)
    for capacity, rows, at in ((1, 1, 0), (9, 1, 0), (9, 1, 8), (9, 4, 2), (9, 4, 5), (9, 9, 0), (40, 6, 11)):
        feeds = {name: normal(random, 1, 3, capacity, 4) for name in ("key", "value")}
        feeds |= {name: normal(random, 1, 3, rows, 4) for name in "kv"} | {"at": np.array([at])}
        expected, found = run(before, feeds), run(later, feeds)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_caches_share_the_rows_they_are_written_at() -> None:
    found = operators(lowered(model_of(CACHES), lower_tensor_scatter))
    assert (found["Range"], found["Gather"], found["Where"]) == (1, 2, 2)
    other = CACHES.replace("float[1, 3, S, 4] v", "float[1, 3, R, 4] v")
    assert operators(lowered(model_of(other), lower_tensor_scatter))["Range"] == 2


# --- what is refused

REFUSED: dict[str, tuple[Edit, str, str]] = {
    "a causal flag": (lower_attention, "y = Attention <is_causal: int = 1> (q, k, v)", "is_causal"),
    "a soft cap": (lower_attention, "y = Attention <softcap: float = 30.0> (q, k, v)", "soft cap"),
    "three axes": (lower_attention, "y = Attention <q_num_heads: int = 2> (r, r, r)", "q_num_heads"),
    "a cache": (lower_attention, "y, one, two = Attention (q, k, v, , k, v)", "a cache"),
    "scores read": (lower_attention, "y, , , s = Attention (q, k, v) z = Abs (s)", "several outputs"),
    "another precision": (lower_rms_norm, "y = RMSNormalization <stash_type: int = 10> (r, w)", "float16"),
    "neighbours": (lower_rotary, "y = RotaryEmbedding <interleaved: int = 1> (q, c, c)", "neighbouring"),
    "positions": (lower_rotary, "y = RotaryEmbedding (q, c, c, p)", "position_ids"),
    "no heads": (lower_rotary, "y = RotaryEmbedding (r, c, c)", "num_heads 0"),
    "a ring": (lower_tensor_scatter, 'y = TensorScatter <mode: string = "circular"> (q, q, i)', "linear"),
    "another axis": (lower_tensor_scatter, "y = TensorScatter <axis: int = 1> (q, q, i)", "rows"),
    "no index": (lower_tensor_scatter, "y = TensorScatter (q, q)", "write index"),
    "several indices": (lower_tensor_scatter, "y = TensorScatter (q, q, ii)", "write index"),
}
OPEN = (
    "net (float[B, 2, S, 6] q, float[B, 2, S, 6] k, float[B, 2, S, 6] v, float[B, S, 6] r, float[6] w,"
    " float[B, S, 3] c, int64[B, S] p, int64[1] i, int64[2] ii) => (float y) {{ {} }}"
)


@pytest.mark.parametrize("name", REFUSED)
def test_a_form_that_is_not_ours_is_refused_by_node(name: str) -> None:
    edit, text, words = REFUSED[name]
    model = model_of(OPEN.format(text))
    infer_types(model)
    with pytest.raises(BundleError) as caught:
        edit(model)
    operator = text.split(" = ")[1].split()[0]
    assert str(caught.value).startswith(f"{operator} ")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("y = Swish (r)", "no such operator in opset 20"),
        ("y = GroupNormalization <num_groups: int = 2> (q, w, w)", "another meaning in opset 20"),
        ('y = Cast <to: int = 1, round_mode: string = "up"> (r)', "the attribute round_mode"),
        ("y = QuantizeLinear <output_dtype: int = 3> (r, i)", "the attribute output_dtype"),
        ("y = Attention (q, k, v)", "no such operator in opset 20"),
    ],
)
def test_what_an_older_opset_would_not_mean_is_refused(text: str, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        lower_opset(model_of(OPEN.format(text)), OPSET)


def test_a_dtype_that_is_said_twice_is_said_once() -> None:
    model = model_of(
        "net (float[B, 6] x, float scale, int8 zero) => (float[B, 6] y) {"
        " q = QuantizeLinear <output_dtype: int = 3> (x, scale, zero)"
        " y = DequantizeLinear <output_dtype: int = 1> (q, scale, zero) }"
    )
    after = lowered(model, lambda model: None)
    assert all("output_dtype" not in node.attributes for node in after.graph)
    feeds = {
        "x": np.float32([[0.2, -7, 3.3, 0, 90, -0.4]]),
        "scale": np.array(0.5, np.float32),
        "zero": np.array(0, np.int8),
    }
    assert share(run(after, feeds), run(model, feeds)) == 0


# --- the pooling node


def pooling_model(top_k: int, scales: list[int]) -> ir.Model:
    graph = helper.make_graph(
        [helper.make_node("GatherPool", ["tokens", "indices"], ["pooled"], domain="linvt", scales=scales)],
        "refine",
        [
            helper.make_tensor_value_info("tokens", onnx.TensorProto.FLOAT, [1, "L", 6]),
            helper.make_tensor_value_info("indices", onnx.TensorProto.INT64, [1, top_k]),
        ],
        [helper.make_tensor_value_info("pooled", onnx.TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("linvt", 1)]
    body = function_body(top_k, scales, 24)
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=10))


@pytest.mark.parametrize("version", RELEASES)
@pytest.mark.parametrize("plugin", [False, True])
def test_pooling_is_the_same_with_and_without_the_plugin(
    version: str, plugin: bool, random: np.random.Generator
) -> None:
    scales = [1, 2, 4]
    model = pooling_model(11, scales)
    lower(model, release_of(version), plugin=plugin)
    if plugin:
        (node,) = model.graph
        assert [attribute.name for attribute in node.attributes.values()] == list(plugin_attributes(scales))
        assert {name: attribute.value for name, attribute in node.attributes.items()} == {
            **plugin_attributes(scales),
            "scales": tuple(scales),
        }
    if plugin and release_of(version).body_first:
        assert not model.functions and model.opset_imports["linvt"] == 1
        return  # a parser of that age would inline a body without looking for the plugin
    assert bool(model.functions) == plugin == ("linvt" in model.opset_imports)
    tokens, indices = normal(random, 1, 30, 6), random.integers(0, 30, (1, 11))
    found = run(model, {"tokens": tokens, "indices": indices})["pooled"]
    np.testing.assert_allclose(found, gather_pool(tokens, indices, scales), rtol=1e-6, atol=1e-6)


def test_more_scales_than_the_plugin_takes_are_refused() -> None:
    with pytest.raises(BundleError, match=r"^GatherPool:pooled: .* scales .*; build without the plugin$"):
        lower(pooling_model(30, list(range(1, 10))), release_of("10.16"), plugin=True)
