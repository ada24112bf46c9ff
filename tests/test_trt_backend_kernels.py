"""Engines of TensorRT 10.3 launch kernels through this package: the build keeps them beside the engine.

So neither a package with other kernels nor kernels from elsewhere (``--ptx``) come between an engine and its run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import export.build
import kernels.ptx
import runtime.inspect
from kernels.ptx import SHIPPED, read_index
from runtime import BackendError, VideoQA
from runtime.bundle import Bundle, bundle_path
from runtime.choose_backend import choose_backend
from tests import trt_fixtures
from tests.commands import Captured
from tests.engines import QUESTIONS, Built, engines_of, on_the_cpu, tokens, with_engines
from tests.trt.double import Double

VERSION = "10.3.0"

built = trt_fixtures.built


@pytest.fixture
def bundle(built: Built, tmp_path: Path) -> Path:
    """A copy that may be spoiled."""
    return Path(shutil.copytree(built(VERSION), tmp_path / "bundle"))


@pytest.fixture
def frames(random: np.random.Generator) -> Any:
    return random.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)


def folder_of(sm: int, target: Path) -> Path:
    """The package's kernels for one architecture, as ``kernels.compile`` would make a folder of them."""
    index = read_index(SHIPPED)
    chosen = tuple(entry for entry in index.kernels if entry.sm == sm)
    target.mkdir()
    for entry in chosen:
        shutil.copy(SHIPPED / entry.file, target)
    (target / "index.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(index, kernels=chosen)))
    return target


def answers(bundle: Path, frames: Any) -> list[Any]:
    with VideoQA.open(bundle, backend="tensorrt") as qa:
        return [qa.ask(frames, question, tokens(8)).token_ids for question in QUESTIONS]


def test_the_kernel_that_is_launched_lies_beside_the_engine(bundle: Path, frames: Any) -> None:
    folder = engines_of(bundle) / "ptx"
    (entry,) = read_index(folder).kernels
    assert (entry.sm, entry.scales) == (87, (1, 2, 4))
    assert {path.name for path in folder.iterdir()} == {"index.json", entry.file}
    with Double(version=VERSION) as double:
        assert answers(bundle, frames) == on_the_cpu(bundle, frames, count=8)
        assert len(double.launches) == 2
        assert double.leaks() == []


def test_another_package_changes_nothing(
    bundle: Path, frames: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.ptx, "SHIPPED", folder_of(90, tmp_path / "later"))
    with Double(version=VERSION):
        assert choose_backend(Bundle.open(bundle), "auto").name == "tensorrt"
        assert answers(bundle, frames) == on_the_cpu(bundle, frames, count=8)


def test_kernels_from_elsewhere_are_taken_along(tmp_path: Path, frames: Any) -> None:
    other = folder_of(80, tmp_path / "other")
    path = with_engines(bundle_path("demo-float"), tmp_path / "bundle", VERSION, "--ptx", str(other))
    shutil.rmtree(other)
    (entry,) = read_index(engines_of(path) / "ptx").kernels
    assert entry.sm == 80
    with Double(version=VERSION) as double:
        assert answers(path, frames) == on_the_cpu(path, frames, count=8)
        assert {hashlib.sha256(launch.image.rstrip(b"\0")).hexdigest() for launch in double.launches} == {entry.sha256}


def test_building_again_with_other_kernels_replaces_them(bundle: Path, tmp_path: Path) -> None:
    folder = engines_of(bundle) / "ptx"
    with Double(version=VERSION) as double:
        other = folder_of(80, tmp_path / "other")
        sizes = ["--max", "tokens=512,frames=16"]
        assert export.build.main([str(bundle), *sizes, "--ptx", str(other)]) == 0
        assert len(double.builds) == 1, "refine alone"
        (entry,) = read_index(folder).kernels
        assert entry.sm == 80 and {path.name for path in folder.iterdir()} == {"index.json", entry.file}
        assert export.build.main([str(bundle), *sizes, "--ptx", str(other)]) == 0
        assert len(double.builds) == 1, "up to date"


def without_index(folder: Path) -> str:
    (folder / "index.json").unlink()
    return "its kernels cannot be read: "


def with_another_kernel(folder: Path) -> str:
    shutil.rmtree(folder)
    folder_of(80, folder)
    return "it is of kernels "


def with_an_altered_kernel(folder: Path) -> str:
    (path,) = folder.glob("*.ptx")
    path.write_bytes(path.read_bytes() + b"\n")
    return "its kernels cannot be read: "


@pytest.mark.parametrize("spoil", [without_index, with_another_kernel, with_an_altered_kernel])
def test_kernels_that_are_not_the_engines_are_found_before_it_is_opened(
    bundle: Path, spoil: Callable[[Path], str], capfd: Captured
) -> None:
    said = spoil(engines_of(bundle) / "ptx")
    with Double(version=VERSION) as double:
        assert said in choose_backend(Bundle.open(bundle), "auto").reason
        with pytest.raises(BackendError) as caught:
            VideoQA.open(bundle, backend="tensorrt")
        assert f"refine.engine does not fit: {said}" in str(caught.value)
        assert "; run: python -m export.build " in str(caught.value)
        assert runtime.inspect.main([str(bundle), "--json"]) == 0
        (found,) = json.loads(capfd.readouterr().out)["engines"]
        assert said in found["unfit"]
        assert not any(call.name == "Runtime.deserialize_cuda_engine" for call in double.calls)
        assert export.build.main([str(bundle), "--max", "tokens=512,frames=16"]) == 0
        assert choose_backend(Bundle.open(bundle), "auto").name == "tensorrt"


def test_an_engine_that_holds_its_kernel_needs_none_beside_it(built: Built, frames: Any) -> None:
    path = built("10.9.0.34")
    assert not (engines_of(path) / "ptx").exists()
    with Double(version="10.9.0.34"):
        assert answers(path, frames) == on_the_cpu(path, frames, count=8)
