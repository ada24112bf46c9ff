"""How far two stages are apart, and whether that is close enough.

Numbers only; ``compare`` runs the stages, ``evidence`` keeps the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.manifest import StageSpec

__all__ = [
    "CHAIN",
    "REFERENCE",
    "STAGES",
    "Row",
    "Tolerance",
    "greedy_row",
    "selection_row",
    "tolerance_of",
    "value_row",
]

Floats = NDArray[np.float32]

REFERENCE, CHAIN = "reference", "chain"  # what a stage is fed with; see ``Row``
STAGES = ("vision", "refine", "embedding", "aggregate", "decode")  # on the data's way


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted difference: absolute + relative * largest magnitude of the reference."""

    absolute: float = 1e-4
    relative: float = 1e-4

    def limit(self, reference: Floats) -> float:
        """The accepted difference for one tensor."""
        return self.absolute + self.relative * float(np.abs(reference).max())


# By what a stage computes in. Of the tiny checkpoints of all families the worst row needs 1.3e-2 in float16 (Molmo's
# features, else 5e-3) where float32 needs 4e-6; bfloat16 has three bits less than float16 and was found 8 times as far.
# The demo in 8 bits needs 4e-2, with an LLM of 4 bits 6e-2: what a quantised bundle lost is in its quantization.json.
TOLERANCES = {
    "float32": Tolerance(),
    "float16": Tolerance(2e-2, 2e-2),
    "bfloat16": Tolerance(1.6e-1, 1.6e-1),
    "int8": Tolerance(5e-2, 5e-2),
    "int4": Tolerance(1e-1, 1e-1),
}


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        stage: one of ``STAGES``.
        value: what was compared, e.g. an output of the stage's graph.
        scope: "reference" when fed with the reference's values, "chain" when fed with the bundle's own.
        max_abs: largest difference; relative: L2 norm of the difference over that of the reference.
        cosine: between the flattened tensors.
        limit: what ``max_abs`` may be.
        note: selection overlap or agreeing tokens.
    """

    stage: str
    value: str
    scope: str
    max_abs: float
    relative: float
    cosine: float
    limit: float
    passed: bool
    note: str = ""


def tolerance_of(stages: Mapping[str, StageSpec], stage: str, scope: str) -> Tolerance:
    """What a stage may differ by: its own precision decides, in the chain the coarsest so far.

    ``stages`` are those of the manifest; the embedding is looked up, not computed.
    """
    seen = STAGES[: STAGES.index(stage)] if scope == CHAIN else ()
    precisions = [precision_of(stages[name]) for name in (*seen, stage) if name in stages]
    return max((TOLERANCES[name] for name in (*precisions, "float32")), key=lambda tolerance: tolerance.relative)


def precision_of(spec: StageSpec) -> str:
    """What a stage's numbers are as coarse as."""
    return spec.quantized.weights if spec.quantized else spec.compute


def value_row(stage: str, value: str, scope: str, found: Floats, reference: Floats, tolerance: Tolerance) -> Row:
    """Compare values of one shape."""
    limit = tolerance.limit(reference)
    if found.shape != reference.shape:
        note = f"shape {list(found.shape)}, expected {list(reference.shape)}"
        return Row(stage, value, scope, math.inf, math.inf, 0.0, limit, False, note)
    difference = found.astype(np.float64) - reference
    norm = float(np.linalg.norm(reference))
    largest = float(np.abs(difference).max())
    return Row(
        stage,
        value,
        scope,
        largest,
        float(np.linalg.norm(difference)) / norm if norm else largest,
        cosine(found, reference),
        limit,
        bool(largest <= limit),  # NaN compares false
    )


def cosine(found: Floats, reference: Floats) -> float:
    """Cosine of the angle between two tensors; 1 when both are zero."""
    first, second = found.ravel().astype(np.float64), reference.ravel().astype(np.float64)
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norms if norms else float(np.array_equal(found, reference))


def selection_row(
    scope: str,
    found: NDArray[np.int64],
    reference: NDArray[np.int64],
    scores: Floats,
    tolerance: Tolerance,
    *,
    in_video_order: bool = False,
) -> Row:
    """Compare selections (k,) by what they are worth under the reference's ``scores`` (T * N,), place by place.

    Tokens whose scores are closer than the noise may change places; a token may not be passed over for a worse one.
    Selections that stand in the order of the video have to be ascending, and are compared best first.
    """
    if in_video_order and not (np.diff(found) > 0).all():
        return Row("refine", "indices", scope, math.inf, math.inf, 0.0, 0.0, False, "not in the order of the video")
    worth = scores[found], scores[reference]
    if in_video_order:
        worth = np.sort(worth[0])[::-1], np.sort(worth[1])[::-1]
    row = value_row("refine", "indices", scope, *worth, tolerance)
    overlap = len(np.intersect1d(found, reference)) / len(reference)
    order = "same order" if np.array_equal(found, reference) else "another order"
    return Row(**{**vars(row), "note": f"overlap {overlap:.1%}, {order}"})


def greedy_row(scope: str, found: list[int], reference: list[int], logits: list[Floats], limit: float) -> Row:
    """Compare greedy answers; where they part, the reference's ``logits`` must be a tie of the two tokens."""
    same = next((i for i, (a, b) in enumerate(zip(found, reference, strict=True)) if a != b), len(reference))
    gap = float(logits[same].max() - logits[same][found[same]]) if same < len(reference) else 0.0
    note = f"{same} of {len(reference)} tokens agree" + (f", then a gap of {gap:.2g}" if gap else "")
    return Row("decode", "answer", scope, gap, 0.0, 1.0, limit, gap <= limit, note)
