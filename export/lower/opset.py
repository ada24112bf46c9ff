"""The same graph under an older opset.

Requires: operators that the older opset has in the same meaning, which is every one that the exporter writes once
Attention, RMSNormalization, RotaryEmbedding and TensorScatter are lowered. Ensures: the older opset import on the model
and its functions. What could mean something else there is refused by node.

Looks at meanings, not at dtypes: opset 20 of ONNX knows Conv, Cos, Sin, Round and TopK in float32 and float16 alone,
TensorRT's parser takes them in bfloat16 under any opset.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnx.defs import SchemaError, get_schema

from calibration.trt_rules import every_node
from export.lower.emit import refusal

__all__ = ["lower_opset"]

# Operators of opset 24 whose newer versions since 20 took in further dtypes or optional attributes and nothing else
WIDENED = frozenset(
    (
        *("AveragePool", "Cast", "Constant", "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "DequantizeLinear"),
        *("Flatten", "Identity", "MaxPool", "Pad", "QuantizeLinear", "Reshape", "Round", "Shape", "Sin", "Squeeze"),
        *("TopK", "Transpose", "Unsqueeze"),
    )
)


def lower_opset(model: ir.Model, opset: int) -> None:
    """Apply the edit in place.

    Raises:
        BundleError: a node that the older opset lacks or understands differently.
    """
    newer = model.opset_imports[""]
    for node in every_node(model):
        if not node.domain:
            check_meaning(node, newer, opset)
    model.opset_imports[""] = opset
    for function in model.functions.values():
        function.opset_imports[""] = opset


def check_meaning(node: ir.Node, newer: int, older: int) -> None:
    """Refuse a node that the older opset lacks or understands differently; drop what it says twice."""
    known = [versions(node.op_type, opset) for opset in (newer, older)]
    if known[1] is None:
        raise refusal(node, f"no such operator in opset {older}", f"one that opset {older} has")
    if known[0] != known[1] and node.op_type not in WIDENED:
        raise refusal(node, f"another meaning in opset {older}", "an operator that did not change")
    for name in list(unknown_attributes(node, older)):
        if not is_redundant(node, name):
            raise refusal(node, f"the attribute {name}", f"those of opset {older}")
        node.attributes.pop(name)


def versions(operator: str, opset: int) -> int | None:
    """The opset in which an operator got the form that it has in ``opset``."""
    try:
        return get_schema(operator, opset).since_version
    except SchemaError:
        return None


def unknown_attributes(node: ir.Node, opset: int) -> Iterator[str]:
    """The node's attributes that its operator does not have in ``opset``."""
    attributes = get_schema(node.op_type, opset).attributes
    return (name for name in node.attributes if name not in attributes)


def is_redundant(node: ir.Node, name: str) -> bool:
    """Whether an attribute repeats what holds without it: zero, or the dtype that scale or zero point have anyway."""
    value = node.attributes[name].value
    if name == "output_dtype" and value:
        index = 2 if node.op_type == "QuantizeLinear" else 1
        source = node.inputs[index] if len(node.inputs) > index else None
        return source is not None and source.dtype == value
    return name in ("output_dtype", "block_size", "precision") and value == 0
