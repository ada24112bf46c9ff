"""Build a plugin node as TensorRT does: ask the plugin for shapes, types, formats and kernel, and store the answers.

Both kinds are hosted: ``IPluginV3`` classes, whose fields an engine keeps, and quickly deployable plugins, whose
kernel and launch an engine keeps. The order of calls is that of the plugins' documentation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from tests.trt.expressions import DimensionExpr, DimsExprs, ExprBuilder, SymExprs, Tree
from tests.trt.plan import DTYPES, Shape

if TYPE_CHECKING:
    from tests.trt.double import Double

__all__ = ["Hosted", "HostingError", "PluginTensor", "host", "tensor_desc"]

LAUNCH = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")

Hosted = dict[str, Any]  # what an engine keeps of a plugin, as JSON


class HostingError(Exception):
    """Why a network with this plugin cannot be built."""


class PluginTensor:
    """An input or output of a plugin node: dtype, and shape in general and at a profile's three points."""

    def __init__(self, name: str, dtype: str, shape: Shape, points: Sequence[Shape]) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self.points = points


def host(
    world: Double, node: onnx.NodeProto, creator: Any, tensors: Mapping[str, PluginTensor], *, prefer_aot: bool
) -> Hosted:
    """Drive a plugin through the build phase.

    Raises:
        HostingError: its formats do not fit the graph.
    """
    trt = world.trt
    name, version, namespace, kind = world.registry.describe(creator)
    fields = attribute_fields(world, node, creator)
    if kind == "aot":
        requests = trt.QuickPluginCreationRequest
        request = requests.PREFER_AOT if prefer_aot else requests.UNKNOWN
        plugin = creator.create_plugin(name, namespace, fields, trt.TensorRTPhase.BUILD, request)
    else:
        plugin = creator.create_plugin(node.name, fields, trt.TensorRTPhase.BUILD)
    inputs = [tensors[key] for key in node.input]
    outputs = [tensors[key] for key in node.output]
    core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
    assert (core.plugin_name, core.plugin_version, core.plugin_namespace) == (name, version, namespace), "names differ"
    build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
    shapes = build_phase(world, build, inputs, outputs, quick=kind == "aot")
    facts: Hosted = {
        "name": name,
        "version": version,
        "namespace": namespace,
        "kind": kind,
        "layer": node.name,
        "inputs": list(node.input),
        "outputs": list(node.output),
        "dtypes": {tensor.name: tensor.dtype for tensor in (*inputs, *outputs)},
        "shapes": shapes,
    }
    if kind == "aot":
        return facts | baked(world, build, inputs, outputs)
    runtime = plugin.get_capability_interface(trt.PluginCapabilityType.RUNTIME)
    return facts | {"fields": {f.name: np.asarray(f.data).tolist() for f in runtime.get_fields_to_serialize()}}


def attribute_fields(world: Double, node: onnx.NodeProto, creator: Any) -> Any:
    """The node's attributes that the creator names, as the parser hands them over: int64 attributes become INT32."""
    trt, fields = world.trt, []
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    for wanted in creator.field_names:
        value = attributes.get(wanted.name)
        if value is None:
            continue
        assert np.asarray(value).dtype.kind == "i", f"the double hands over integers alone, {wanted.name} is {value!r}"
        data = np.asarray(value, np.int32).reshape(-1)
        fields.append(trt.PluginField(wanted.name, data, trt.PluginFieldType.INT32))
    return trt.PluginFieldCollection(fields)


