"""A copy of a stage's graph for what one TensorRT release takes: same numbers, older operators.

``lower`` applies the edits that a release needs, one per file; each says what it requires and what it ensures.
``write_lowered`` puts the result beside links to the bundle's weights. Needs onnx and onnx-ir, neither torch nor
TensorRT.
"""

from __future__ import annotations

from export.lower.graph import lower, lowerings
from export.lower.release import Release, release_of
from export.lower.write import write_lowered

__all__ = ["Release", "lower", "lowerings", "release_of", "write_lowered"]
