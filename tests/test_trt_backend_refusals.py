"""Engines that do not fit, files that are none, and requests above what engines were built for: each is one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime.engines
from runtime import BackendError, GenerationOptions, LinvtError, OptionError, QuestionError, VideoQA
from runtime.bundle import bundle_path
from runtime.errors import DependencyError
from tests.bundles import replaced
from tests.engines import edited_record, engines_of, with_engines
from tests.trt.double import Double

VERSION = "10.3.0"
QUESTION = "How many digits are there?"
COMMAND = "python -m export.build"
MANY = "8 multiprocessors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines for few frames, short questions and short answers."""
    target = tmp_path_factory.mktemp("whole") / "bundle"
    return with_engines(bundle_path("demo-float"), target, VERSION, sizes="tokens=80,frames=10,text=12")


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    """A copy that may be spoiled."""
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def opened(bundle: Path, **options: Any) -> None:
    """Open every engine."""
    with VideoQA.open(bundle, backend="tensorrt", **options) as qa:
        for stage in qa.bundle.manifest.stages:
            qa.backend.graph(stage)


def refusal(bundle: Path, double: Double, *, kind: type[LinvtError] = BackendError, **options: Any) -> str:
    """The one line with which opening every engine is refused; nothing is left over."""
    with pytest.raises(kind) as caught:
        opened(bundle, **options)
    line = str(caught.value)
    del caught
    assert "\n" not in line and len(line) < 700, line
    assert double.leaks() == []
    return line


# Records


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({"version": "10.9.0.34"}, ["TensorRT 10.9.0.34", "there are some for orin-sm87-trt10.3.0"]),
        ({"sm": (8, 9)}, ["there are some for orin-sm87-trt10.3.0"]),
        ({"name": "NVIDIA Thor"}, ["NVIDIA Thor", "there are some for orin-sm87-trt10.3.0"]),
    ],
)
def test_engines_of_another_machine(bundle: Path, machine: dict[str, Any], said: list[str]) -> None:
    with Double(**{"version": VERSION, **machine}) as double:
        line = refusal(bundle, double)
    assert COMMAND in line and all(words in line for words in said), line


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({"version": "10.9.0.34"}, "TensorRT 10.3.0, here is 10.9.0.34"),
        ({"sm": (8, 9)}, f"GPU Orin (compute capability 8.7, {MANY}), here is Orin (compute capability 8.9, {MANY})"),
        (
            {"name": "Xavier"},
            f"GPU Orin (compute capability 8.7, {MANY}), here is Xavier (compute capability 8.7, {MANY})",
        ),
    ],
)
def test_engines_that_were_moved_to_another_machine(bundle: Path, machine: dict[str, Any], said: str) -> None:
    with Double(**{"version": VERSION, **machine}) as double:
        folder = engines_of(bundle)
        name = f"{machine.get('name', 'orin').lower()}-sm{''.join(map(str, machine.get('sm', (8, 7))))}"
        folder.rename(folder.with_name(f"{name}-trt{machine.get('version', VERSION)}"))
        line = refusal(bundle, double)
    assert said in line and COMMAND in line, line


def test_another_platform(bundle: Path) -> None:
    here = runtime.engines.platform_name()
    edited_record(bundle, "refine", replaced("target/platform", "linux-sparc"))
    with Double(version=VERSION) as double:
        line = refusal(bundle, double)
    assert f"refine.engine does not fit: it is of platform linux-sparc, here is {here}" in line and COMMAND in line


def test_another_graph(bundle: Path) -> None:
    edited_record(bundle, "vision", replaced("graph", "0" * 64))
    with Double(version=VERSION) as double:
        line = refusal(bundle, double)
    assert "it is of graph 000000000000, here is " in line and COMMAND in line


def test_a_cut_engine(bundle: Path) -> None:
    path = engines_of(bundle) / "decode.engine"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    with Double(version=VERSION) as double:
        assert f"it is of size {size} bytes, here is {size - 10} bytes" in refusal(bundle, double)
        path.unlink()
        assert f"it is of size {size} bytes, here is no file" in refusal(bundle, double)