def build_phase(
    world: Double, build: Any, inputs: list[PluginTensor], outputs: list[PluginTensor], *, quick: bool
) -> list[list[Tree]]:
    """Types, shapes and formats; returns the outputs' shapes as trees."""
    trt = world.trt
    assert build.get_num_outputs() == len(outputs) if quick else build.num_outputs == len(outputs), "outputs differ"
    types = [getattr(trt.DataType, tensor.dtype) for tensor in inputs]
    ranks = [[len(tensor.shape) for tensor in inputs]] if quick else []
    found = build.get_output_data_types(types, *ranks)
    expected = [tensor.dtype for tensor in outputs]
    if [dtype.name for dtype in found] != expected:
        raise HostingError(f"the plugin gives {found}, the graph wants {expected}")
    shapes = build.get_output_shapes(symbols(world, inputs), [], world.dress(ExprBuilder()))
    descs = [dynamic_desc(world, tensor) for tensor in (*inputs, *outputs)]
    if quick:
        combinations = [
            (desc.type, desc.format) for desc in build.get_supported_format_combinations(descs, len(inputs))
        ]
        wanted = [(desc.desc.type, desc.desc.format) for desc in descs]
        parts = [combinations[place : place + len(descs)] for place in range(0, len(combinations), len(descs))]
        fits = wanted in parts
    else:
        fits = all(build.supports_format_combination(place, descs, len(inputs)) for place in range(len(descs)))
    if not fits:
        raise HostingError("could not find any supported formats consistent with input/output data types")
    build.configure_plugin(descs[: len(inputs)], descs[len(inputs) :])
    if quick:
        build.set_tactic((build.get_valid_tactics() or [0])[0])
    return [[world.bare(shape)[axis].tree for axis in range(len(shape))] for shape in shapes]


def baked(world: Double, build: Any, inputs: list[PluginTensor], outputs: list[PluginTensor]) -> Hosted:
    """Kernel, launch and extra arguments of a quickly deployable plugin."""
    launch, extra = world.blank("KernelLaunchParams"), world.dress(SymExprs())
    descs = [dynamic_desc(world, tensor) for tensor in (*inputs, *outputs)]
    build.get_launch_params(symbols(world, inputs), descs, len(inputs), launch, extra, world.dress(ExprBuilder()))
    plain = [tensor_desc(world, tensor.dtype, tensor.shape) for tensor in (*inputs, *outputs)]
    entry, kernel = build.get_kernel(plain[: len(inputs)], plain[len(inputs) :])
    return {
        "entry": entry.decode() if isinstance(entry, bytes) else entry,
        "kernel": kernel.decode(),
        "launch": {name: tree_of(world, getattr(launch, name)) for name in LAUNCH},
        "extra": [tree_of(world, extra[index]) for index in range(len(extra))],
    }


def tree_of(world: Double, symbol: Any) -> Tree:
    """The tree of an ``ISymExpr``, which Python can set and not read."""
    return world.bare(symbol.__dict__["_fields"]["expr"]).tree


def symbols(world: Double, tensors: Sequence[PluginTensor]) -> list[Any]:
    """``DimsExprs`` of inputs: constants where a size is fixed."""
    made = []
    for index, tensor in enumerate(tensors):
        shape = DimsExprs(world, len(tensor.shape))
        for axis, size in enumerate(tensor.shape):
            shape[axis] = DimensionExpr(size if size >= 0 else ["dim", index, axis])
        made.append(world.dress(shape))
    return made


def tensor_desc(world: Double, dtype: str, shape: Shape) -> Any:
    """``PluginTensorDesc``."""
    made = world.trt.PluginTensorDesc()
    made.dims = world.trt.Dims(shape)
    made.type = getattr(world.trt.DataType, dtype)
    made.format = world.trt.TensorFormat.LINEAR
    made.scale = 1.0
    return made


def dynamic_desc(world: Double, tensor: PluginTensor) -> Any:
    """``DynamicPluginTensorDesc``."""
    made = world.trt.DynamicPluginTensorDesc()
    made.desc = tensor_desc(world, tensor.dtype, tensor.shape)
    made.min, made.opt, made.max = (world.trt.Dims(shape) for shape in tensor.points)
    return made


def plugin_tensors(
    values: Mapping[str, tuple[int, Shape]], points: Sequence[Mapping[str, Shape]]
) -> dict[str, PluginTensor]:
    """Tensors by name, of (element type, shape) and of shapes at a profile's three points."""
    return {
        name: PluginTensor(name, DTYPES[kind], shape, [point[name] for point in points])
        for name, (kind, shape) in values.items()
        if kind in DTYPES and all(name in point for point in points)
    }
