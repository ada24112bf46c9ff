"""``lower``: a graph becomes what one release takes, by the edits of this package that it needs.

Requires: a graph as the exporter or the quantiser writes it. Ensures: the same numbers, input and output names, and
weights that are not touched and not read. Whether the release takes the result, ``export.lower.rules`` says.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from calibration.trt_rules import missing, target_opset
from export.lower.attention import lower_attention
from export.lower.gather_pool import inline_gather_pool, name_plugin
from export.lower.infer import infer_types
from export.lower.opset import lower_opset
from export.lower.release import Release
from export.lower.rms_norm import lower_rms_norm
from export.lower.rotary import lower_rotary
from export.lower.tensor_scatter import lower_tensor_scatter

__all__ = ["lower", "lowerings"]

EDITS: dict[str, Callable[[ir.Model], None]] = {
    "Attention": lower_attention,
    "RMSNormalization": lower_rms_norm,
    "RotaryEmbedding": lower_rotary,
    "TensorScatter": lower_tensor_scatter,
}


def lower(model: ir.Model, release: Release, *, plugin: bool) -> None:
    """Apply what ``release`` needs in place.

    Args:
        model: one stage's graph; weights may lie in files.
        release: what to lower for.
        plugin: keep the node ``linvt::GatherPool`` for a registered plugin, else put standard operators there.

    Raises:
        BundleError: a node in a form that no edit knows.
    """
    if plugin:
        name_plugin(model, keep_body=not release.body_first)
    else:
        inline_gather_pool(model)
    infer_types(model)
    for operator in missing(model, release.rules):
        EDITS[operator](model)
    opset = target_opset(model, release.rules)
    if model.opset_imports.get("", 0) > opset:
        lower_opset(model, opset)


def lowerings(model: ir.Model, release: Release) -> tuple[str, ...]:
    """What ``lower`` would do about operators and opset, e.g. ("Attention", "opset 24 -> 20")."""
    found, opset = model.opset_imports.get("", 0), target_opset(model, release.rules)
    return (*missing(model, release.rules), *([f"opset {found} -> {opset}"] if found > opset else []))
