"""``linvt::GatherPool`` as a TensorRT plugin of class ``IPluginV3`` that launches the compiled kernel itself.

For TensorRT before 10.9. The engine holds the scales only, so whoever runs it registers the plugin first.

Needs ``tensorrt`` and cuda-python (through ``kernels.cuda``). Does not compile: PTX comes from ``kernels.ptx``.
"""

# mypy: disable-error-code="no-any-unimported, misc"

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import tensorrt as trt

from kernels import cuda
from kernels.ptx import Kernel
from kernels.spec import (
    DOMAIN,
    NAME,
    PLUGIN_FIELDS,
    TENSORRT_DTYPES,
    VERSION,
    plugin_attributes,
    scales_of_fields,
)

__all__ = ["GatherPool", "GatherPoolCreator", "register"]

Find = Callable[[str, Sequence[int]], Kernel]

_creators: list[GatherPoolCreator] = []  # TensorRT's registry does not keep a creator alive


def register(find: Find) -> bool:
    """Put the creator into TensorRT's registry, once; ``find`` gives the kernel for a dtype and scales.

    Returns:
        False where the registry holds another plugin of this name.
    """
    if _creators:
        _creators[-1].find = find
        return True
    creator = GatherPoolCreator(find)
    accepted = bool(trt.get_plugin_registry().register_creator(creator, DOMAIN))
    if accepted:
        _creators.append(creator)
    return accepted


class GatherPool(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
    """One node: inputs tokens (B, L, D) and indices (B, k) int64, output (B, M, D)."""

    def __init__(self, scales: Sequence[int], find: Find) -> None:
        trt.IPluginV3.__init__(self)
        trt.IPluginV3OneCore.__init__(self)
        trt.IPluginV3OneBuild.__init__(self)
        trt.IPluginV3OneRuntime.__init__(self)
        self.plugin_name = NAME
        self.plugin_version = str(VERSION)
        self.plugin_namespace = DOMAIN
        self.num_outputs = 1
        self.scales = tuple(scales)
        self.find = find
        self.loaded: dict[str, tuple[Kernel, cuda.Kernel]] = {}  # by dtype
        self.fields = scale_fields(self.scales)
        # The bindings of TensorRT 10.3 crash once a plugin made in Python was destroyed: none ever is.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

    def get_capability_interface(self, type: trt.PluginCapabilityType) -> GatherPool:  # noqa: A002 (TensorRT's name)
        """This object is all three."""
        return self

    def clone(self) -> GatherPool:
        """Another one of the same scales that shares the loaded kernels."""
        other = GatherPool(self.scales, self.find)
        other.loaded = self.loaded
        return other

    def get_fields_to_serialize(self) -> Any:
        """What ``create_plugin`` gets when an engine is loaded."""
        return trt.PluginFieldCollection(self.fields)

    def get_output_data_types(self, input_types: Sequence[trt.DataType]) -> list[trt.DataType]:
        """That of the tokens."""
        return [input_types[0]]

    def get_output_shapes(
        self, inputs: Sequence[trt.DimsExprs], shape_inputs: Sequence[trt.DimsExprs], builder: trt.IExprBuilder
    ) -> list[trt.DimsExprs]:
        """(B, M, D)."""
        tokens, indices = inputs
        windows = [
            builder.operation(trt.DimensionOperation.FLOOR_DIV, indices[1], builder.constant(scale))
            for scale in self.scales
        ]
        pooled = trt.DimsExprs(3)
        pooled[0] = tokens[0]
        pooled[1] = reduce(lambda a, b: builder.operation(trt.DimensionOperation.SUM, a, b), windows)
        pooled[2] = tokens[2]
        return [pooled]

    def supports_format_combination(
        self, pos: int, in_out: Sequence[trt.DynamicPluginTensorDesc], num_inputs: int
    ) -> bool:
        """Row-major; any float dtype that a kernel has for tokens, the same for the output; int64 indices."""
        desc = in_out[pos].desc
        wanted = (TENSORRT_DTYPES, ("INT64",), (in_out[0].desc.type.name,))[pos]
        return bool(desc.format == trt.TensorFormat.LINEAR and desc.type.name in wanted)

    def configure_plugin(
        self, inputs: Sequence[trt.DynamicPluginTensorDesc], outputs: Sequence[trt.DynamicPluginTensorDesc]
    ) -> None:
        """Nothing depends on the range of shapes."""

    def attach_to_context(self, context: Any) -> GatherPool:
        """An object per execution context."""
        return self.clone()

    def on_shape_change(self, inputs: Sequence[trt.PluginTensorDesc], outputs: Sequence[trt.PluginTensorDesc]) -> None:
        """Load the kernel, which may not happen while a CUDA graph is captured."""
        self.kernel(inputs[0].type)

    def kernel(self, dtype: trt.DataType) -> tuple[Kernel, cuda.Kernel]:
        """The kernel for tokens of this type."""
        name = TENSORRT_DTYPES[dtype.name]
        if name not in self.loaded:
            found = self.find(name, self.scales)
            self.loaded[name] = found, cuda.load_kernel(found.ptx, found.facts.entry)
        return self.loaded[name]

    def enqueue(
        self,
        input_desc: Sequence[trt.PluginTensorDesc],
        output_desc: Sequence[trt.PluginTensorDesc],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launch on ``stream``; tensors are device addresses."""
        found, function = self.kernel(input_desc[0].type)
        batch, length, width = input_desc[0].dims
        top_k = input_desc[1].dims[1]
        scalars = [(extent, ctypes.c_int32) for extent in (length, top_k, width)]
        pointers = [(address, None) for address in (*inputs, *outputs)]
        grid = found.facts.layout.grid(batch, top_k, width)
        arguments = [*pointers[:2], *scalars, *pointers[2:]]
        cuda.launch(function, grid, found.threads, found.facts.shared, stream, arguments)


class GatherPoolCreator(trt.IPluginCreatorV3One):
    """Makes plugins from a node's attributes, or from what an engine holds."""

    def __init__(self, find: Find) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.name = NAME
        self.plugin_version = str(VERSION)
        self.plugin_namespace = DOMAIN
        self.fields = scale_fields((1,))
        self.field_names = trt.PluginFieldCollection(self.fields)
        self.find = find

    def create_plugin(self, name: str, fields: Any, phase: trt.TensorRTPhase) -> GatherPool:
        """A plugin from ``PLUGIN_FIELDS``; the name of the layer is not needed."""
        values = {field.name: field.data for field in fields}
        return GatherPool(scales_of_fields([values[name] for name in PLUGIN_FIELDS]), self.find)


def scale_fields(scales: Sequence[int]) -> list[Any]:
    """``PLUGIN_FIELDS``; a collection only points to their values, so the caller keeps them."""
    values = plugin_attributes(scales)
    return [
        trt.PluginField(name, np.array([values[name]], np.int32), trt.PluginFieldType.INT32) for name in PLUGIN_FIELDS
    ]
