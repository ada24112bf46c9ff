"""Logits to the next token id: repetition penalty, temperature, top-k, top-p, then argmax or a draw.

Order and meaning are those of Hugging Face's logits processors when the prompt is given as embeddings: only
generated ids are penalised. Selection comes before sorting, so a vocabulary of 150 000 costs no full sort.

Does not stop at an end token and does not count tokens: the generation loop does. Knows no beams, no batches.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendError
from runtime.options import Sampling

__all__ = ["Sampler"]

Floats32 = NDArray[np.float32]
Floats64 = NDArray[np.float64]
Ids = NDArray[np.int64]

_FIRST_NUCLEUS = 1024  # candidates sorted for top-p before more are looked at
_LARGEST = float(np.finfo(np.float32).max)


class Sampler:
    """Chooses one answer's tokens one by one; make a new one for every answer.

    ``next`` is the whole use of it. ``probabilities`` shows what the next draw would be made from.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generated: list[int] = []
        self._random = np.random.Generator(np.random.PCG64(sampling.seed)) if sampling.do_sample else None

    def next(self, logits: Floats32) -> int:
        """The next token id for ``logits`` (V,) f32; it counts as generated from now on."""
        scores = self._penalised(logits)
        chosen = int(scores.argmax()) if self._random is None else self._drawn(scores, self._random)
        self._generated.append(chosen)
        return chosen

    def probabilities(self, logits: Floats32) -> Floats64:
        """What the next token is drawn from, (V,) f64 summing to 1; one-hot where nothing is sampled."""
        scores = self._penalised(logits)
        dense = np.zeros(scores.shape, np.float64)
        if self._random is None:
            dense[scores.argmax()] = 1.0
        else:
            ids, weights = self._kept(scores)
            dense[ids] = weights
        return dense

    def _drawn(self, scores: Floats32, random: np.random.Generator) -> int:
        ids, weights = self._kept(scores)
        reached = weights.cumsum()
        at = reached.searchsorted(random.random() * reached[-1], side="right")
        return int(ids[min(at, np.flatnonzero(weights)[-1])])  # the product may round up to the total

    def _penalised(self, logits: Floats32) -> Floats32:
        """A copy or view of ``logits`` (V,) f32 with generated ids made less likely."""
        scores: Floats32 = np.asarray(logits, np.float32)
        if not np.isfinite(scores).all():
            raise BackendError(_not_finite(scores, len(self._generated)))
        penalty = self._sampling.repetition_penalty
        if penalty == 1.0 or not self._generated:
            return scores
        scores = scores.copy()
        ids = np.unique(self._generated)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            changed = np.where(scores[ids] < 0, scores[ids] * penalty, scores[ids] / penalty)
        scores[ids] = changed.clip(-_LARGEST, _LARGEST)
        return scores

    def _kept(self, scores: Floats32) -> tuple[Ids, Floats64]:
        """Token ids that may be drawn, ascending, and their probabilities f64."""
        ids = _top_k(scores, self._sampling.top_k)
        weights = _softmax(scores[ids], self._sampling.temperature)
        if self._sampling.top_p < 1.0:
            inside = _nucleus(weights, self._sampling.top_p)
            ids, weights = ids[inside], weights[inside] / weights[inside].sum()
        return ids, weights


def _not_finite(scores: Floats32, position: int) -> str:
    bad = int(scores.size - np.isfinite(scores).sum())
    what = "NaN" if np.isnan(scores).any() else "infinite"
    return (
        f"the model produced {what} logits ({bad} of {scores.size}) for token {position + 1} of the answer; "
        "expected finite numbers; run the bundle in fp32 or bf16, or export it again and compare with PyTorch"
    )


def _top_k(scores: Floats32, k: int) -> Ids:
    """Ids, ascending, of the ``k`` largest scores and of all that equal the smallest of them; 0 keeps all."""
    if not 0 < k < scores.size:
        return np.arange(scores.size)
    return np.flatnonzero(scores >= np.partition(scores, -k)[-k])


def _softmax(scores: Floats32, temperature: float) -> Floats64:
    # the largest is taken off first: dividing by a tiny temperature then gives -inf at worst, never inf - inf
    shifted = scores.astype(np.float64) - float(scores.max())
    with np.errstate(over="ignore", under="ignore"):
        weights: Floats64 = np.exp(shifted / temperature)
    weights /= weights.sum()
    return weights


def _nucleus(weights: Floats64, top_p: float) -> Ids:
    """Positions (ascending) that survive top-p: summed from the least likely up, those beyond ``1 - top_p``.

    Only the likeliest get sorted: where they hold at least ``top_p``, everything below them goes as a whole.
    """
    size = min(_FIRST_NUCLEUS, weights.size)
    candidates = _at_least_the_nth(weights, size)
    while size < weights.size and weights[candidates].sum() < top_p:
        size = min(size * 8, weights.size)
        candidates = _at_least_the_nth(weights, size)
    order = candidates[weights[candidates].argsort(kind="stable")]
    below = 0.0 if candidates.size == weights.size else max(0.0, 1.0 - float(weights[candidates].sum()))
    kept = below + weights[order].cumsum() > 1.0 - top_p
    kept[-1] = True
    return np.sort(order[kept])


def _at_least_the_nth(weights: Floats64, n: int) -> Ids:
    return np.flatnonzero(weights >= np.partition(weights, -n)[-n])
