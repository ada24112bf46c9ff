"""What a build refuses ends in one line, and whatever ends it leaves old engines or none, never half of one."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import export.build
import export.engine.files as files
from export.engine.progress import Phases
from runtime.bundle import Bundle, bundle_path
from runtime.engines import Target, check_contents, engine_folder, find_engines, platform_name, read_record
from runtime.errors import BackendError
from tests.bundles import forge, replaced
from tests.commands import refused
from tests.trt.bindings import VERSIONS
from tests.trt.double import Double

Captured = pytest.CaptureFixture[str]
Build = Callable[..., str]
OLDEST, NEWEST = VERSIONS[0], VERSIONS[-1]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_path("demo-float"), tmp_path / "bundle"))


@pytest.fixture
def refusal(bundle: Path, capfd: Captured) -> Build:
    """The one line of a build that fails."""

    def build(*options: str, code: int = 1) -> str:
        return refused(capfd, [str(bundle), *options], code, export.build.main)

    return build


def folder(bundle: Path, version: str = OLDEST) -> Path:
    target = Target(gpu="Orin", sm=(8, 7), processors=8, tensorrt=version, platform=platform_name(), cuda=(12, 6))
    return engine_folder(Bundle.open(bundle), target)


def usable(bundle: Path, version: str = OLDEST) -> bool:
    """Whether the runtime would take all engines."""
    target = Target(gpu="Orin", sm=(8, 7), processors=8, tensorrt=version, platform=platform_name(), cuda=(12, 6))
    try:
        find_engines(Bundle.open(bundle), target)
    except BackendError:
        return False
    return True


def snapshot(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else {}


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--max", "size=3"], 2, "expected KEY=N with a key of batch, frames, text, tokens"),
        (["--max", "frames"], 2, "expected KEY=N"),
        (["--max", "frames=0"], 2, "expected a whole number from 1 on"),
        (["--opt", "tokens=-3"], 2, "expected a whole number from 1 on"),
        (["--min", "tokens=1,tokens=2"], 2, "comes twice"),
        (["--max", "frames=33"], 1, "--max has frames=33, expected 3 to 32"),
        (["--min", "frames=2"], 1, "--min has frames=2, expected 3 to 32"),
        (["--max", "tokens=513"], 1, "--max has tokens=513, expected 2 to 512"),
        (["--opt", "text=600"], 1, "--opt has text=600, expected 1 to 512"),
        (["--min", "frames=9", "--max", "frames=8"], 1, "frames has min 9"),
        (["--opt", "tokens=400", "--max", "tokens=300"], 1, "opt 400 and max 300"),
        (["--workspace", "0"], 1, "--workspace is 0, expected 1 to"),
        (["--max-memory", "-5"], 1, "--max-memory is -5, expected 1 to"),
        (["--optimization-level", "6"], 1, "--optimization-level is 6, expected 0 to 5"),
        (["--stages", "vision", "llm"], 1, "--stages names 'llm', expected some of vision, refine, aggregate, decode"),
        (["--device-memory", "100"], 2, "go with --dry-run"),
        (["--tensorrt", "10.3"], 2, "go with --dry-run"),
        (["--dry-run", "--device-memory", "0"], 2, "expected 1 MiB or more"),
        (["--dry-run", "--tensorrt", "9.9"], 1, "expected a version from 10.3 on"),
    ],
)
def test_options_that_do_not_fit_are_refused(refusal: Build, options: list[str], code: int, said: str) -> None:
    assert said in refusal(*options, code=code)


def test_groups_of_frames_are_kept_whole(plain_bundle: Path, tmp_path: Path, capfd: Captured) -> None:
    grouped = forge(plain_bundle, tmp_path / "grouped", edit=replaced("frames/group", 2))
    line = refused(capfd, [str(grouped), "--max", "batch=3"], 1, export.build.main)
    assert "batch=3" in line and "whole groups of 2" in line


@pytest.mark.parametrize("key", ["frames", "text"])
def test_sizes_of_stages_that_are_not_there_are_refused(plain_bundle: Path, key: str, capfd: Captured) -> None:
    line = refused(capfd, [str(plain_bundle), "--max", f"{key}=8"], 1, export.build.main)
    assert "this bundle has no LinVT" in line


def test_where_tensorrt_is_missing_it_says_what_to_install(refusal: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    line = refusal()
    assert "linvt-edge[tensorrt]" in line and "--system-site-packages" in line


def test_where_no_gpu_is_it_says_so(refusal: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    with Double(version=OLDEST):
        monkeypatch.setitem(sys.modules, "cuda", None)
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        assert "engines are built on the GPU that runs them" in refusal("--no-plugin")


def test_a_node_that_tensorrt_would_refuse_is_named_before_anything_is_built(
    bundle: Path, tmp_path: Path, capfd: Captured
) -> None:
    model = onnx.load(bundle / "vision.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Gelu")
    node.op_type, node.name = "HardSwish", "odd"
    del node.attribute[:]
    forged = forge(bundle, tmp_path / "forged", vision__onnx=model.SerializeToString())
    with Double(version=OLDEST) as double:
        line = refused(capfd, [str(forged)], 1, export.build.main)
        assert "HardSwish odd" in line and "export.check" in line
        assert not double.builds
    assert not (forged / "engines").exists()


def test_graphs_in_each_others_place_are_refused_in_one_line(bundle: Path, tmp_path: Path, capfd: Captured) -> None:
    vision, refine = ((bundle / f"{stage}.onnx").read_bytes() for stage in ("vision", "refine"))
    swapped = forge(bundle, tmp_path / "swapped", vision__onnx=refine, refine__onnx=vision)
    line = refused(capfd, [str(swapped), "--dry-run", "--tensorrt", "10.3"], 1, export.build.main)
    assert "is not as bundle.json says: found " in line and "export the bundle again" in line


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_what_the_parser_refuses_is_one_line_with_the_node(refusal: Build, bundle: Path, version: str) -> None:
    with Double(version=version) as double:
        double.refuse["Conv"] = "no kernel of\n this size"
        line = refusal("--no-plugin")
        assert "vision" in line and "Conv" in line and "no kernel of this size" in line
    assert not usable(bundle, version)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_a_build_that_fails_says_what_tensorrt_said(refusal: Build, bundle: Path, version: str) -> None:
    with Double(version=version) as double:
        double.fail_build = "Could not find any implementation for node\n ForeignNode"
        line = refusal("--no-plugin")
        assert "built no engine of vision" in line and "any implementation for node ForeignNode" in line
    assert not [path for path in folder(bundle, version).iterdir() if path.suffix in (".engine", ".json")]


def test_too_little_memory_is_refused_before_anything_is_built(refusal: Build, bundle: Path) -> None:
    with Double(version=OLDEST) as double:
        line = refusal("--max-memory", "15", "--workspace", "1", "--no-plugin")
        assert "15 MiB are free; give --max tokens=" in line
        assert not double.builds
        assert not (bundle / "engines").exists()
        assert export.build.main([str(bundle), "--max-memory", "15", "--workspace", "1", "--no-plugin", "--force"]) == 0


def test_a_folder_that_is_a_file_is_refused(refusal: Build, bundle: Path) -> None:
    (bundle / "engines").write_text("not a folder")
    with Double(version=OLDEST):
        assert "cannot write" in refusal("--no-plugin")
    assert (bundle / "engines").read_text() == "not a folder"


def test_a_bundle_that_may_not_be_written_is_refused(
    refusal: Build, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with Double(version=OLDEST):
        monkeypatch.setattr(Path, "mkdir", denied)
        line = refusal("--no-plugin")
    assert "cannot write" in line and "Permission denied" in line


def full(at: int) -> Callable[[int], None]:
    """An fsync that finds the disk full at its n-th call."""
    calls = iter(range(at + 1))

    def fsync(handle: int) -> None:
        if next(calls, at) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fsync


@pytest.mark.parametrize("at", [0, 1, 2], ids=["at the timing cache", "at the engine", "at the record"])
def test_a_full_disk_leaves_the_engines_that_were_there(
    bundle: Path, at: int, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    with Double(version=OLDEST):
        assert export.build.main([str(bundle), "--no-plugin"]) == 0
        before = snapshot(folder(bundle))
        monkeypatch.setattr(files.os, "fsync", full(at))
        line = refused(capfd, [str(bundle), "--no-plugin", "--force", "--workspace", "3"], 1, export.build.main)
        assert "No space left on device" in line
        after = snapshot(folder(bundle))
    before.pop("timing.cache"), after.pop("timing.cache")
    assert after == before and usable(bundle)


def test_an_interrupted_build_keeps_what_is_done_and_removes_what_is_not(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    step, stages = Phases.step, []

    def interrupted(self: Phases, name: str, number: int) -> None:
        step(self, name, number)
        if number == 0:
            stages.append(name)
        if len(stages) == 2 and number == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Phases, "step", interrupted)
    with Double(version=OLDEST) as double:
        assert export.build.main([str(bundle), "--no-plugin"]) == 130
        assert len(double.builds) == 1
        assert double.leaks() == []
    assert capfd.readouterr().err.splitlines()[-1] == "linvt-build: interrupted"
    assert {path.name for path in folder(bundle).iterdir()} == {"vision.engine", "vision.json", "timing.cache"}
    monkeypatch.setattr(Phases, "step", step)
    with Double(version=OLDEST) as double:
        assert export.build.main([str(bundle), "--no-plugin"]) == 0
        assert len(double.builds) == 3
    assert usable(bundle)


KILLED = """
import os, signal, sys
from tests.trt.double import Double
import export.build
import export.engine.files as files
at, name = int(sys.argv[1]), sys.argv[2]
calls = iter(range(at + 1))
real = getattr(os, name)
def killing(*arguments, **named):
    if next(calls, at) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **named)
setattr(os, name, killing)
with Double(version=sys.argv[3]):
    export.build.main([*sys.argv[4:], "--no-plugin", "--force", "--workspace", "3"])
"""


def test_a_killed_build_leaves_no_engine_that_is_not_its_records(bundle: Path, random: np.random.Generator) -> None:
    with Double(version=OLDEST):
        assert export.build.main([str(bundle), "--no-plugin"]) == 0
    for name, at in (("fsync", int(random.integers(0, 12))), ("replace", int(random.integers(0, 12)))):
        script = [sys.executable, "-c", KILLED, str(at), name, OLDEST, str(bundle)]
        done = subprocess.run(
            script, capture_output=True, text=True, check=False, timeout=120, cwd=Path(__file__).parents[1]
        )
        assert done.returncode == -signal.SIGKILL, (name, at, done.stderr)
        for path in folder(bundle).glob("*.json"):
            check_contents(path.with_suffix(".engine"), read_record(path))
    with Double(version=OLDEST):
        assert export.build.main([str(bundle), "--no-plugin"]) == 0
    assert usable(bundle)
    assert not [path for path in folder(bundle).iterdir() if path.name.startswith(".")]
