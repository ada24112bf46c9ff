"""The runtime answers as ever while it is watched, and what is seen is what the graphs compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from calibration.linears import grouped
from calibration.plan import float_graph
from calibration.watch import InMemory, WatchingBackend, watched_session
from runtime.backend import Array
from runtime.backend_ort import OrtBackend
from runtime.bundle import Bundle
from runtime.engine import VideoQA
from runtime.errors import BackendError
from runtime.kv_cache import CACHE_BLOCK
from runtime.options import GenerationOptions

Floats = NDArray[np.float32]

STAGES = ("vision", "refine", "aggregate", "decode")
QUESTION = "How many digits are there?"


@dataclass
class Seen:
    """Everything that was shown, with copies of the values."""

    runs: dict[str, list[tuple[dict[str, Array], dict[str, Array]]]] = field(default_factory=dict)

    def look(self, stage: str, feeds: Mapping[str, Array], values: Mapping[str, Array]) -> None:
        copies = tuple({name: value.copy() for name, value in part.items()} for part in (feeds, values))
        self.runs.setdefault(stage, []).append((copies[0], copies[1]))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open("demo-float")


@pytest.fixture(scope="module")
def taps(bundle: Bundle) -> dict[str, list[str]]:
    """The activations of all layers of all stages."""
    return {
        stage: [*grouped(float_graph(bundle.path(bundle.manifest.stages[stage].file))[1].values())] for stage in STAGES
    }


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def watching(bundle: Bundle, taps: dict[str, list[str]], seen: Seen) -> WatchingBackend:
    return WatchingBackend(bundle, taps, seen.look, 1)


def reference(bundle: Bundle, stage: str, taps: list[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The same tensors of a graph that nothing is optimised in."""
    path = bundle.path(bundle.manifest.stages[stage].file)
    model = onnx.load(path, load_external_data=True)
    outputs = [output.name for output in model.graph.output]
    inner = [name for name in taps if name not in feeds and name not in outputs]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [*outputs, *inner]
    found = dict(zip(names, session.run(names, dict(feeds)), strict=True))
    return {**found, **{name: feeds[name] for name in taps if name in feeds}}


def assert_same(found: Array, expected: Array, what: str) -> None:
    assert found.shape == expected.shape, what
    limit = 1e-5 * max(1.0, float(np.abs(expected).max()))
    assert float(np.abs(found.astype(np.float64) - expected).max()) <= limit, what


def joined(runs: list[dict[str, Array]]) -> dict[str, Array]:
    """Runs of pieces as one run."""
    return {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}


def test_frames_are_watched_one_at_a_time_and_done_with_together(
    bundle: Bundle, taps: dict[str, list[str]], random: np.random.Generator
) -> None:
    looked, done = Seen(), Seen()
    pixels = random.standard_normal((4, 3, 64, 64)).astype(np.float32)
    WatchingBackend(bundle, taps, looked.look, 1, done.look).graph("vision").run({"pixel_values": pixels})
    assert [len(feeds["pixel_values"]) for feeds, _ in looked.runs["vision"]] == [1, 1, 1, 1]
    ((feeds, outputs),) = done.runs["vision"]
    assert np.array_equal(feeds["pixel_values"], pixels)
    assert {name: value.shape for name, value in outputs.items()} == {"tokens": (4, 16, 160)}


# --- the whole runtime


def test_the_answer_is_the_same_when_it_is_watched(
    bundle: Bundle, watching: WatchingBackend, seen: Seen, random: np.random.Generator
) -> None:
    frames = random.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    options = GenerationOptions(max_new_tokens=12, do_sample=False)
    with VideoQA.over(bundle, watching) as qa:
        watched = qa.ask(frames, QUESTION, options)
    with VideoQA.over(bundle, OrtBackend(bundle, "cpu", 1)) as qa:
        plain = qa.ask(frames, QUESTION, options)
    assert (watched.text, watched.token_ids) == (plain.text, plain.token_ids)
    assert {stage: len(runs) for stage, runs in seen.runs.items()} == {
        "vision": 8,
        "refine": 1,
        "aggregate": 1,
        "decode": len(plain.token_ids) + (plain.finish_reason == "stop"),
    }


