"""The runtime answers where torch, transformers and onnx cannot be imported, and asks for nothing heavy itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import runtime
from tests.videos import write_video

HEAVY = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "huggingface_hub", "requests")
HEAVY += ("sklearn", "scipy", "tqdm", "optimum", "export", "calibration")
BLOCKED = f"import sys; sys.modules.update(dict.fromkeys({HEAVY}))"


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def answered_without_heavy_packages(bundle: str, *video_and_question: str) -> str:
    """The answer of a process in which importing a heavy package raises; "demo" names the demo."""
    code = f"{BLOCKED}; from runtime.run import main; sys.exit(main(sys.argv[1:]))"
    done = python(code, bundle, *video_and_question, "--json", "--max-new-tokens", "8")
    assert (done.returncode, done.stderr) == (0, "")
    answer: str = json.loads(done.stdout)["answer"]
    return answer


def test_it_answers_without_torch(linvt_bundle: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.mp4")
    assert answered_without_heavy_packages(str(linvt_bundle), str(video), "What happens?")


def test_a_bundle_is_inspected_without_torch(linvt_bundle: Path) -> None:
    code = f"{BLOCKED}; from runtime.inspect import main; sys.exit(main(sys.argv[1:]))"
    assert "internvl2" in python(code, str(linvt_bundle)).stdout


def test_importing_the_runtime_imports_nothing_heavy() -> None:
    code = (
        "import time; begin = time.perf_counter(); import runtime.run, runtime.inspect, runtime.backend_ort, json, sys;"
        "print(json.dumps([sorted({name.split('.')[0] for name in sys.modules}), time.perf_counter() - begin]))"
    )
    modules, seconds = json.loads(python(code).stdout)
    print(f"import runtime.run: {seconds:.2f} s")
    assert not set(HEAVY) & set(modules)


def test_public_names_are_there_and_others_are_not() -> None:
    for name in runtime.__all__:
        assert getattr(runtime, name).__name__ == name and name in dir(runtime)
    with pytest.raises(AttributeError, match="module 'runtime' has no attribute 'VideoQa'"):
        runtime.VideoQa  # noqa: B018


INTERRUPTED_AT_AN_IMPORT = """
import runpy, signal, sys

_, command, package, *arguments = sys.argv

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == package:
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
sys.meta_path.insert(0, Interrupting())
sys.argv = [command, *arguments]
runpy.run_module(command, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("command", "package", "arguments"),
    [
        ("runtime.run", "numpy", []),
        ("runtime.run", "onnxruntime", []),
        ("runtime.inspect", "numpy", ["demo"]),
        ("calibration", "numpy", ["demo-float", "clips", "-o", "out"]),
        ("export", "torch", ["checkpoint", "-o", "out"]),
        ("export.compare", "numpy", ["demo", "checkpoint"]),
        ("export.check", "numpy", ["demo"]),
        ("export.build", "numpy", ["demo", "--dry-run"]),
    ],
)
def test_a_command_is_interrupted_in_one_line_while_it_loads(command: str, package: str, arguments: list[str]) -> None:
    """Until then it has imported nothing that takes long."""
    done = python(INTERRUPTED_AT_AN_IMPORT, command, package, *arguments)
    program = {"calibration": "calibrate"}.get(command, command.rpartition(".")[2])
    *before, last = done.stderr.splitlines()
    assert (done.returncode, last) == (130, f"linvt-{program}: interrupted"), done.stderr
    assert before in ([], ["sample.mp4: What is happening in this video?"])  # which linvt-run says when it begins
