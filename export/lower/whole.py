"""What has to hold of a graph before it means anything to look at its nodes, each refused in one line.

It computes something, every tensor that is read is made somewhere, no node gives more than its operator does, weights
lie inside their files, and the graph takes and gives what the manifest says. Sparse weights are not known here.

Of files of weights the size alone is asked. Does not look at what nodes compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from calibration.trt_rules import every_node
from runtime.dtypes import NUMBERS
from runtime.errors import BundleError
from runtime.manifest import StageSpec, TensorSpec

__all__ = ["check_computes", "check_tensors", "check_weights"]

AGAIN = "export the bundle again"


def check_computes(model: ir.Model, path: Path) -> None:
    """There are nodes and outputs, and nothing is read that nobody makes.

    Raises:
        BundleError: one of these does not hold.
    """
    for what, there in (("nodes", len(model.graph)), ("outputs", model.graph.outputs)):
        if not there:
            raise BundleError(f"{path}: found a graph without {what}, expected one that computes a stage; {AGAIN}")
    for value in model.graph.outputs:
        if not is_made(value):
            raise BundleError(f"{path}: found no node that gives its output {value.name!r:.80}, expected one; {AGAIN}")
    for node in every_node(model):
        check_outputs(node, path)
        for read in node.inputs:
            if read is not None and not is_made(read):
                name = f"{node.op_type} {node.name}".strip()
                raise BundleError(
                    f"{path}: {name:.80} reads {read.name!r:.80}: found nothing that gives it, expected a node, an "
                    f"input or a weight; {AGAIN}"
                )


def check_outputs(node: ir.Node, path: Path) -> None:
    """A node gives no more than ONNX lets it; its inference of a Split that does would end the process.

    Raises:
        BundleError: it does.
    """
    split = node.attributes.get("num_outputs") if node.op_type == "Split" and not node.domain else None
    if split is not None and not split.is_ref() and split.as_int() != len(node.outputs):
        raise BundleError(
            f"{path}: {node.op_type} {node.name}: found {len(node.outputs)} outputs, expected num_outputs, which is "
            f"{split.as_int()}; {AGAIN}"
        )


def is_made(value: ir.Value) -> bool:
    """Whether there is anything that a value comes from."""
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()


def check_weights(model: ir.Model, path: Path) -> None:
    """Weights have the values that their shapes ask for; those in files have them inside their files.

    Raises:
        BundleError: a file is not there or too short.
        ValueError: a weight in the graph's own file has too few values.
    """
    sizes: dict[str, int] = {}
    for tensor in tensors(model):
        if not isinstance(tensor, ir.ExternalTensor):
            tensor.numpy()  # a view, which onnx-ir cannot make of too few bytes
            continue
        name = str(tensor.location)
        if name not in sizes:
            if not (path.parent / name).is_file():
                raise BundleError(
                    f"{path}: found no file {name!r:.80}, in which its weight {tensor.name!r:.80} should lie; copy the "
                    "bundle again or export it again"
                )
            sizes[name] = (path.parent / name).stat().st_size
        if tensor.length not in (None, tensor.nbytes):
            raise BundleError(
                f"{path}: found {tensor.length} bytes of the weight {tensor.name!r:.80}, expected {tensor.nbytes} for "
                f"{list(tensor.shape)} of {tensor.dtype.name.lower()}; {AGAIN}"
            )
        end = (tensor.offset or 0) + tensor.nbytes
        if end > sizes[name]:
            raise BundleError(
                f"{path}: found {sizes[name]} bytes in {name:.80}, expected {end} or more, where its weight "
                f"{tensor.name!r:.80} ends; copy the bundle again or export it again"
            )


def tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """All tensors, wherever they stand in a graph."""
    graphs = [model.graph, *model.graph.subgraphs()]
    for function in model.functions.values():
        graphs.extend(function.subgraphs())
    held = [value.const_value for graph in graphs for value in graph.initializers.values()]
    for node in every_node(model):
        for attribute in node.attributes.values():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.TENSOR:
                held.append(attribute.as_tensor())
            elif attribute.type == ir.AttributeType.TENSORS:
                held.extend(attribute.as_tensors())
    yield from (tensor for tensor in held if tensor is not None)


def check_tensors(model: ir.Model, spec: StageSpec) -> None:
    """Inputs and outputs are the manifest's, by the rule of ``runtime.backend_ort.check_tensors``.

    Raises:
        BundleError: one is not.
    """
    graph = model.graph
    inputs = [value for value in graph.inputs if value.name not in graph.initializers]
    for values, specs in ((inputs, spec.inputs), (graph.outputs, spec.outputs)):
        found = {value.name or "": value for value in values}
        wanted = {tensor.name: tensor for tensor in specs}
        for name in sorted(found.keys() | wanted.keys()):
            value, tensor = found.get(name), wanted.get(name)
            if value is None or tensor is None or not is_as_said(value, tensor):
                side = "input" if values is inputs else "output"
                raise BundleError(
                    f"{spec.file}: its tensor {name!r:.80} is not as bundle.json says: found {shown(value, side)}, "
                    f"expected {shown(tensor, side)}; {AGAIN}"
                )


def is_as_said(value: ir.Value, tensor: TensorSpec) -> bool:
    """Same dtype, same rank, and the same numbers where both have one."""
    if value.dtype is None or value.shape is None:
        return False
    axes = zip(value.shape, tensor.shape, strict=False)
    return (
        value.dtype == NUMBERS[tensor.dtype]
        and len(value.shape) == len(tensor.shape)
        and all(a == b for a, b in axes if isinstance(a, int) and isinstance(b, int))
    )


def shown(tensor: ir.Value | TensorSpec | None, side: str) -> str:
    """A tensor in words, e.g. "float32 [frames, 16, 160]"."""
    if tensor is None:
        return f"no such {side}"
    if isinstance(tensor, TensorSpec):
        dtype: str = tensor.dtype
    else:
        names = {number: name for name, number in NUMBERS.items()}
        dtype = "no dtype" if tensor.dtype is None else names.get(int(tensor.dtype), tensor.dtype.name.lower())
    if tensor.shape is None:
        return f"{dtype} of no shape"
    axes = (axis.value if isinstance(axis, ir.SymbolicDim) else axis for axis in tensor.shape)
    return f"{dtype} [{', '.join('?' if axis is None else str(axis) for axis in axes):.80}]"
