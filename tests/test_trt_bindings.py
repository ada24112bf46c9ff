"""Every name of TensorRT and cuda-python that the sources use exists in every release that they are to run with."""

from __future__ import annotations

import functools
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.trt import bindings
from tests.trt.bindings import CACHE, CUDA_VERSIONS, VERSIONS, cuda_surface, run_with, surface
from tests.trt.surface import CudaModule, Module
from tests.trt.uses import Uses, cuda_uses, tensorrt_uses

ROOT = Path(__file__).parent.parent
SOURCES = tuple(sorted(path for package in ("export", "kernels", "runtime") for path in (ROOT / package).rglob("*.py")))
PLUGIN_SINCE = (10, 9)  # tensorrt.plugin has ahead-of-time plugins


@functools.cache
def used(library: str, sources: tuple[Path, ...] = SOURCES) -> Uses:
    """Names of "tensorrt" or "plugin" in the sources."""
    newest = surface(VERSIONS[-1]).tensorrt
    found = Uses()
    for path in sources:
        found.add(tensorrt_uses(path, newest).get(library, Uses()))
    return found


def absent(uses: Uses, module: Module) -> dict[str, list[str]]:
    return {name: places for name, places in uses.needed.items() if not module.has(name)}


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_used_of_tensorrt_exists(version: str) -> None:
    uses = used("tensorrt")
    print(f"TensorRT {version}: {len(uses.needed)} names needed: {sorted(uses.needed)}")
    assert len(uses.needed) > 10
    assert not absent(uses, surface(version).tensorrt)


@pytest.mark.parametrize("version", [v for v in VERSIONS if tuple(map(int, v.split(".")[:2])) >= PLUGIN_SINCE])
def test_what_is_used_of_its_plugin_module_exists(version: str) -> None:
    uses, module = used("plugin"), surface(version).plugin
    print(f"TensorRT {version}: {len(uses.needed)} names of tensorrt.plugin: {sorted(uses.needed)}")
    assert uses.needed and module is not None
    assert not absent(uses, module)


def test_what_is_looked_up_first_exists_in_some_version() -> None:
    uses = used("tensorrt")
    print(f"looked up: {sorted(uses.optional)}")
    assert uses.optional
    assert not [name for name in uses.optional if not any(surface(v).tensorrt.has(name) for v in VERSIONS)]


@pytest.mark.parametrize("version", CUDA_VERSIONS)
def test_what_is_used_of_cuda_exists(version: str) -> None:
    found = cuda_surface(version)
    names: dict[str, list[str]] = {}
    for path in SOURCES:
        names.update(cuda_uses(path).needed)
    print(f"cuda.bindings {version}: {len(names)} names: {sorted(names)}")
    assert len(names) > 10
    known = everything(found.runtime) | everything(found.driver)
    assert not {name: places for name, places in names.items() if name not in known}


def everything(module: CudaModule) -> set[str]:
    enums = {name for info in module.classes.values() for name in info.enum or ()}
    return {*module.classes, *module.functions, *module.values, *enums}


