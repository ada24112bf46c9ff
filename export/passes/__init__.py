"""Edits of a traced model, one per file; each says what it requires and what it ensures."""

from __future__ import annotations

from export.passes.attach_gather_pool import attach_gather_pool
from export.passes.fold_constants import fold_constants
from export.passes.transpose_weights import transpose_weights

__all__ = ["attach_gather_pool", "fold_constants", "transpose_weights"]
