"""ONNX Runtime's device path, run over memory of the host: the same code as on a GPU, the same answers as without."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest

import runtime.kv_cache
import runtime.ort_decoders
from runtime import BackendError, GenerationOptions, VideoQA
from runtime.backend_ort import OrtBackend
from runtime.bundle import Bundle
from runtime.device_tensor import DeviceTensor
from runtime.ort_decoders import OrtDeviceDecoder, OrtGraphDecoder
from runtime.ort_device import OrtBlock, OrtDeviceGraph, device_empty, lengthening_graph

QUESTIONS = ("How many digits are there?", "Which digit is red, and where is it?")


def tokens(count: int) -> GenerationOptions:
    return GenerationOptions(max_new_tokens=count, do_sample=False, ignore_eos=True)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open("demo-float")


@pytest.fixture(params=["growing cache", "captured steps"])
def qa(bundle: Bundle, request: pytest.FixtureRequest) -> Iterator[VideoQA]:
    """The device's code without a device."""
    backend = OrtBackend(bundle, "cpu", 1, cuda_graph=request.param == "captured steps")
    backend.on_device = True
    with VideoQA.over(bundle, backend) as opened:
        yield opened


@pytest.fixture
def plain(bundle: Bundle) -> Iterator[VideoQA]:
    with VideoQA.over(bundle, OrtBackend(bundle, "cpu", 1)) as opened:
        yield opened


@pytest.fixture
def frames(random: np.random.Generator) -> Any:
    return random.integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)


# Answers


def test_answers_are_the_same(qa: VideoQA, plain: VideoQA, frames: Any) -> None:
    video, expected = qa.video(frames), plain.video(frames)
    assert isinstance(video.features, DeviceTensor) and isinstance(expected.features, np.ndarray)
    np.testing.assert_array_equal(np.asarray(video.features), expected.features)
    for question in QUESTIONS:
        assert qa.ask(video, question, tokens(20)).token_ids == plain.ask(expected, question, tokens(20)).token_ids


def test_pictures_are_the_same(qa: VideoQA, plain: VideoQA, frames: Any) -> None:
    seen, expected = qa.images(list(frames[:3])), plain.images(list(frames[:3]))
    np.testing.assert_array_equal(np.asarray(seen.features), expected.features)
    assert qa.ask(seen, QUESTIONS[0], tokens(8)).token_ids == plain.ask(expected, QUESTIONS[0], tokens(8)).token_ids


def test_a_bundle_without_linvt(plain_bundle: Path, frames: Any) -> None:
    opened = Bundle.open(plain_bundle)
    backend = OrtBackend(opened, "cpu", 1)
    backend.on_device = True
    with VideoQA.over(opened, backend) as qa, VideoQA.open(plain_bundle, backend="cpu", threads=1) as plain:
        found, expected = (each.ask(frames[:4], QUESTIONS[0], tokens(8)).token_ids for each in (qa, plain))
    assert found == expected


def test_streams_take_turns(qa: VideoQA, frames: Any) -> None:
    video = qa.video(frames)
    expected = [qa.ask(video, question, tokens(30)).token_ids for question in QUESTIONS]
    streams = [qa.stream(video, question, tokens(30)) for question in QUESTIONS]
    for _ in range(8):
        for stream in streams:
            next(stream)
    assert [stream.answer.token_ids for stream in streams] == expected


# Graphs


def test_outputs_are_written_where_they_are_wanted(qa: VideoQA, random: np.random.Generator) -> None:
    pixels = random.normal(size=(2, 3, 64, 64)).astype(np.float32)
    graph = qa.backend.graph("vision")
    expected = np.asarray(graph.run({"pixel_values": pixels})["tokens"])
    kept = qa.backend.empty((3, *expected.shape))
    assert isinstance(kept, DeviceTensor)
    for target in (np.empty_like(expected), kept[1]):
        assert graph.run({"pixel_values": pixels}, {"tokens": target})["tokens"] is target
        np.testing.assert_array_equal(np.asarray(target), expected)


def test_a_run_that_fails_is_one_line(qa: VideoQA) -> None:
    with pytest.raises(BackendError, match="ONNX Runtime failed to run vision: ") as caught:
        qa.backend.graph("vision").run({"pixel_values": np.zeros((1, 3, 8, 8), np.float32)})
    assert "\n" not in str(caught.value)


def test_feeds_without_order_in_memory(qa: VideoQA, plain: VideoQA, random: np.random.Generator) -> None:
    pixels = random.normal(size=(3, 64, 64, 2)).astype(np.float32).transpose(3, 0, 1, 2)
    graph = qa.backend.graph("vision")
    assert isinstance(graph, OrtDeviceGraph)
    found, expected = (
        np.asarray(each.run({"pixel_values": pixels})["tokens"]) for each in (graph, plain.backend.graph("vision"))
    )
    np.testing.assert_array_equal(found, expected)


# The KV cache


