"""Fill in the dtypes and shapes that a graph's values lack, by ONNX's inference.

Requires: nothing. Ensures: what was known stays; weights in files are not read. Bodies of functions are left alone:
inline them to know their types.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from runtime.errors import BundleError

__all__ = ["infer_types"]


def infer_types(model: ir.Model) -> None:
    """Apply the edit in place; values whose type cannot be inferred stay without.

    Raises:
        BundleError: the graph is no valid ONNX.
    """
    try:
        proto = onnx.shape_inference.infer_shapes(ir.serde.serialize_model(model), data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise BundleError(f"graph: found {error!s:.200}, expected valid ONNX; export the bundle again") from error
    found = {info.name: info for info in proto.graph.value_info}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            info = found.get(value.name or "")
            if info is not None and (value.dtype is None or value.shape is None):
                ir.serde.deserialize_value_info_proto(info, value)
