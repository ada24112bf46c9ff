"""Give the TensorRT that is installed the plugin it can use.

In this order: a quickly deployable plugin whose kernel goes into the engine (TensorRT 10.9 and newer), an ``IPluginV3``
that launches the same kernel (older ones; needs cuda-python), or none, and the node's ONNX function body is built.

Needs nothing but NumPy to be imported; ``tensorrt`` is imported when ``register`` is called.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from kernels.ptx import Kernel, KernelError, find
from kernels.spec import DTYPES, PLUGIN_FIELDS

__all__ = ["Registered", "digest", "kernels_for", "register"]


@dataclass(frozen=True)
class Registered:
    """What ``register`` did.

    Attributes:
        kind: "aot": engines hold the kernel and run without the plugin. "v3": whoever loads the engine registers
            again. "none": use the function body.
        sha256: of the kernels that engines of this device get; empty with "none".
        reason: one line for the user: what is used, or why nothing is.
    """

    kind: Literal["aot", "v3", "none"]
    sha256: str
    reason: str


def register(
    sm: tuple[int, int],
    folders: Sequence[Path] = (),
    *,
    scales: Sequence[int] = (1, 2, 4),
    dtypes: Sequence[str] = DTYPES,
) -> Registered:
    """Register the plugin with the installed TensorRT; again is allowed, and the latest ``folders`` hold.

    Args:
        sm: compute capability of the device, e.g. (8, 7).
        folders: made by ``kernels.compile``, looked into before the package's own kernels.
        scales: of the node that will be built.
        dtypes: that its tokens may have.
    """
    try:
        kernels = kernels_for(sm, folders, scales=scales, dtypes=dtypes)
    except KernelError as error:
        return Registered("none", "", str(error))
    kernel_for = functools.partial(find_for, sm, tuple(folders))
    try:
        trt = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:  # OSError: its libraries are missing
        return Registered("none", "", f"TensorRT cannot be imported ({error})")
    if has_aot_plugins():
        of_tensorrt("kernels.plugin_aot").register(kernel_for)
        return Registered("aot", digest("aot", kernels), f"kernel for sm_{kernels[0].facts.sm}, held by the engine")
    if not cuda_python_is_there():
        return Registered(
            "none", "", f"TensorRT {trt.__version__} needs cuda-python for the plugin; pip install cuda-python"
        )
    if not of_tensorrt("kernels.plugin_v3").register(kernel_for):
        return Registered("none", "", "TensorRT's registry refused the plugin: another of its name is registered")
    return Registered("v3", digest("v3", kernels), f"kernel for sm_{kernels[0].facts.sm}, launched through cuda-python")


def kernels_for(
    sm: tuple[int, int], folders: Sequence[Path] = (), *, scales: Sequence[int], dtypes: Sequence[str]
) -> list[Kernel]:
    """The kernels that the plugin would launch, one for each dtype; arguments as of ``register``.

    Raises:
        KernelError: the plugin takes fewer scales, or a kernel is not there; the function body is built then.
    """
    if len(scales) > len(PLUGIN_FIELDS):
        raise KernelError(f"the plugin takes at most {len(PLUGIN_FIELDS)} scales; found {len(scales)}")
    return [find(sm, dtype, scales, folders) for dtype in dtypes]


def find_for(sm: tuple[int, int], folders: Sequence[Path], dtype: str, scales: Sequence[int]) -> Kernel:
    """``kernels.ptx.find`` with the device first."""
    return find(sm, dtype, scales, folders)


def has_aot_plugins() -> bool:
    """Whether the installed TensorRT takes compiled kernels from Python."""
    try:
        plugin = importlib.import_module("tensorrt.plugin")
    except ImportError:
        return False
    return hasattr(plugin, "aot_impl")


def cuda_python_is_there() -> bool:
    """Whether ``kernels.cuda`` can work."""
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except ImportError:  # no package named cuda at all
        return False


def of_tensorrt(name: str) -> ModuleType:
    """A module of ours that is bound to the TensorRT imported now; one bound to another is loaded again."""
    module = importlib.import_module(name)
    return module if module.trt is sys.modules["tensorrt"] else importlib.reload(module)


def digest(kind: str, kernels: Sequence[Kernel]) -> str:
    """Over what an engine would contain or launch."""
    return hashlib.sha256("\n".join([kind, *(kernel.facts.sha256 for kernel in kernels)]).encode()).hexdigest()
