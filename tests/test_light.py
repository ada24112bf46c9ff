"""The runtime answers where torch, transformers and onnx cannot be imported, and asks for nothing heavy itself."""

import json
import subprocess
import sys
from pathlib import Path

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
