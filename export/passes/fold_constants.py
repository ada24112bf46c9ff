"""Evaluate what depends on constants alone, and drop what nothing reads.

Requires: nothing. Ensures: no dead node or initializer; subgraphs of small constants (shapes, indices, scales) are
constants. Weights are larger than the limit and stay as they are.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import optimizer

__all__ = ["fold_constants"]

LIMIT = 1024  # elements; a folded shape or scale is far smaller, a weight worth naming larger


def fold_constants(model: ir.Model) -> None:
    """Apply the edit in place."""
    optimizer.optimize_ir(model, input_size_limit=LIMIT, output_size_limit=LIMIT)
