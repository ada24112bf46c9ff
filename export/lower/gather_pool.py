"""``linvt::GatherPool`` as TensorRT's parser is to see it: a plugin, or standard operators.

Requires: the node's function body is in the model. Ensures, with the plugin: the node carries all plugin attributes in
registration order; the body stays where the parser prefers a registered plugin to it, and goes where the parser would
inline it without looking (ONNX Runtime cannot open that form). Without: the body stands in the node's place.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from export.lower.emit import called
from kernels.spec import DOMAIN, NAME, plugin_attributes
from runtime.errors import BundleError

__all__ = ["inline_gather_pool", "name_plugin"]


def name_plugin(model: ir.Model, *, keep_body: bool) -> None:
    """Apply the edit in place.

    Raises:
        BundleError: more scales than the plugin takes.
    """
    for node in model.graph:
        if (node.domain, node.op_type) != (DOMAIN, NAME):
            continue
        scales = node.attributes["scales"].as_ints()
        try:
            attributes = ir.convenience.convert_attributes(plugin_attributes(scales))
        except ValueError as error:
            raise BundleError(f"{called(node)}: {error}; build without the plugin") from error
        node.attributes.clear()
        for attribute in attributes:
            node.attributes.add(attribute)
        if not keep_body:
            model.functions.pop(node.op_identifier(), None)


def inline_gather_pool(model: ir.Model) -> None:
    """Apply the edit in place."""
    InlinePass()(model)
    if all(node.domain != DOMAIN for node in model.graph):
        model.opset_imports.pop(DOMAIN, None)