def test_a_cache_that_grows_on_the_device_gives_the_same_tokens(
    bundle: Bundle, plain: VideoQA, frames: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain.ask(frames, QUESTIONS[0], tokens(300)).token_ids
    monkeypatch.setattr(runtime.kv_cache, "ANSWER_ROOM", 1)
    monkeypatch.setattr(runtime.kv_cache, "CACHE_BLOCK", 1)
    moved = []
    inner = OrtDeviceDecoder.moved
    monkeypatch.setattr(OrtDeviceDecoder, "moved", lambda self, value: moved.append(value) or inner(self, value))
    backend = OrtBackend(bundle, "cpu", 1)
    backend.on_device = True
    with VideoQA.over(bundle, backend) as qa:
        assert qa.ask(frames, QUESTIONS[0], tokens(300)).token_ids == expected
    assert sum(value is not None for value in moved) >= 3 * 2 * bundle.manifest.layers


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_model_that_moves_a_cache(dtype: Any, random: np.random.Generator) -> None:
    """It is written by hand: ONNX's checker takes it, and it only puts one tensor behind the other."""
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    data = lengthening_graph(element)
    model = onnx.load_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Concat"]
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    old, rest = (random.normal(size=(1, 2, rows, 5)).astype(dtype) for rows in (7, 4))
    new = np.empty((1, 2, 11, 5), dtype)
    binding = session.io_binding()
    for name, array in (("old", old), ("rest", rest)):
        binding.bind_input(name, "cpu", 0, element, array.shape, array.ctypes.data)
    binding.bind_output("new", "cpu", 0, element, new.shape, new.ctypes.data)
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(new.view(np.uint8), np.concatenate([old, rest], axis=2).view(np.uint8))


def test_captured_steps_keep_their_addresses_and_their_numbers(bundle: Bundle, plain: VideoQA, frames: Any) -> None:
    """What a CUDA graph is captured of must not move; the next answer replays what this one captured."""
    backend = OrtBackend(bundle, "cpu", 1, cuda_graph=True)
    backend.on_device = True
    runs: list[tuple[str, tuple[int, ...]]] = []
    inner = OrtGraphDecoder.step

    def step(self: OrtGraphDecoder, embeds: Any, position_ids: Any) -> Any:
        values = [*self.fixed.inputs.values(), self.fixed.logits, *self.fixed.cache.values()]
        graph = self.replay if len(embeds) == 1 else self.options
        number = graph.get_run_config_entry(runtime.ort_decoders.GRAPH_ID)
        runs.append((number, tuple(value.data_ptr() for value in values)))
        return inner(self, embeds, position_ids)

    with pytest.MonkeyPatch.context() as patch, VideoQA.over(bundle, backend) as qa:
        patch.setattr(OrtGraphDecoder, "step", step)
        video, expected = qa.video(frames), plain.video(frames)
        for question in QUESTIONS:
            assert qa.ask(video, question, tokens(9)).token_ids == plain.ask(expected, question, tokens(9)).token_ids
    numbers = [number for number, _ in runs]
    assert numbers[0] == numbers[9] == "-1", "prefill is not captured"
    assert len({*numbers} - {"-1"}) == 1 and "0" not in numbers
    assert len({addresses for _, addresses in runs}) == 1


def test_two_captured_answers_at_a_time_have_a_graph_each(bundle: Bundle) -> None:
    backend = OrtBackend(bundle, "cpu", 1, cuda_graph=True)
    first, second = backend.decoder(20), backend.decoder(20)
    assert isinstance(first, OrtGraphDecoder) and isinstance(second, OrtGraphDecoder)
    assert first.fixed.number != second.fixed.number
    number = first.fixed.number
    del first
    third = backend.decoder(20)
    assert isinstance(third, OrtGraphDecoder) and third.fixed.number == number
    backend.close()


def test_what_an_answer_leaves_is_cleared_for_the_next(bundle: Bundle) -> None:
    backend = OrtBackend(bundle, "cpu", 1, cuda_graph=True)
    rows = np.ones((3, bundle.manifest.width), np.float32)
    first = backend.decoder(40)
    expected = first.step(rows, np.arange(3)[None])
    assert np.isfinite(expected).all()
    first.step(np.full((20, rows.shape[1]), np.nan, np.float32), np.arange(3, 23)[None])
    del first
    np.testing.assert_array_equal(backend.decoder(40).step(rows, np.arange(3)[None]), expected)
    backend.close()


def test_the_model_that_moves_caches_is_made_once(bundle: Bundle, frames: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.kv_cache, "ANSWER_ROOM", 1)
    monkeypatch.setattr(runtime.kv_cache, "CACHE_BLOCK", 1)
    made: list[object] = []
    inner = runtime.ort_decoders.create_session
    monkeypatch.setattr(runtime.ort_decoders, "create_session", lambda *given: made.append(given) or inner(*given))
    backend = OrtBackend(bundle, "cpu", 1)
    backend.on_device = True
    with VideoQA.over(bundle, backend) as qa:
        video = qa.video(frames)
        for question in QUESTIONS:
            qa.ask(video, question, tokens(40))
    assert len(made) == 1


def test_one_free_cache_is_kept_and_makes_room_for_one_of_another_size(bundle: Bundle) -> None:
    backend = OrtBackend(bundle, "cpu", 1, cuda_graph=True)
    decoders = [backend.decoder(20) for _ in range(3)]
    caches = [weakref.ref(decoder.fixed) for decoder in decoders if isinstance(decoder, OrtGraphDecoder)]
    decoders.clear()
    gc.collect()
    assert sum(cache() is not None for cache in caches) == 1
    alive: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        inner = runtime.ort_decoders.FixedCache.__init__

        def counting(self: Any, *given: Any) -> None:
            alive.append(sum(cache() is not None for cache in caches))
            inner(self, *given)

        patch.setattr(runtime.ort_decoders.FixedCache, "__init__", counting)
        backend.decoder(300)
    assert alive == [0], "the smaller cache is gone before the larger one is allocated"
    backend.close()


def test_a_cache_is_cleared_on_the_device(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor of zeros comes from the host, not one for every layer."""
    backend = OrtBackend(bundle, "cpu", 1, cuda_graph=True)
    backend.decoder(20)
    uploads: list[int] = []
    inner = OrtGraphDecoder.zeros
    monkeypatch.setattr(OrtGraphDecoder, "zeros", lambda self, count: uploads.append(count) or inner(self, count))
    decoder = backend.decoder(20)
    assert isinstance(decoder, OrtGraphDecoder)
    assert uploads == [decoder.room]
    assert len(decoder.fixed.cache) == 2 * bundle.manifest.layers
    assert not any(value.numpy().any() for value in decoder.fixed.cache.values())
    backend.close()


# Tensors


def random_index(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Numbers for some leading axes, then perhaps a slice."""
    numbers = [int(random.integers(-size, size)) for size in shape[: random.integers(0, len(shape))]]
    if random.integers(2) or not numbers:
        size = shape[len(numbers)]
        numbers.append(slice(*sorted(random.integers(-size - 1, size + 2, 2).tolist())))  # type: ignore[arg-type]
    return tuple(numbers) if len(numbers) > 1 or random.integers(2) else numbers[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.uint16, np.bool_])
def test_a_tensor_is_cut_as_numpy_cuts(dtype: Any, random: np.random.Generator) -> None:
    array = random.integers(0, 100, (4, 3, 5, 2)).astype(dtype)
    tensor = DeviceTensor(OrtBlock(ort.OrtValue.ortvalue_from_numpy(array)), 0, array.shape, array.dtype)
    for _ in range(200):
        index = random_index(random, array.shape)
        found, expected = tensor[index], array[index]
        assert found.shape == expected.shape and found.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(found), expected)
        if expected.size:
            assert found.address == expected.ctypes.data
        np.testing.assert_array_equal(np.asarray(found.reshape(-1)), expected.reshape(-1))
    assert len(tensor) == 4 and tensor.nbytes == array.nbytes
    np.testing.assert_array_equal(np.asarray(tensor.reshape(6, -1, 4)), array.reshape(6, -1, 4))
    assert np.asarray(tensor, np.float64).dtype == np.float64