def test_a_name_that_a_version_lacks_is_found(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        "def build(trt, logger, path):\n"
        "    builder = trt.Builder(logger)\n"
        "    flags = trt.NetworkDefinitionCreationFlag\n"
        "    network = builder.create_network(1 << int(flags.EXPLICIT_BATCH))\n"
        "    made = builder.create_builder_config()\n"
        "    made.set_flag(trt.BuilderFlag.FP16)\n"
        "    made.max_workspace_size = 1\n"
        "    if hasattr(flags, 'PREFER_AOT_PYTHON_PLUGINS'):\n"
        "        print(flags.PREFER_AOT_PYTHON_PLUGINS)\n"
        "    layer = network.get_layer(0)\n"
        "    layer.__class__ = getattr(trt, 'IAttentionInputLayer')\n"
        "    layer.attention.decomposable = layer.attention.thing\n"
        "    return made\n"
        "def facts(trt, engine, config: dict):\n"
        "    config.nothing\n"
        "    return engine.device_memory_size, engine.num_io_tensors\n"
    )
    uses = used("tensorrt", (source,))
    old, new = ({*absent(uses, surface(version).tensorrt)} for version in ("10.3.0", "11.4.0.106"))
    assert old == {"IBuilderConfig.max_workspace_size"}
    assert new == old | {
        "BuilderFlag.FP16",
        "ICudaEngine.device_memory_size",
        "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
    }
    assert set(uses.optional) == {
        "NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS",
        "IAttentionInputLayer",
        "IAttentionInputLayer.attention",
        "IAttention.decomposable",
        "IAttention.thing",
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_the_bindings_over_stub_libraries_are_the_real_ones(version: str) -> None:
    code = (
        "import sys, tensorrt as trt; print(trt.__version__, sys.argv[1])\n"
        "try: trt.OnnxParser(1, 2)\n"
        "except TypeError as error: print('incompatible' in str(error), 'INetworkDefinition' in str(error))\n"
    )
    done = run_with(version, code, "given")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [f"{version} given", "True True"]


def test_scripts_run_too_and_cuda_comes_along_when_asked_for(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import tensorrt\nfrom cuda.bindings import runtime\nprint(runtime.cudaMemcpyKind.__name__)\n")
    done = run_with(VERSIONS[0], script, cuda=CUDA_VERSIONS[-1])
    assert done.stdout.strip() == "cudaMemcpyKind", done.stderr


@pytest.mark.parametrize("version", VERSIONS)
def test_surfaces_hold_what_is_known_of_the_releases(version: str) -> None:
    module = surface(version).tensorrt
    assert surface(version).version == version
    newest = version.startswith("11.")
    assert module.has("BuilderFlag.FP16") is not newest
    assert module.has("IInt8EntropyCalibrator2") is not newest
    assert module.has("ICudaEngine.get_aliased_input_tensor") is (version in VERSIONS[3:])
    assert (surface(version).plugin is None) is (version == "10.3.0")
    (overload,) = module.classes["IOptimizationProfile"].members["set_shape"].overloads
    assert overload.names == ("input", "min", "opt", "max")
    assert len(module.classes["IExecutionContext"].members["set_input_shape"].overloads) == 3
    assert module.values["float32"] == ("DataType", "FLOAT")


@pytest.mark.parametrize("version", CUDA_VERSIONS)
def test_surfaces_of_cuda_hold_signatures(version: str) -> None:
    found = cuda_surface(version)
    copy = found.runtime.functions["cudaMemcpyAsync"].signature
    assert copy is not None and copy.names == ("dst", "src", "count", "kind", "stream")
    assert copy.parameters[3].type == "cudaMemcpyKind"
    assert found.runtime.functions["cudaMalloc"].returns == ("cudaError_t", "devPtr")
    assert found.driver.has("CUresult.CUDA_ERROR_INVALID_PTX") and not found.driver.has("cuNothing")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it and no memory of what could not be had."""
    monkeypatch.setattr(bindings, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(bindings, "_refused", {})
    return tmp_path / "cache"


def test_without_a_registry_tests_are_skipped_with_the_reason(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for _ in range(2):
        with pytest.raises(pytest.skip.Exception, match="registry gave no tensorrt-cu12-bindings"):
            bindings.tensorrt_site("10.3.0")
        monkeypatch.setenv("PIP_NO_INDEX", "0")  # asked only once
    assert list(empty_cache.iterdir()) == []


def test_without_a_compiler_tests_are_skipped_with_the_reason(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = bindings.tensorrt_site
    with monkeypatch.context() as patch:
        patch.setattr(bindings, "CACHE", CACHE)
        found = site("10.3.0")
    monkeypatch.setattr(bindings, "tensorrt_site", lambda version: found)
    monkeypatch.setattr(bindings.shutil, "which", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="no C compiler"):
        run_with("10.3.0", "import tensorrt")


def test_a_folder_of_the_cache_is_made_once_and_whole_by_whoever_asks_at_once(empty_cache: Path) -> None:
    makers: list[str] = []

    def make(target: Path) -> None:
        makers.append(target.name)
        (target / "first").touch()
        time.sleep(0.05)
        (target / "second").touch()

    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: bindings._made("thing", make), range(4)))
    (folder,) = folders
    assert {path.name for path in folder.iterdir()} == {"first", "second"}
    assert bindings._made("thing", make) == folder and list(empty_cache.iterdir()) == [folder]
    assert len(set(makers)) == len(makers)


def test_a_folder_whose_making_failed_is_not_there(empty_cache: Path) -> None:
    def fail(target: Path) -> None:
        (target / "first").touch()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        bindings._made("thing", fail)
    assert list(empty_cache.iterdir()) == []


REAL_CALLS = """
import ctypes
import numpy as np
from kernels import cuda

runtime, driver = cuda.runtime(), cuda.driver()
stream, event, graph = (object.__new__(kind) for kind in (cuda.Stream, cuda.Event, cuda.Graph))
stream.handle, event.handle, graph.handle = 5, 6, runtime.cudaGraphExec_t(7)
kernel, array = cuda.Kernel("entry", driver.CUfunction(8)), np.zeros(4, np.float32)
arguments = [(9, ctypes.c_void_p), (3, ctypes.c_int32)]
attempts = {
    "device": cuda.device,
    "memory_info": cuda.memory_info,
    "allocate": lambda: cuda.allocate(16),
    "pinned": lambda: cuda.pinned(16),
    "stream": cuda.Stream,
    "synchronize": stream.synchronize,
    "event": cuda.Event,
    "record": lambda: event.record(stream),
    "wait": event.synchronize,
    "upload": lambda: cuda.upload(16, array, stream),
    "download": lambda: cuda.download(array, 16, stream),
    "copy": lambda: cuda.copy(16, 32, 16, stream),
    "copy_rows": lambda: cuda.copy_rows(16, 16, 32, 16, 8, 1, stream),
    "zero": lambda: cuda.zero(16, 16, stream),
    "capture": lambda: cuda.capture(stream, lambda: None),
    "graph": lambda: cuda.Graph(runtime.cudaGraph_t(10)),
    "launch_graph": lambda: graph.launch(stream),
    "load_kernel": lambda: cuda.load_kernel(b".version 8.0", "entry"),
    "launch": lambda: cuda.launch(kernel, (1, 1, 1), 32, 0, 5, arguments),
}
for name, attempt in attempts.items():
    try:
        attempt()
    except cuda.CudaError as error:
        print(name, "refused:", error)
"""


@pytest.mark.parametrize("version", CUDA_VERSIONS)
def test_without_a_driver_the_real_cuda_python_takes_our_arguments_and_every_call_is_one_line(version: str) -> None:
    done = run_with(VERSIONS[0], REAL_CALLS, cuda=version)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    print(done.stdout)
    assert [line.split()[0] for line in lines] == re.findall(r'^    "(\w+)":', REAL_CALLS, re.MULTILINE)
