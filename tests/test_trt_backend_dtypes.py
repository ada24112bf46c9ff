"""KV caches of every dtype in TensorRT: written where they should be, moved whole, captured and replayed.

Over the graph of ``test_backend_dtypes``, which has no arithmetic. ONNX Runtime, of which the double is made, has no
bfloat16 on the CPU, so there a few lines of NumPy stand for the graph; the engine's shapes, addresses and aliases are
checked by the double all the same.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import tests.trt.execution
from export.engine.builder import Settings, engine_facts, engine_from_onnx
from export.engine.cache import TimingCache
from export.engine.lowered import LoweredStage, fix_cache
from export.lower import lower, release_of
from runtime.engines import EngineRecord, ShapeRange, Target
from runtime.manifest import Manifest
from runtime.trt_decoder import SlotPool, TrtDecoder
from runtime.trt_device import TrtDevice
from runtime.trt_engine import TrtEngine
from runtime.trt_log import Log, capturing
from tests.engines import IN_PLACE, TWO_SETS, counted
from tests.test_backend_dtypes import CAPACITY, DTYPES, WIDTH, decode_graph, stage_spec
from tests.trt.double import Double


def lowered(dtype: str, version: str, folder: Path) -> LoweredStage:
    """The graph as a build would give it to TensorRT."""
    model = ir.from_proto(onnx.load_from_string(decode_graph(DTYPES[dtype][0])))
    lower(model, release_of(version), plugin=False)
    proto: onnx.ModelProto = ir.to_proto(model)
    in_place = any(node.op_type == "TensorScatter" for node in proto.graph.node)
    if in_place:
        fix_cache(proto, CAPACITY)
    profiles = tuple(profile(rows, CAPACITY if in_place else 1) for rows in (CAPACITY, 1))
    return LoweredStage("decode", proto, folder / "decode.onnx", profiles, in_place, False, "")


def profile(rows: int, least: int) -> dict[str, ShapeRange]:
    """Up to so many rows, over a cache of ``least`` tokens or more."""
    cache = ShapeRange((1, 1, least, WIDTH), (1, 1, CAPACITY, WIDTH), (1, 1, CAPACITY, WIDTH))
    return {
        "inputs_embeds": ShapeRange((1, 1, WIDTH), (1, rows, WIDTH), (1, rows, WIDTH)),
        "position_ids": ShapeRange((1, 1), (1, rows), (1, rows)),
        "write_index": ShapeRange((1,), (1,), (1,)),
        "past_key.0": cache,
        "past_value.0": cache,
    }


def engine_of(stage: LoweredStage, double: Double, log: Log, folder: Path) -> TrtEngine:
    """Built and opened."""
    cache = TimingCache(folder / "timing.cache", lambda line: None)
    blob = engine_from_onnx(double.trt, stage, Settings(), log, cache)
    facts, path = engine_facts(double.trt, blob, log), folder / "decode.engine"
    path.write_bytes(bytes(memoryview(blob)))
    record = EngineRecord(
        stage="decode",
        target=Target(gpu="Orin", sm=(8, 7), processors=8, tensorrt=double.version, platform="", cuda=(12, 6)),
        graph="",
        options={},
        profiles=stage.profiles,
        inputs=facts.inputs,
        outputs=facts.outputs,
        size=path.stat().st_size,
        sha256="",
    )
    return TrtEngine(TrtDevice(double.trt), path, record, "build again")


def computed(plan: object, values: dict[str, Any]) -> dict[str, Any]:
    """What the graph computes, with a cache of bfloat16 as its bits."""
    rows, start = values["inputs_embeds"], int(values["write_index"][0])
    narrow = rows.astype(DTYPES["bfloat16"][1]).view(np.uint16)
    present = {}
    for name in ("key.0", "value.0"):
        present[name] = values[f"past_{name}"].copy()
        present[name][0, 0, start : start + rows.shape[1]] = narrow[0]
    both = np.concatenate([present["key.0"][0, 0, 0], present["value.0"][0, 0, start + rows.shape[1] - 1]])
    logits = both.view(DTYPES["bfloat16"][1]).astype(np.float32)[None]
    return {"logits": logits, **{f"present_{name}": value for name, value in present.items()}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", [TWO_SETS, IN_PLACE])
def test_a_cache_holds_its_rows_while_it_grows(
    version: str, dtype: str, tmp_path: Path, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == "bfloat16":
        monkeypatch.setitem(tests.trt.execution.NUMPY, "BF16", np.uint16)
        monkeypatch.setattr(tests.trt.execution, "compute", computed)
    rows = random.normal(size=(CAPACITY, WIDTH)).astype(np.float32)
    narrow = rows.astype(DTYPES[dtype][1]).astype(np.float32)
    manifest = SimpleNamespace(
        stages={"decode": stage_spec(dtype)},
        heads_kv=1,
        head_dim=WIDTH,
        width=WIDTH,
        positions=SimpleNamespace(axes=1),
    )
    with Double(version=version) as double:
        engine = engine_of(lowered(dtype, version, tmp_path), double, capturing(double.trt), tmp_path)
        pool = SlotPool([], keep=True)
        decoder = TrtDecoder(engine, cast(Manifest, manifest), pool, CAPACITY)
        assert decoder.layout.dtype == dtype and decoder.layout.row == WIDTH * (4 if dtype == "float32" else 2)
        rooms, start = [], 0
        for count in (7, *[1] * (CAPACITY - 7)):
            part = slice(start, start + count)
            logits = decoder.step(rows[part], np.arange(start, start + count)[None])
            np.testing.assert_array_equal(logits, narrow[[0, start + count - 1]].reshape(-1))
            rooms.append(decoder.room)
            start += count
        assert rooms[-1] == CAPACITY and len(set(rooms)) == (1 if decoder.layout.in_place else 3)
        assert counted(double)["cudaGraphLaunch"] > CAPACITY / 2 and pool.notes == []
        pool.close()
        del decoder, engine
        assert double.leaks() == []
