"""Where a bundle runs, and that it is said: engines that fit, else CUDA, else the CPU; options that mean nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from PIL import Image

import kernels.cuda
import runtime.inspect
import runtime.run
from runtime import BackendError, OptionError, VideoQA
from runtime.bundle import Bundle, bundle_path
from runtime.choose_backend import Choice, choose_backend
from runtime.errors import DependencyError
from tests.commands import Captured, refused
from tests.engines import edited_record, engines_of, with_engines
from tests.trt.double import Double

VERSION = "11.4.0.106"
NO_CUDA = "ONNX Runtime has no CUDA here"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float demo with engines."""
    target = tmp_path_factory.mktemp("built") / "bundle"
    return with_engines(bundle_path("demo-float"), target, VERSION, sizes="tokens=96,frames=8")


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])


def cuda_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    monkeypatch.setattr("runtime.ort_provider.cuda_failure", lambda: "")


# What is chosen


def test_engines_that_fit_come_first(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_is_here(monkeypatch)
    with Double(version=VERSION):
        assert choose_backend(Bundle.open(built), "auto") == Choice("tensorrt", "engines fit this device")
        with VideoQA.open(built) as qa:
            assert (qa.backend.name, qa.backend.reason) == ("tensorrt", "engines fit this device")
        assert choose_backend(Bundle.open(built), "cpu") == Choice("cpu")
        assert choose_backend(Bundle.open(built), "cuda") == Choice("cuda")


def test_without_engines_cuda_comes_next(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_is_here(monkeypatch)
    assert choose_backend(Bundle.open(built), "auto") == Choice("cuda", "tensorrt is not installed")
    found = choose_backend(Bundle.open("demo"), "auto")
    assert found.name == "cuda" and found.reason.startswith("no TensorRT engines were built (python -m export.build ")


def test_the_cpu_comes_last_and_says_what_is_missing(built: Path) -> None:
    assert choose_backend(Bundle.open(built), "auto") == Choice("cpu", f"tensorrt is not installed; {NO_CUDA}")
    with Double(version="10.3.0"):
        found = choose_backend(Bundle.open(built), "auto")
    assert found.name == "cpu"
    assert "has no engines for Orin and TensorRT 10.3.0 (there are some for orin-sm87-trt11.4.0.106)" in found.reason
    with Double(version=VERSION) as double, pytest.MonkeyPatch.context() as patch:
        refused = (double.cuda_runtime.cudaError_t.cudaErrorInsufficientDriver, None)
        patch.setattr(double.cuda_runtime, "cudaGetDeviceProperties", lambda device: refused)
        found = choose_backend(Bundle.open(built), "auto")
    assert found.name == "cpu"
    assert found.reason == (
        "TensorRT cannot use the GPU: cudaGetDeviceProperties failed with cudaErrorInsufficientDriver (35): "
        f"cuda-python is newer than the NVIDIA driver; {NO_CUDA}"
    )


def test_engines_that_do_not_fit_are_passed_over_with_the_difference(built: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(built, tmp_path / "bundle"))
    edited_record(bundle, "vision", lambda record: record.update(graph="0" * 64))
    with Double(version=VERSION):
        found = choose_backend(Bundle.open(bundle), "auto")
        assert found.name == "cpu" and "it is of graph 000000000000, here is" in found.reason
        with pytest.raises(BackendError, match="it is of graph 000000000000, here is"):
            choose_backend(Bundle.open(bundle), "tensorrt")


@pytest.mark.parametrize(
    "broken", ["import nowhere", "raise OSError('libnvinfer.so.11: cannot open shared object file')"]
)
def test_a_tensorrt_that_does_not_load(
    built: Path, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text(broken)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DependencyError) as caught:
        choose_backend(Bundle.open(built), "tensorrt")
    sys.modules.pop("tensorrt", None)
    assert "nowhere" in str(caught.value) or "libnvinfer.so.11" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bundle_without_engines_imports_no_tensorrt() -> None:
    code = (
        "import sys; from runtime import VideoQA; qa = VideoQA.open('demo');"
        "print(qa.backend.name, sorted({'tensorrt', 'cuda'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "cpu []\n", done.stderr


# ONNX Runtime's CUDA provider


@pytest.mark.parametrize("version", ["1.24.4", "1.24.0+cu126", "1.9.0"])
def test_a_cuda_provider_without_attention_is_not_chosen_and_noted(
    built: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_is_here(monkeypatch)
    monkeypatch.setattr("onnxruntime.__version__", version)
    note = (
        f"ONNX Runtime {version} computes attention on the CPU, and takes the KV cache there for every token; install "
        "onnxruntime-gpu 1.25 or newer"
    )
    assert choose_backend(Bundle.open(built), "auto") == Choice("cpu", f"tensorrt is not installed; {note}")
    with VideoQA.open(built, backend="cuda") as qa:
        assert (qa.backend.name, qa.backend.notes) == ("cuda", [note])


@pytest.mark.parametrize("version", ["1.25.0", "1.32.0", "2.0.0.dev1"])
def test_a_cuda_provider_with_attention_is_chosen(built: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_is_here(monkeypatch)
    monkeypatch.setattr("onnxruntime.__version__", version)
    assert choose_backend(Bundle.open(built), "auto").name == "cuda"
    with VideoQA.open(built, backend="cuda") as qa:
        assert qa.backend.notes == []


def test_cuda_that_does_not_start_is_refused_at_once_with_the_reason(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_is_here(monkeypatch)
    reason = "libcudnn.so.9: cannot open shared object file: No such file or directory"
    monkeypatch.setattr("runtime.ort_provider.cuda_failure", lambda: reason)
    said = f"CUDA does not start in ONNX Runtime {onnxruntime.__version__}: {reason}"
    assert choose_backend(Bundle.open(built), "auto") == Choice("cpu", f"tensorrt is not installed; {said}")
    with pytest.raises(BackendError) as caught:
        VideoQA.open(built, backend="cuda")
    assert str(caught.value) == f"{said}; check the NVIDIA driver, CUDA and cuDNN, or use --backend cpu"


# Options


def test_options_that_mean_nothing_are_refused(built: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured) -> None:
    why = f" (tensorrt is not installed; {NO_CUDA})"
    uses: list[tuple[dict[str, Any], str]] = [({"backend": "cpu"}, ""), ({"backend": "auto"}, why)]
    for options, reason in uses:
        with pytest.raises(OptionError) as caught:
            VideoQA.open(built, low_memory=True, **options)
        assert str(caught.value) == f"low_memory is about TensorRT engines, and this runs on cpu{reason}; leave it out"
        with pytest.raises(OptionError) as caught:
            VideoQA.open(built, cuda_graph=True, **options)
        assert str(caught.value) == f"cuda_graph is about NVIDIA GPUs, and this runs on cpu{reason}; leave it out"
    cuda_is_here(monkeypatch)
    with pytest.raises(OptionError, match="low_memory is about TensorRT engines, and this runs on cuda"):
        VideoQA.open(built, backend="cuda", low_memory=True)
    VideoQA.open(built, backend="cuda", cuda_graph=True).close()
    with Double(version=VERSION):
        VideoQA.open(built, cuda_graph=True, low_memory=True).close()
    assert "low_memory is about" in refused(capfd, ["demo", "--backend", "cpu", "--low-memory"])
    assert "cuda_graph is about" in refused(capfd, ["demo", "--backend", "cpu", "--cuda-graph"])


# Commands


def test_a_run_says_where_and_why(built: Path, capfd: Captured) -> None:
    sample = str(Path(runtime.run.__file__).parent / "demo" / "sample.mp4")
    asked = [str(built), sample, "Which digits are there?", "-v", "--json", "--max-new-tokens", "4"]
    assert runtime.run.main(asked) == 0
    output, said = capfd.readouterr()
    assert f"backend cpu (tensorrt is not installed; {NO_CUDA})" in said
    expected = json.loads(output)
    with Double(version=VERSION):
        assert runtime.run.main([*asked, "--low-memory", "--verify"]) == 0
    output, said = capfd.readouterr()
    assert "backend tensorrt (engines fit this device)" in said
    found = json.loads(output)
    assert (found["token_ids"], found["backend"]) == (expected["token_ids"], "tensorrt")
    assert found.keys() == expected.keys() and found["milliseconds"].keys() == expected["milliseconds"].keys()


def test_notes_are_shown_when_asked(
    built: Path, tmp_path: Path, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = str(tmp_path / "a.png")
    Image.new("RGB", (64, 64), "red").save(picture)

    def refused(*arguments: object) -> None:
        raise kernels.cuda.CudaError("cudaStreamBeginCapture failed")

    monkeypatch.setattr(kernels.cuda, "capture", refused)
    note = "decoding runs without a CUDA graph: cudaStreamBeginCapture failed"
    for form, shown in ((["-v"], True), ([], False)):
        with Double(version=VERSION):
            asked = [str(built), "Who?", "--image", picture, "--ignore-eos", "--max-new-tokens", "6"]
            assert runtime.run.main([*asked, "--backend", "tensorrt", *form]) == 0
        assert (note in capfd.readouterr().err) is shown


def test_inspect_lists_engines(built: Path, capfd: Captured) -> None:
    assert runtime.inspect.main([str(built)]) == 0
    output = capfd.readouterr().out
    assert "engines     orin-sm87-trt11.4.0.106: not here: tensorrt is not installed\n" in output
    with Double(version=VERSION):
        assert runtime.inspect.main([str(built)]) == 0
        output = capfd.readouterr().out
        assert "engines     orin-sm87-trt11.4.0.106: fit this device\n" in output
        for words in (
            "    vision    ",
            "pixel_values [1, 3, 64, 64] to [4, 3, 64, 64]",
            "inputs_embeds [1, 1, 160] to [1, 96, 160]; position_ids [1, 1] to [1, 96] | one shape",
        ):
            assert words in output, output
        assert runtime.inspect.main([str(built), "--json"]) == 0
        (found,) = json.loads(capfd.readouterr().out)["engines"]
        assert found["unfit"] == "" and found["records"]["decode"]["target"]["tensorrt"] == VERSION
    with Double(version="10.3.0"):
        assert runtime.inspect.main([str(built)]) == 0
        assert "not here: vision: it is of TensorRT 11.4.0.106, here is 10.3.0" in capfd.readouterr().out


@pytest.mark.parametrize("spoil", ["record", "engine", "stage"])
def test_inspect_says_what_is_wrong_with_engines(built: Path, tmp_path: Path, capfd: Captured, spoil: str) -> None:
    bundle = Path(shutil.copytree(built, tmp_path / "bundle"))
    folder = engines_of(bundle)
    said = {"record": "refine.json is not an engine's record", "engine": "here is no file", "stage": "is missing"}
    if spoil == "record":
        (folder / "refine.json").write_text("{}")
    elif spoil == "engine":
        (folder / "refine.engine").unlink()
    else:
        (folder / "refine.json").unlink()
    with Double(version=VERSION):
        assert runtime.inspect.main([str(bundle)]) == 0
    assert said[spoil] in capfd.readouterr().out