@pytest.mark.parametrize("stage", STAGES[:3])
def test_what_is_seen_of_a_graph_is_what_it_computes(
    stage: str,
    bundle: Bundle,
    taps: dict[str, list[str]],
    watching: WatchingBackend,
    seen: Seen,
    random: np.random.Generator,
) -> None:
    """Outputs and activations, of two runs of different sizes; also of an activation that is the stage's input."""
    for size in (3, 5):
        feeds = {
            spec.name: random.standard_normal([size if isinstance(axis, str) else axis for axis in spec.shape]).astype(
                np.float32
            )
            for spec in bundle.manifest.stages[stage].inputs
        }
        found = watching.graph(stage).run(feeds)
        expected = reference(bundle, stage, taps[stage], feeds)
        assert set(taps[stage]) <= set(expected)
        runs = seen.runs.pop(stage)
        shown_feeds, shown = (joined([run[side] for run in runs]) for side in (0, 1))
        assert set(expected) <= set(shown)
        for name, value in expected.items():
            assert_same(shown[name], value, name)
        assert all(np.array_equal(shown_feeds[name], feeds[name]) for name in feeds)
        assert set(found) == {spec.name for spec in bundle.manifest.stages[stage].outputs}
        assert all(np.array_equal(shown[name], found[name]) for name in found)


# --- the LLM step by step


def test_every_step_of_the_llm_shows_its_own_rows(
    bundle: Bundle, taps: dict[str, list[str]], watching: WatchingBackend, seen: Seen, random: np.random.Generator
) -> None:
    """Prompts and steps of various lengths, across a cache that grows twice; against one run over all rows."""
    lengths = [7, 1, 1, CACHE_BLOCK * 3, 1, 200, 1]
    total = sum(lengths)
    rows = random.standard_normal((total, bundle.manifest.width)).astype(np.float32) * np.float32(0.1)
    positions = np.arange(total)[None]
    decoder, plain = watching.decoder(total), OrtBackend(bundle, "cpu", 1).decoder(total)
    rooms, start = set(), 0
    for length in lengths:
        part = slice(start, start + length)
        logits = decoder.step(rows[part], positions[:, part])
        assert_same(logits, plain.step(rows[part], positions[:, part]), "logits")
        feeds, values = seen.runs["decode"][-1]
        np.testing.assert_array_equal(feeds["inputs_embeds"], rows[part])
        np.testing.assert_array_equal(feeds["position_ids"], positions[:, part])
        np.testing.assert_array_equal(values["logits"], logits)
        rooms.add(decoder.room)
        start += length
    assert len(rooms) >= 3
    expected = reference(bundle, "decode", taps["decode"], whole_prompt(bundle, rows, positions))
    shown = [values for _, values in seen.runs["decode"]]
    per_row = [name for name in taps["decode"] if expected[name].shape[1] == total]
    assert len(per_row) >= 16
    for name in per_row:
        assert [values[name].shape[1] for values in shown] == lengths
        assert_same(np.concatenate([values[name] for values in shown], axis=1), expected[name], name)
    for name in set(taps["decode"]) - set(per_row):  # of the last row alone, which the head reads
        assert_same(shown[-1][name], expected[name], name)


def whole_prompt(bundle: Bundle, rows: Floats, positions: NDArray[np.int64]) -> dict[str, Array]:
    """The LLM's inputs for rows (S, D) at once, the cache empty."""
    manifest = bundle.manifest
    cache = np.zeros((1, manifest.heads_kv, len(rows), manifest.head_dim), np.float32)
    caches = [f"past_{kind}.{layer}" for layer in range(manifest.layers) for kind in ("key", "value")]
    first: dict[str, Array] = {
        "inputs_embeds": rows[None],
        "position_ids": positions,
        "write_index": np.zeros(1, np.int64),
    }
    return {**first, **dict.fromkeys(caches, cache)}


