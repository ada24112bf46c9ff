"""The device that engines are built for: TensorRT's module, the GPU behind it, and the plugin that both can take.

Everything that has to be installed is asked for here, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from kernels import cuda
from kernels.ptx import Kernel
from kernels.register import kernels_for, register
from kernels.spec import DOMAIN, NAME
from runtime.bundle import Bundle
from runtime.choose_backend import imported_tensorrt, target_of
from runtime.engines import PluginRecord, Target
from runtime.errors import BackendError

__all__ = ["REFINE", "BuildDevice", "found_device", "plugin_kernels", "pool_scales", "registered_plugin"]

REFINE = "refine"  # the stage that the plugin is for


@dataclass(frozen=True)
class BuildDevice:
    """What is here.

    Attributes:
        trt: the module ``tensorrt``.
        free: bytes of the GPU's memory that are free, by CUDA.
    """

    trt: Any
    gpu: cuda.Device
    target: Target
    free: int


def found_device() -> BuildDevice:
    """TensorRT and CUDA's device.

    Raises:
        DependencyError: TensorRT is absent.
        BackendError: there is no GPU, or CUDA does not start.
    """
    trt = imported_tensorrt()
    try:
        gpu = cuda.device()
        free, _ = cuda.memory_info()
    except cuda.CudaError as error:
        raise BackendError(f"engines are built on the GPU that runs them, which cannot be used: {error}") from error
    return BuildDevice(trt, gpu, target_of(gpu, trt), free)


def registered_plugin(bundle: Bundle, sm: tuple[int, int], folders: Sequence[Path]) -> tuple[PluginRecord | None, str]:
    """The plugin that a bundle's refine stage can have on this GPU, registered with TensorRT.

    Returns:
        None where there is no such plugin, and why: the node's function body is built then. The reason is empty where
        the bundle has no node for it.
    """
    scales = pool_scales(bundle)
    if scales is None:
        return None, ""
    found = register(sm, folders, scales=scales, dtypes=[bundle.manifest.stages[REFINE].compute])
    return (None if found.kind == "none" else PluginRecord(found.kind, found.sha256)), found.reason


def plugin_kernels(bundle: Bundle, sm: tuple[int, int], folders: Sequence[Path]) -> list[Kernel]:
    """The kernels of the plugin that ``registered_plugin`` gave for the same arguments."""
    scales = pool_scales(bundle)
    assert scales is not None, "there is a plugin"
    return kernels_for(sm, folders, scales=scales, dtypes=[bundle.manifest.stages[REFINE].compute])


def pool_scales(bundle: Bundle) -> tuple[int, ...] | None:
    """The scales of a bundle's pooling node."""
    if REFINE not in bundle.manifest.stages:
        return None
    graph = onnx.load(bundle.path(bundle.manifest.stages[REFINE].file), load_external_data=False).graph
    nodes = (node for node in graph.node if (node.domain, node.op_type) == (DOMAIN, NAME))
    scales = (tuple(attribute.ints) for node in nodes for attribute in node.attribute if attribute.name == "scales")
    return next(scales, None)
