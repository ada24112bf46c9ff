"""KV caches of every dtype a graph may have: written in place, moved whole when they grow, of the right size.

The graphs are tiny and do without arithmetic, which ONNX Runtime does not have for bfloat16 on the CPU: a decode step
writes its rows into the cache, and its logits are what stands in the cache for the first token and for the last.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from runtime.backend_ort import CAST_LIMIT, OrtDecoder, check_tensors, create_session
from runtime.bundle import bundle_path
from runtime.errors import BackendError
from runtime.kv_cache import ANSWER_ROOM, CACHE_BLOCK
from runtime.manifest import Manifest, StageSpec, TensorSpec

DTYPES = {
    "float32": (TensorProto.FLOAT, np.dtype(np.float32)),
    "float16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bfloat16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
WIDTH = 8  # channels of the one head
CAPACITY = 4 * (ANSWER_ROOM + CACHE_BLOCK)


def decode_graph(dtype: int) -> bytes:
    """inputs_embeds (1, S, D) -> rows ``write_index`` on of both caches; logits: the first row, then the last one's."""
    caches = ("key.0", "value.0")
    shapes: dict[str, tuple[int, list[int | str]]] = {
        "inputs_embeds": (TensorProto.FLOAT, [1, "sequence", WIDTH]),
        "position_ids": (TensorProto.INT64, [1, "sequence"]),
        "write_index": (TensorProto.INT64, [1]),
        **{f"past_{name}": (dtype, [1, 1, "capacity", WIDTH]) for name in caches},
    }
    results = {
        "logits": (TensorProto.FLOAT, [1, 2 * WIDTH]),
        **{f"present_{name}": (dtype, [1, 1, "capacity", WIDTH]) for name in caches},
    }
    constants = {"zero": [0], "one": [1], "row": [1, 1, -1, WIDTH], "flat": [1, 2 * WIDTH]}
    nodes = [
        helper.make_node("Reshape", ["inputs_embeds", "row"], ["rows"]),
        helper.make_node("Cast", ["rows"], ["narrow"], to=dtype),
        *(
            helper.make_node("TensorScatter", [f"past_{name}", "narrow", "write_index"], [f"present_{name}"], axis=-2)
            for name in caches
        ),
        helper.make_node("Shape", ["inputs_embeds"], ["length"], start=1, end=2),
        helper.make_node("Add", ["write_index", "length"], ["end"]),
        helper.make_node("Sub", ["end", "one"], ["newest"]),
        helper.make_node("Gather", ["present_key.0", "zero"], ["first"], axis=2),
        helper.make_node("Gather", ["present_value.0", "newest"], ["last"], axis=2),
        helper.make_node("Concat", ["first", "last"], ["both"], axis=3),
        helper.make_node("Cast", ["both"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "flat"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "decode",
        [helper.make_tensor_value_info(name, *spec) for name, spec in shapes.items()],
        [helper.make_tensor_value_info(name, *spec) for name, spec in results.items()],
        [helper.make_tensor(name, TensorProto.INT64, [len(value)], value) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def stage_spec(dtype: str) -> StageSpec:
    shape = (1, 1, "capacity", WIDTH)
    caches = [("key.0", dtype), ("value.0", dtype)]
    return StageSpec(
        "decode.onnx",
        (
            TensorSpec("inputs_embeds", "float32", (1, "sequence", WIDTH)),
            TensorSpec("position_ids", "int64", (1, "sequence")),
            TensorSpec("write_index", "int64", (1,)),
            *(TensorSpec(f"past_{name}", kind, shape) for name, kind in caches),  # type: ignore[arg-type]
        ),
        (
            TensorSpec("logits", "float32", (1, 2 * WIDTH)),
            *(TensorSpec(f"present_{name}", kind, shape) for name, kind in caches),  # type: ignore[arg-type]
        ),
    )


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    """Of the cache."""
    return str(request.param)


@pytest.fixture
def session(dtype: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(decode_graph(DTYPES[dtype][0]), options, providers=["CPUExecutionProvider"])


def decoder_of(session: ort.InferenceSession, dtype: str, capacity: int = CAPACITY) -> OrtDecoder:
    manifest = SimpleNamespace(stages={"decode": stage_spec(dtype)}, layers=1, heads_kv=1, head_dim=WIDTH)
    return OrtDecoder(session, cast(Manifest, manifest), "cpu", capacity)


def held(decoder: OrtDecoder, name: str, dtype: str) -> Any:
    """What the cache holds (P, D), in its own dtype."""
    value = decoder.cache[name]
    assert value is not None
    return value.numpy().view(DTYPES[dtype][1])[0, 0]


def positions(start: int, count: int) -> Any:
    return np.arange(start, start + count)[None]


def test_a_step_writes_its_rows_into_the_cache_that_is_bound(
    session: ort.InferenceSession, dtype: str, random: np.random.Generator
) -> None:
    decoder = decoder_of(session, dtype)
    rows = random.normal(size=(5, WIDTH)).astype(np.float32)
    logits = decoder.step(rows, positions(0, 5))
    narrow = rows.astype(DTYPES[dtype][1])
    np.testing.assert_array_equal(logits, narrow[[0, -1]].astype(np.float32).reshape(-1))
    for name in ("key.0", "value.0"):
        np.testing.assert_array_equal(held(decoder, name, dtype)[:5], narrow)
        assert not held(decoder, name, dtype)[5:].astype(np.float32).any(), "what is masked must be finite"


def test_a_full_cache_moves_whole(session: ort.InferenceSession, dtype: str, random: np.random.Generator) -> None:
    decoder = decoder_of(session, dtype)
    rows = random.normal(size=(CAPACITY, WIDTH)).astype(np.float32)
    narrow = rows.astype(DTYPES[dtype][1])
    decoder.step(rows[:7], positions(0, 7))
    rooms = [decoder.room]
    for at in range(7, CAPACITY):
        logits = decoder.step(rows[at : at + 1], positions(at, 1))
        np.testing.assert_array_equal(logits, narrow[[0, at]].astype(np.float32).reshape(-1))
        if decoder.room != rooms[-1]:
            rooms.append(decoder.room)
            np.testing.assert_array_equal(held(decoder, "key.0", dtype)[: at + 1], narrow[: at + 1])
    assert len(rooms) > 2 and rooms[-1] == CAPACITY, rooms
    assert rooms[0] < CAPACITY / 2, "a short question does not pay for the whole context"


def test_a_narrow_cache_takes_half_the_memory(session: ort.InferenceSession, dtype: str) -> None:
    decoder = decoder_of(session, dtype)
    decoder.step(np.zeros((1, WIDTH), np.float32), positions(0, 1))
    size = sum(value.tensor_size_in_bytes() for value in decoder.cache.values() if value)
    assert size == 2 * decoder.room * WIDTH * (4 if dtype == "float32" else 2)


def test_the_graph_has_to_have_the_dtype_the_manifest_says(session: ort.InferenceSession, dtype: str) -> None:
    for said in DTYPES:
        spec = stage_spec(said)
        if said == dtype:
            check_tensors(session, spec)
        else:
            with pytest.raises(BackendError, match=r"past_key\.0.* is not as bundle\.json says"):
                check_tensors(session, spec)


def test_a_cache_of_another_kind_is_refused_in_one_line(session: ort.InferenceSession) -> None:
    with pytest.raises(BackendError) as caught:
        decoder_of(session, "int64")
    assert str(caught.value) == (
        "decode.onnx has a KV cache of int64, expected float32, float16, bfloat16; export the bundle again"
    )


def test_weights_of_more_than_a_gibibyte_are_cast_while_loading() -> None:
    session = create_session(bundle_path("demo-float") / "aggregate.onnx", "cpu", 1)
    entry = session.get_session_options().get_session_config_entry(CAST_LIMIT[0])
    assert int(entry) > 152064 * 8192 * 4  # bytes of the largest head that is published: Qwen2-72B's