def test_decoders_do_not_share_what_they_know(
    bundle: Bundle, watching: WatchingBackend, random: np.random.Generator
) -> None:
    rows = random.standard_normal((9, bundle.manifest.width)).astype(np.float32)
    positions = np.arange(9)[None]
    first, second = watching.decoder(20), watching.decoder(20)
    alone = first.step(rows, positions)
    np.testing.assert_array_equal(second.step(rows, positions), alone)


def test_a_stage_without_taps_is_watched_all_the_same(bundle: Bundle, seen: Seen, random: np.random.Generator) -> None:
    backend = WatchingBackend(bundle, {}, seen.look, 1)
    pixels = random.standard_normal((2, 3, *bundle.manifest.preprocess.size)).astype(np.float32)
    assert [*backend.graph("vision").run({"pixel_values": pixels})] == ["tokens"]
    rows = random.standard_normal((2, bundle.manifest.width)).astype(np.float32)
    backend.decoder(4).step(rows, np.arange(2)[None])
    assert [*seen.runs["decode"][0][1]] == ["logits"]


def test_a_closed_backend_says_so(watching: WatchingBackend) -> None:
    watching.graph("refine")
    watching.close()
    for opened in (lambda: watching.graph("refine"), lambda: watching.decoder(8)):
        with pytest.raises(BackendError, match="the backend is closed"):
            opened()


# --- forms of a graph


def graph(opset: int = 21, op: str = "MatMul") -> onnx.ModelProto:
    """Y = x w + 1 with a tensor ``h`` between."""
    header = f'<ir_version: 10, opset_import: ["": {opset}]> net (float[rows, 20] x) => (float[rows, 30] y)'
    model = onnx.parser.parse_model(f"{header} <float one = {{1.0}}> {{ h = {op} (x, w) y = Add (h, one) }}")
    weight = np.random.default_rng(opset).standard_normal((20, 30)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return model


def saved(path: Path, model: onnx.ModelProto) -> Path:
    """With the weight in a file beside it."""
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    return path


def test_a_graph_in_memory_reads_its_weights_from_the_folder(tmp_path: Path, random: np.random.Generator) -> None:
    path = saved(tmp_path / "a.onnx", graph())
    rows = random.standard_normal((4, 20)).astype(np.float32)
    memory = InMemory(path.read_bytes(), tmp_path)
    found, expected = (watched_session([form], ("h",), 1).run(["y", "h"], {"x": rows}) for form in (memory, path))
    np.testing.assert_array_equal(found[0], expected[0])
    weight = onnx.numpy_helper.to_array(graph().graph.initializer[-1])
    np.testing.assert_allclose(found[1], rows @ weight, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[0], found[1] + 1, rtol=1e-6, atol=1e-6)


def test_a_tap_that_is_an_output_already_is_given_once(tmp_path: Path) -> None:
    session = watched_session([saved(tmp_path / "a.onnx", graph())], ("y", "h", "x"), 1)
    assert [output.name for output in session.get_outputs()] == ["y", "h", "x"]


def test_the_first_form_that_this_engine_knows_is_taken(tmp_path: Path) -> None:
    newer, known, older = (saved(tmp_path / f"{opset}.onnx", graph(opset)) for opset in (999, 21, 17))
    rows = np.ones((1, 20), np.float32)
    found = watched_session([newer, known, older], (), 1).run(None, {"x": rows})[0]
    np.testing.assert_array_equal(found, watched_session([known], (), 1).run(None, {"x": rows})[0])
    with pytest.raises(BackendError, match="ONNX Runtime failed to load net"):
        watched_session([newer, saved(tmp_path / "b.onnx", graph(998))], (), 1)


def test_a_graph_that_is_wrong_is_not_passed_over_for_an_older_form(tmp_path: Path) -> None:
    wrong, sound = saved(tmp_path / "a.onnx", graph(op="NoSuchOp")), saved(tmp_path / "b.onnx", graph())
    with pytest.raises(BackendError, match="failed to load") as caught:
        watched_session([wrong, sound], (), 1)
    assert "\n" not in str(caught.value)