def test_an_altered_engine_is_found_when_it_is_hashed(bundle: Path) -> None:
    path = engines_of(bundle) / "aggregate.engine"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with Double(version=VERSION) as double:
        assert "aggregate.engine is altered: its SHA-256 is not its record's" in refusal(bundle, double, verify=True)
        assert "TensorRT does not take" in refusal(bundle, double)


@pytest.mark.parametrize("data", [b"", b"not an engine at all", b"\0" * 1000])
def test_a_file_that_is_no_engine(bundle: Path, data: bytes) -> None:
    """TensorRT says why in its log alone."""
    (engines_of(bundle) / "refine.engine").write_bytes(data)
    edited_record(bundle, "refine", replaced("size", len(data)))
    with Double(version=VERSION) as double:
        line = refusal(bundle, double)
    assert "refine.engine" in line and COMMAND in line
    assert ("Magic tag does not match" if data else "cannot be read") in line


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"a":' * 10**5])
def test_a_record_that_is_none(bundle: Path, data: bytes) -> None:
    (engines_of(bundle) / "refine.json").write_bytes(data)
    with Double(version=VERSION) as double:
        assert "refine.json is not an engine's record" in refusal(bundle, double)


def test_a_stage_that_was_not_built(bundle: Path) -> None:
    (engines_of(bundle) / "refine.json").unlink()
    with Double(version=VERSION) as double:
        line = refusal(bundle, double)
    assert "has no refine engine for Orin and TensorRT 10.3.0; run: " in line and COMMAND in line


def test_an_engine_of_another_board_of_the_same_name(bundle: Path) -> None:
    edited_record(bundle, "decode", replaced("target/processors", 16))
    with Double(version=VERSION) as double:
        line = refusal(bundle, double)
    assert "of GPU Orin (compute capability 8.7, 16 multiprocessors), here is Orin" in line and COMMAND in line


def test_an_engine_with_other_tensors(bundle: Path) -> None:
    edited_record(bundle, "vision", lambda record: record["inputs"].append({"name": "more", "dtype": "float32"}))
    with Double(version=VERSION) as double:
        assert "vision.engine has other tensors than bundle.json says" in refusal(bundle, double)


def test_no_tensorrt_and_no_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DependencyError, match=r"^tensorrt is not installed; run: pip install 'linvt-edge\[tensorrt\]'"):
        opened(bundle)
    said = {
        "cudaErrorNoDevice": "(100): CUDA finds no NVIDIA GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES",
        "cudaErrorInsufficientDriver": "(35): cuda-python is newer than the NVIDIA driver; install the driver's CUDA, "
        "e.g. 'cuda-python==12.6.*'",
        "cudaErrorSystemNotReady": "(802)",
    }
    for name, reason in said.items():
        with Double(version=VERSION) as double:
            refused = (getattr(double.cuda_runtime.cudaError_t, name), None)
            monkeypatch.setattr(double.cuda_runtime, "cudaGetDeviceProperties", lambda device, refused=refused: refused)
            line = refusal(bundle, double)
            assert line == f"TensorRT cannot use the GPU: cudaGetDeviceProperties failed with {name} {reason}"


# Requests


@pytest.fixture
def qa(whole: Path) -> Any:
    with Double(version=VERSION), VideoQA.open(whole, backend="tensorrt") as opened:
        yield opened


@pytest.fixture
def frames(random: np.random.Generator) -> Any:
    return random.integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)


def test_more_frames_than_the_engines_take(qa: VideoQA, frames: Any) -> None:
    for ask in (lambda: qa.video(frames), lambda: qa.video(frames, frames=16), lambda: qa.video(frames, fps=1)):
        with pytest.raises(OptionError) as caught:
            ask()
        assert str(caught.value) == (
            "16 frames asked for, the engines here take at most 10; ask for fewer, or build the engines again with "
            "--max frames=16"
        )
    assert qa.video(frames, frames=10).frames == 10
    with pytest.raises(OptionError, match="the bundle takes 3 to"):
        qa.video(frames, frames=10**6)