def test_a_tensor_on_a_device_refuses_what_would_need_a_copy() -> None:
    tensor = device_empty((4, 3), np.dtype(np.float32), "cpu")
    for index in ((slice(None), 1), (slice(0, 4, 2),), (slice(None), slice(0, 2))):
        with pytest.raises(IndexError, match="would leave gaps; copy to the host"):
            tensor[index]
    for index in (4, -5):
        with pytest.raises(IndexError, match="is outside an axis of 4"):
            tensor[index]
    with pytest.raises(ValueError, match="another number of values"):
        tensor.reshape(5, 3)
    with pytest.raises(ValueError, match="without being copied"):
        tensor.__array__(copy=False)


def test_cuda_is_given_what_it_needs_to_capture(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option goes to the decode stage's CUDA provider alone."""
    asked: dict[str, Any] = {}

    def session(source: str, options: Any, providers: Any) -> Any:
        asked[Path(source).name] = providers
        raise RuntimeError("no CUDA here")

    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    backend = OrtBackend(bundle, "cuda", None, cuda_graph=True)
    uses: list[Callable[[], object]] = [lambda: backend.graph("vision"), lambda: backend.decoder(8)]
    for use in uses:
        with pytest.raises(BackendError, match="no CUDA here") as caught:
            use()
        advice = "export the bundle again" if use is uses[0] else "leave out --cuda-graph"
        assert str(caught.value).endswith(f"; {advice}, or install a newer onnxruntime")
    assert asked["decode.onnx"] == [
        ("CUDAExecutionProvider", {"use_tf32": "0", "enable_cuda_graph": "1"}),
        ("CPUExecutionProvider", {}),
    ]
    assert asked["vision.onnx"] == [("CUDAExecutionProvider", {"use_tf32": "0"}), ("CPUExecutionProvider", {})]
