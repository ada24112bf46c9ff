"""Register a plugin with the real TensorRT bindings and tell what it would launch: a command, run over stub libraries.

``python tests/kernel_plugins.py aot|v3 CASES.json OUT.json``. TensorRT's part is played as far as its libraries would
play it: a registry that keeps creators, dimension expressions that are numbers, and ``kernels.cuda`` that keeps what
would be loaded and launched. Classes, descriptors, fields, decorators and the plugin template are the real ones.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorrt as trt

from kernels import cuda
from kernels.register import register
from kernels.spec import DOMAIN, NAME, PLUGIN_FIELDS, VERSION, plugin_attributes

TYPES = {"float32": trt.DataType.FLOAT, "float16": trt.DataType.HALF, "bfloat16": trt.DataType.BF16}
ADDRESSES = [1 << 40, 2 << 40], [3 << 40]
STREAM = 1234
LOAD, LAUNCH = inspect.signature(cuda.load_kernel), inspect.signature(cuda.launch)


class Extent(trt.IDimensionExpr):  # type: ignore[misc]
    """A dimension whose value is known; TensorRT's own cannot be made without its libraries."""

    value: int

    @classmethod
    def of(cls, value: int) -> Extent:
        """Without the binding's constructor, which refuses."""
        made = cls.__new__(cls)
        made.value = int(value)
        return made

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


