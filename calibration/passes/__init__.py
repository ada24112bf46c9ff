"""Edits of a graph that export and calibration share, one per file; each says what it requires and what it ensures."""

from __future__ import annotations

from calibration.passes.lower_opset import lower_opset
from calibration.passes.narrow_weights import narrow_weights

__all__ = ["lower_opset", "narrow_weights"]
