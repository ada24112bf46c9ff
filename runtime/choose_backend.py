"""Where a bundle runs: TensorRT engines that fit this device, else CUDA, else the CPU.

Imports TensorRT only where a bundle has engines. Opens nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kernels import cuda
from runtime.backend_names import BackendName
from runtime.bundle import Bundle
from runtime.engines import ENGINES, EngineRecord, Target, find_engines, platform_name, rebuild
from runtime.errors import BackendError, DependencyError, LinvtError

__all__ = ["Choice", "Engines", "choose_backend", "imported_tensorrt", "target_here", "target_of", "without_advice"]


@dataclass(frozen=True)
class Engines:
    """Engines that fit the device they are on.

    Attributes:
        trt: the module ``tensorrt``.
        records: by stage.
    """

    trt: Any
    target: Target
    records: Mapping[str, EngineRecord]


@dataclass(frozen=True)
class Choice:
    """A backend, and why it is that one.

    Attributes:
        reason: one line; empty where the backend was asked for.
        engines: with "tensorrt".
    """

    name: Literal["cpu", "cuda", "tensorrt"]
    reason: str = ""
    engines: Engines | None = field(default=None, compare=False)


def choose_backend(bundle: Bundle, name: BackendName) -> Choice:
    """Resolve "auto", and check that what was asked for is there.

    Raises:
        BackendError: it is not.
        DependencyError: TensorRT was asked for and is not installed.
    """
    if name == "tensorrt":
        return Choice("tensorrt", engines=engines_here(bundle, target_here()))
    from runtime.ort_provider import choose_provider, why_not_cuda

    if name != "auto":
        return Choice("cuda" if choose_provider(name) == "cuda" else "cpu")
    found = engines_or_reason(bundle)
    if isinstance(found, Engines):
        return Choice("tensorrt", "engines fit this device", found)
    no_cuda = why_not_cuda()
    return Choice("cpu", f"{found}; {no_cuda}") if no_cuda else Choice("cuda", found)


def engines_or_reason(bundle: Bundle) -> Engines | str:
    """A bundle's engines for this device, or what keeps it from running in TensorRT here."""
    if not (bundle.folder / ENGINES).is_dir():
        return f"no TensorRT engines were built ({rebuild(bundle)})"
    try:
        target = target_here()
    except (BackendError, DependencyError) as error:
        return without_advice(error)
    try:
        return engines_here(bundle, target)
    except BackendError as error:
        return str(error)


def engines_here(bundle: Bundle, target: Target) -> Engines:
    """A bundle's engines for a target.

    Raises:
        BackendError: there are none, or one does not fit.
    """
    return Engines(imported_tensorrt(), target, find_engines(bundle, target))


def without_advice(error: LinvtError) -> str:
    """What was found, for a line that goes on with what is used instead."""
    return str(error).split("; ")[0]


def imported_tensorrt() -> Any:
    """The module ``tensorrt``.

    Raises:
        DependencyError: it is not installed, or its libraries do not load.
    """
    try:
        return importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        reason = "" if isinstance(error, ModuleNotFoundError) and error.name == "tensorrt" else f" ({error!s:.200})"
        raise DependencyError(
            f"tensorrt is not installed{reason}; run: pip install 'linvt-edge[tensorrt]'; on JetPack it is part of the "
            "system: python3 -m venv --system-site-packages"
        ) from error


def target_here() -> Target:
    """The device and the TensorRT that engines would run on.

    Raises:
        DependencyError: there is no TensorRT.
        BackendError: there is no cuda-python or no device, or one does not fit the other.
    """
    tensorrt = imported_tensorrt()
    try:
        device = cuda.device()
    except cuda.CudaError as error:
        raise BackendError(f"TensorRT cannot use the GPU: {error}") from error
    return target_of(device, tensorrt)


def target_of(device: cuda.Device, tensorrt: Any) -> Target:
    """What engines for a device and a TensorRT are for."""
    return Target(
        gpu=device.name,
        sm=device.sm,
        processors=device.processors,
        tensorrt=str(tensorrt.__version__),
        platform=platform_name(),
        cuda=device.cuda,
    )
