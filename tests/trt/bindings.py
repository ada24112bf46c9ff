"""The real Python bindings of TensorRT and CUDA, fetched from the package registry and importable without a GPU.

``run_with`` runs code whose ``import tensorrt`` is the real module over stub libraries; ``surface`` and
``cuda_surface`` tell what a version has. Everything is kept in a folder of the user's cache, which
LINVT_TEST_CACHE moves. A test that asks for what cannot be had here (no registry, no compiler, no wheel for this
Python) is skipped with the reason.

Nothing of TensorRT runs: its factories return null, so there is no builder and no runtime. Wheels are never committed.
"""

from __future__ import annotations

import compileall
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.trt.surface import CudaSurface, Surface

__all__ = ["CUDA_VERSIONS", "VERSIONS", "cuda_site", "cuda_surface", "run_with", "surface", "tensorrt_site"]

VERSIONS = ("10.3.0", "10.9.0.34", "10.13.3.9", "10.16.1.11", "11.4.0.106")
CUDA_VERSIONS = ("12.6.2.post1", "12.9.10", "13.5.0")

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LAYOUT = "3"  # of the cached folders; another number leaves older ones alone
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}-{platform.machine()}"

# Read before a test can move XDG_CACHE_HOME.
CACHE = Path(
    os.environ.get("LINVT_TEST_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "linvt-edge-tests"
)

# What tensorrt.so links against: NvInferRuntime.h, NvInfer.h, NvOnnxParser.h and NvInferPlugin.h declare them.
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")

FRONTEND = """from tensorrt_bindings import *
from tensorrt_bindings import __path__ as _bindings, __version__
__path__ += _bindings  # tensorrt.plugin lies there
"""


class _UnavailableError(Exception):
    """Why a folder of the cache cannot be made here."""


_refused: dict[str, str] = {}  # folder -> why; a registry that did not answer is asked once per session


def run_with(
    version: str, code: str | Path, *args: str, cuda: str | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own that imports the real bindings.

    Args:
        version: of TensorRT, one of ``VERSIONS``.
        code: a script, or source text.
        args: for its ``sys.argv``.
        cuda: a version of ``CUDA_VERSIONS`` that shall be importable too.
        env: further environment variables.

    Returns:
        The ended process, with its exit code, stdout and stderr as text; the project's packages are importable in it.
    """
    folders = [tensorrt_site(version), ROOT, *([cuda_site(cuda)] if cuda else [])]
    script = [str(code)] if isinstance(code, Path) else ["-c", code]
    return subprocess.run(
        [sys.executable, *script, *args],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "LD_LIBRARY_PATH": str(_stubs(version)),
            **(env or {}),
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@cache
def surface(version: str) -> Surface:
    """Classes, members, enum values and signatures of one TensorRT version."""
    folder = _made(f"surface-{version}", lambda target: _describe(version, target))
    return Surface.read(folder / "surface.json")


@cache
def cuda_surface(version: str) -> CudaSurface:
    """Functions, enums and structs of ``cuda.bindings.runtime`` and ``cuda.bindings.driver``."""
    folder = _made(f"cuda-surface-{version}", lambda target: _describe_cuda(version, target))
    return CudaSurface.read(folder / "surface.json")


def tensorrt_site(version: str) -> Path:
    """A folder that makes ``tensorrt`` of this version importable, given the stub libraries that ``run_with`` adds."""

    def make(target: Path) -> None:
        _fetch([f"tensorrt-{cuda}-bindings=={version}" for cuda in ("cu12", "cu13")], target)
        (target / "tensorrt").mkdir()
        (target / "tensorrt" / "__init__.py").write_text(FRONTEND)
        with warnings.catch_warnings():  # of escapes in its strings, which would come up when it is imported
            warnings.simplefilter("ignore")
            compileall.compile_dir(target, quiet=2)

    return _made(f"tensorrt-{version}", make)


def cuda_site(version: str) -> Path:
    """A folder that makes ``cuda.bindings`` of this version importable."""

    def make(target: Path) -> None:
        if version == "12.6.2.post1":  # the last that is one package
            _fetch([f"cuda-python=={version}"], target)
        else:
            _fetch([f"cuda-bindings=={version}"], target)
            _fetch(["cuda-pathfinder"], target)

    return _made(f"cuda-{version}", make)


def _describe(version: str, target: Path) -> None:
    done = run_with(version, HERE / "describe_tensorrt.py", str(target / "surface.json"))
    if done.returncode:
        raise _UnavailableError(f"TensorRT {version} does not import over stub libraries: {done.stderr[-800:]}")


def _describe_cuda(version: str, target: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "describe_cuda.py"), str(target / "surface.json")],
        env={**os.environ, "PYTHONPATH": str(cuda_site(version))},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if done.returncode:
        raise _UnavailableError(f"cuda.bindings {version} does not import here: {done.stderr[-800:]}")


def _fetch(alternatives: list[str], target: Path) -> None:
    """Unpack the wheel of the first requirement that the registry has for this Python."""
    reasons = []
    for requirement in alternatives:
        with tempfile.TemporaryDirectory() as folder:
            command = ["pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
            command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "20", "--dest", folder]
            done = subprocess.run(
                [sys.executable, "-m", *command, requirement],
                capture_output=True,
                text=True,
                check=False,
                timeout=600,
            )
            wheels = list(Path(folder).glob("*.whl"))
            if done.returncode == 0 and wheels:
                with zipfile.ZipFile(wheels[0]) as archive:
                    archive.extractall(target)
                return
            reasons.append(f"{requirement}: {(done.stderr.strip().splitlines() or ['no wheel'])[-1]}")
    raise _UnavailableError("the package registry gave no " + "; ".join(reasons))


def _stubs(version: str) -> Path:
    """A folder with libraries of TensorRT's names whose functions return null."""
    major = version.split(".")[0]
    source = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS)

    def make(target: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise _UnavailableError("there is no C compiler (cc, gcc, clang) for the stub libraries")
        (target / "stub.c").write_text(source)
        for library in LIBRARIES:
            name = f"lib{library}.so.{major}"
            command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(target / name)]
            done = subprocess.run([*command, str(target / "stub.c")], capture_output=True, text=True, check=False)
            if done.returncode:
                raise _UnavailableError(f"{compiler} does not make a shared library: {done.stderr[-400:]}")

    return _made(f"stubs-{major}", make)


def _made(name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the cache, made whole by ``make`` or not at all, whoever else makes it at once."""
    target = CACHE / f"{LAYOUT}-{name}-{TAG}"
    if target.is_dir():
        return target
    if name in _refused:
        pytest.skip(_refused[name])
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=CACHE))
    try:
        make(unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(target)
    except _UnavailableError as error:
        _refused[name] = str(error)
        pytest.skip(str(error))
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target
