"""Give the ``linvt::GatherPool`` node its function body.

Requires: static length of the node's ``indices``. Ensures: a model that holds the node also holds the function and the
domain's opset import, so that an engine without the plugin can inline it.
"""

from __future__ import annotations

import onnx_ir as ir

from kernels.function import function_body
from kernels.spec import DOMAIN, NAME, VERSION

__all__ = ["attach_gather_pool"]


def attach_gather_pool(model: ir.Model) -> None:
    """Apply the edit in place."""
    for node in model.graph:
        if (node.domain, node.op_type) != (DOMAIN, NAME):
            continue
        indices = node.inputs[1]
        assert indices is not None and indices.shape is not None
        top_k = indices.shape[1]
        assert isinstance(top_k, int), "top_k is a constant of the traced module"
        body = function_body(top_k, node.attributes["scales"].as_ints(), model.opset_imports[""])
        function = ir.serde.deserialize_function(body)
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = VERSION