class Builder:
    """``IExprBuilder``'s two functions."""

    def constant(self, value: int) -> Extent:
        return Extent.of(value)

    def operation(self, operation: Any, first: Extent, second: Extent) -> Extent:
        kinds, a, b = trt.DimensionOperation, first.value, second.value
        if operation == kinds.SUM:
            return Extent.of(a + b)
        return Extent.of({kinds.FLOOR_DIV: a // b, kinds.CEIL_DIV: -(-a // b)}[operation])


class Registry:
    """``IPluginRegistry``'s rule: one creator per name, version and namespace."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, plugin_namespace: str = "") -> bool:
        key = (creator.name, creator.plugin_version, plugin_namespace)
        return self.creators.setdefault(key, creator) is creator

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> Any:  # noqa: A002
        return self.creators.get((type, version, plugin_namespace))


def descriptor(shape: list[int], dtype: Any) -> Any:
    desc = trt.DynamicPluginTensorDesc()
    desc.desc.dims = trt.Dims(shape)
    desc.desc.type = dtype
    desc.desc.format = trt.TensorFormat.LINEAR
    return desc


def fields_of(creator: Any, attributes: dict[str, Any]) -> list[Any]:
    """The parser's ``loadFields``: the creator's fields that the node has, integers as int32."""
    names = [field.name for field in creator.field_names]
    return [trt.PluginField(name, np.array([attributes[name]], np.int32), trt.PluginFieldType.INT32) for name in names]


def aot_launch(creator: Any, case: dict[str, Any]) -> dict[str, Any]:
    """What the engine would hold."""
    import tensorrt.plugin._tensor as expressions

    # the real one hands the expression to TensorRT's libraries; the template has checked the class before
    expressions.SymExprImpl = lambda expression: expression._expr.get_constant_value()
    fields = fields_of(creator, plugin_attributes(case["scales"]))
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    collection = trt.PluginFieldCollection(fields)
    plugin = creator.create_plugin(NAME, DOMAIN, collection, trt.TensorRTPhase.BUILD, request)
    pooled, descriptors = described(plugin, case)
    plugin.get_supported_format_combinations(descriptors, 2)
    plugin.configure_plugin(descriptors[:2], descriptors[2:])
    plugin.set_tactic(0)
    scalars: dict[int, int] = {}
    launch = SimpleNamespace()
    setter = type("Setter", (), {"nbSymExprs": 0, "__setitem__": lambda self, i, value: scalars.update({i: value})})()
    plugin.get_launch_params([], descriptors, 2, launch, setter, Builder())
    entry, ptx = plugin.get_kernel([d.desc for d in descriptors[:2]], [d.desc for d in descriptors[2:]])
    assert (launch.block_y, launch.block_z) == (1, 1)
    return {
        "pooled": pooled,
        "grid": [launch.grid_x, launch.grid_y, launch.grid_z],
        "threads": launch.block_x,
        "shared": launch.shared_mem,
        "scalars": [scalars[i] for i in range(setter.nbSymExprs)],
        "entry": entry,
        "sha256": hashlib.sha256(ptx).hexdigest(),
    }


def described(plugin: Any, case: dict[str, Any]) -> tuple[list[int], list[Any]]:
    """The output's shape, from the plugin, and the descriptors of both inputs and the output."""
    dtype = TYPES[case["dtype"]]
    types = [dtype, trt.DataType.INT64]
    tokens, indices = case["tokens"], case["indices"]
    arguments = (types, [3, 2]) if hasattr(plugin, "init") else (types,)
    assert plugin.get_output_data_types(*arguments) == [dtype]
    shapes = [[Extent.of(extent) for extent in shape] for shape in (tokens, indices)]
    (found,) = plugin.get_output_shapes(shapes, [], Builder())
    pooled = [extent.value for extent in found]
    return pooled, [descriptor(tokens, dtype), descriptor(indices, trt.DataType.INT64), descriptor(pooled, dtype)]


def v3_launch(creator: Any, case: dict[str, Any]) -> dict[str, Any]:
    """What ``enqueue`` launches, after the engine was written and read."""
    fields = fields_of(creator, plugin_attributes(case["scales"]))
    built = creator.create_plugin("layer", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    check_capabilities(built)
    pooled, descriptors = described(built, case)
    check_formats(built, descriptors)
    built.configure_plugin(descriptors[:2], descriptors[2:])
    copy = built.clone()
    kept = [(field.name, np.array(field.data), field.type) for field in copy.get_fields_to_serialize()]
    read = [trt.PluginField(*field) for field in kept]
    loaded = creator.create_plugin("layer", trt.PluginFieldCollection(read), trt.TensorRTPhase.RUNTIME)
    plugin = loaded.attach_to_context(None)
    calls: list[Any] = []
    cuda.load_kernel = lambda *args: calls.append(LOAD.bind(*args).arguments) or "function"
    cuda.launch = lambda *args: calls.append(LAUNCH.bind(*args).arguments)
    descs = [d.desc for d in descriptors]
    plugin.on_shape_change(descs[:2], descs[2:])
    assert len(calls) == 1, "the kernel is loaded before it is launched, for graph capture"
    for _ in range(2):
        plugin.enqueue(descs[:2], descs[2:], *ADDRESSES, 0, STREAM)
    loading, launching, again = calls
    assert launching == again
    assert (launching["kernel"], launching["stream"]) == ("function", STREAM)
    arguments = launching["arguments"]
    assert [value for value, kind in arguments if kind is None] == [*ADDRESSES[0], *ADDRESSES[1]]
    assert [kind is None for _, kind in arguments] == [True, True, False, False, False, True]
    return {
        "pooled": pooled,
        "grid": launching["grid"],
        "threads": launching["threads"],
        "shared": launching["shared"],
        "scalars": [value for value, kind in arguments if kind is not None],
        "entry": loading["entry"],
        "sha256": hashlib.sha256(loading["ptx"]).hexdigest(),
    }


def check_capabilities(plugin: Any) -> None:
    kinds = {"CORE": trt.IPluginV3OneCore, "BUILD": trt.IPluginV3OneBuild, "RUNTIME": trt.IPluginV3OneRuntime}
    for name, kind in kinds.items():
        assert isinstance(plugin.get_capability_interface(getattr(trt.PluginCapabilityType, name)), kind)
    identity = (plugin.plugin_name, plugin.plugin_version, plugin.plugin_namespace, plugin.num_outputs)
    assert identity == (NAME, str(VERSION), DOMAIN, 1), identity


def check_formats(plugin: Any, descriptors: list[Any]) -> None:
    """The types of the case are supported, and nothing else at any position."""
    for position in range(3):
        assert plugin.supports_format_combination(position, descriptors, 2)
        right = trt.DataType(int(descriptors[position].desc.type))  # older bindings give a view of the field
        others = [trt.DataType.INT32, trt.DataType.INT8, *(TYPES.values() if position else ())]
        for other in (kind for kind in others if kind != right):
            descriptors[position].desc.type = other
            assert not plugin.supports_format_combination(position, descriptors, 2)
        descriptors[position].desc.type = right
        descriptors[position].desc.format = trt.TensorFormat.CHW32
        assert not plugin.supports_format_combination(position, descriptors, 2)
        descriptors[position].desc.format = trt.TensorFormat.LINEAR


def main(kind: str, cases: str, out: str) -> None:
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    trt.DimsExprs = lambda length: [None] * length  # the real one holds TensorRT's own expressions only
    first, again = register((8, 7)), register((8, 7), [])
    assert first == again
    found = {"registered": [first.kind, first.sha256, first.reason], "launches": []}
    assert list(registry.creators) == ([] if first.kind == "none" else [(NAME, str(VERSION), DOMAIN)])
    creator = next(iter(registry.creators.values()), None)
    if kind == "v3" and first.kind != "v3":  # newer TensorRT has the older class too
        from kernels import plugin_v3
        from kernels.ptx import find

        registry.creators.clear()
        assert plugin_v3.register(lambda dtype, scales: find((8, 7), dtype, scales))
        creator = next(iter(registry.creators.values()))
    if creator is not None:
        assert [field.name for field in creator.field_names] == list(PLUGIN_FIELDS)
        launch = aot_launch if kind == "aot" else v3_launch
        found["launches"] = [launch(creator, case) for case in json.loads(Path(cases).read_text())]
    Path(out).write_text(json.dumps(found))
    gc.collect()  # crashes on TensorRT 10.3 where a plugin was destroyed


if __name__ == "__main__":
    main(*sys.argv[1:])