def test_the_default_number_of_frames_is_what_the_engines_take(tmp_path: Path, frames: Any) -> None:
    path = with_engines(bundle_path("demo-float"), tmp_path / "bundle", VERSION, sizes="tokens=80,frames=4")
    with Double(version=VERSION), VideoQA.open(path, backend="tensorrt") as qa:
        assert qa.bundle.manifest.frames.default > 4
        assert qa.video(frames, start=0).frames == 4


def test_a_question_longer_than_the_engine_takes(qa: VideoQA, frames: Any) -> None:
    question = "Which digit is red, and which one is green, and is there a blue one?"
    with pytest.raises(QuestionError) as caught:
        qa.ask("/nowhere.mp4", question)
    assert "the engines here take at most 12; shorten the question, or build the engines again with --max text=" in (
        str(caught.value)
    )
    video = qa.video(frames, frames=4)
    with pytest.raises(QuestionError, match="the engines here take at most 12"):
        qa.ask(video, question)
    assert qa.ask(qa.images(frames[0]), question).text, "LinVT reads no question about pictures"


def test_a_prompt_longer_than_the_engine_takes(qa: VideoQA, frames: Any) -> None:
    video = qa.video(frames, frames=4)
    history = [(QUESTION, "There are three of them, all red.")] * 4
    with pytest.raises(QuestionError) as caught:
        qa.ask(video, QUESTION, history=history)
    line = str(caught.value)
    assert "tokens, the engines here hold 80 with the answer; shorten the question, or build the engines again" in line
    assert "--max tokens=" in line


def test_an_answer_ends_where_the_engine_does(qa: VideoQA, frames: Any) -> None:
    answer = qa.ask(frames[:4], QUESTION, GenerationOptions(max_new_tokens=500, ignore_eos=True))
    assert answer.prompt_tokens + len(answer.token_ids) == 80
    assert answer.finish_reason == "length"


def test_shapes_outside_of_a_profile(qa: VideoQA, random: np.random.Generator) -> None:
    """What the limits cannot say: ``--min`` made the least larger than the bundle's."""
    rows = random.normal(size=(1, 2, 16, 160)).astype(np.float32)
    with pytest.raises(BackendError) as caught:
        qa.backend.graph("refine").run({"tokens": rows[:, :0]})
    line = str(caught.value)
    assert "refine.engine was built for tokens of [1, 3, 16, 160] to [1, 10, 16, 160], found [1, 0, 16, 160]" in line
    assert COMMAND in line


def test_failures_of_the_device_are_translated(qa: VideoQA, frames: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they arrive late, when something is waited for."""
    import kernels.cuda

    failing: Callable[..., Any] = lambda handle: (kernels.cuda.runtime().cudaError_t.cudaErrorIllegalAddress,)  # noqa: E731
    monkeypatch.setattr(kernels.cuda.runtime(), "cudaStreamSynchronize", failing)
    with pytest.raises(BackendError, match=r"^TensorRT failed to compute: cudaStreamSynchronize failed with cudaError"):
        qa.video(frames, frames=4)
    monkeypatch.undo()


def test_least_sizes_are_filled_up(tmp_path: Path, frames: Any) -> None:
    """Engines of one batch size, and of more frames than the bundle asks for."""
    path = with_engines(
        bundle_path("demo-float"),
        tmp_path / "bundle",
        VERSION,
        "--min",
        "batch=4,frames=6",
        sizes="tokens=96,frames=12,batch=4",
    )
    with VideoQA.open(path, backend="cpu") as cpu:
        answers = [cpu.ask(cpu.video(frames[:count]), QUESTION).token_ids for count in (6, 9)]
        features = cpu.images(frames[0]).features
    with Double(version=VERSION), VideoQA.open(path, backend="tensorrt") as qa:
        assert (qa.backend.limits.least_batch, qa.backend.limits.least_frames) == (4, 6)
        assert [qa.ask(qa.video(frames[:count]), QUESTION).token_ids for count in (6, 9)] == answers
        np.testing.assert_allclose(np.asarray(qa.images(frames[0]).features), features, atol=1e-5)
        assert qa.video(frames[:2], end=2).frames >= 6, "a shorter video repeats frames"
        with pytest.raises(OptionError, match="5 frames asked for, the bundle takes 6 to"):
            qa.video(frames, frames=5)
