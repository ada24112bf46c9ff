"""How far a quantised stage is from the float one: both are fed with what the float stages made of the same clips.

A selection of tokens is judged by values. The refined tokens are compared at the float stage's selection; what the
quantised stage would rather select is judged by the float stage's scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_FLOOR, Decimal
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from calibration.parity import cosine
from calibration.watch import Form, loaded, watched_session
from kernels.spec import DOMAIN, gather_pool
from runtime.backend import Array
from runtime.backend_ort import OrtDecoder, OrtGraph
from runtime.manifest import Manifest

__all__ = ["Examples", "Loss", "floored", "measured"]

Floats = NDArray[np.float32]
Pair = tuple[Mapping[str, Array], Mapping[str, Array]]  # what a run was fed with, what it gave
Step = tuple[Floats, NDArray[np.int64], Floats]  # rows (S, D), positions (axes, S), logits (V,)
Kept = TypeVar("Kept")

TIED = 1e-4  # of the largest score: closer together, no selection is better than another


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """Distance of a stage's outputs, over all examples: vision's on one batch of frames, one selection, one
    question, one step of the LLM.

    Attributes:
        cosine: the smallest of any example.
        mean_cosine: their mean.
        relative: largest L2 norm of a difference over that of the float output.
        overlap: of SVR's selection with the float one, mean share of tokens.
        worth: smallest share of the float selection's advantage over the average token that the selection has, by the
            float scores; 1 where the scores are tied.
        agreement: share of steps in which the LLM's most likely token is the same.
    """

    cosine: float
    mean_cosine: float
    relative: float
    overlap: float | None = None
    worth: float | None = None
    agreement: float | None = None


def floored(value: float, digits: int) -> Decimal:
    """So many digits behind the point of the smallest of several values: rounded down, for none is below it."""
    return Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), ROUND_FLOOR)


@dataclass
class Examples:
    """Inputs and outputs of float stages, recorded while they run.

    Of many runs those are kept that lie evenly among all: every one until there are ``most``, then every second, every
    fourth and so on.

    Attributes:
        most: examples kept of a stage, counting sequences of the LLM.
    """

    most: int
    graphs: dict[str, list[Pair]] = field(default_factory=dict)
    sequences: list[list[Step]] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)  # runs by stage
    strides: dict[str, int] = field(default_factory=dict)  # the runs kept are those whose number this divides
    current: list[Step] = field(default_factory=list)  # the sequence that goes on, kept or not

    def look(self, stage: str, feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Record one run of a stage, or one step of the LLM."""
        if stage != "decode":
            self.keep(stage, self.graphs.setdefault(stage, []), (dict(feeds), dict(outputs)))
            return
        if feeds["position_ids"].min() == 0:  # a prompt begins
            self.current = []
            self.keep(stage, self.sequences, self.current)
        self.current.append((feeds["inputs_embeds"], feeds["position_ids"].copy(), outputs["logits"]))

    def keep(self, stage: str, kept: list[Kept], example: Kept) -> None:
        """Add an example where its turn is."""
        number, stride = self.seen.get(stage, 0), self.strides.get(stage, 1)
        self.seen[stage] = number + 1
        if number % stride == 0 and len(kept) == self.most:
            del kept[1::2]
            self.strides[stage] = stride = 2 * stride
        if number % stride == 0:
            kept.append(example)

    def few(self, stage: str, count: int) -> Examples:
        """The first ``count`` examples of one stage."""
        return Examples(count, {stage: self.graphs.get(stage, [])[:count]}, self.sequences[:count])


def measured(stage: str, forms: Sequence[Form], examples: Examples, manifest: Manifest, threads: int | None) -> Loss:
    """Run the graph (the first of ``forms`` that loads) over the examples of its stage."""
    if stage == "decode":
        return decode_loss(forms, examples, manifest, threads)
    pairs = examples.graphs[stage]
    if stage == "refine":
        return refine_loss(forms, pairs, manifest, threads)
    graph = OrtGraph(watched_session(forms, (), threads), stage)
    return loss_of((graph.run(feeds)["tokens"], outputs["tokens"]) for feeds, outputs in pairs)


def loss_of(pairs: Iterable[tuple[Floats, Floats]], **more: float) -> Loss:
    """Cosines and differences of pairs of outputs, found and wanted."""
    cosines, differences = [], []
    for found, wanted in pairs:
        cosines.append(cosine(found, wanted))
        norm = float(np.linalg.norm(wanted)) or 1.0
        differences.append(float(np.linalg.norm(found.astype(np.float64) - wanted)) / norm)
    return Loss(
        cosine=float(np.min(cosines)), mean_cosine=float(np.mean(cosines)), relative=float(np.max(differences)), **more
    )


def refine_loss(
    forms: Sequence[Form],
    pairs: Sequence[Pair],
    manifest: Manifest,
    threads: int | None,
) -> Loss:
    """SVR: pooled tokens at the float selection, and what another selection is worth."""
    assert manifest.linvt is not None
    source = pooled_tensor(forms[0])
    graph = OrtGraph(watched_session(forms, (source,), threads), "refine")
    outputs, overlaps, worths = [], [], []
    for feeds, wanted in pairs:
        found = graph.run(feeds)
        chosen, best = found["indices"][0], wanted["indices"][0]
        tokens = found[source] if source in found else feeds[source]
        tokens = tokens.reshape(1, -1, tokens.shape[-1]).astype(np.float32)
        outputs.append((gather_pool(tokens, best[None], manifest.linvt.pool_scales), wanted["visual"]))
        overlaps.append(len(np.intersect1d(chosen, best)) / len(best))
        worths.append(worth(wanted["scores"][0], chosen, best))
    return loss_of(outputs, overlap=float(np.mean(overlaps)), worth=float(np.min(worths)))


def pooled_tensor(form: Form) -> str:
    """Name of the tensor that SVR gathers tokens from."""
    return next(str(node.input[0]) for node in loaded(form)[0].graph.node if node.domain == DOMAIN)


def worth(scores: Floats, chosen: NDArray[np.int64], best: NDArray[np.int64]) -> float:
    """The advantage of ``chosen`` over the average token, as a share of that of ``best``."""
    average = float(scores.mean(dtype=np.float64))
    advantage = float(scores[best].mean(dtype=np.float64)) - average
    if advantage <= TIED * float(np.abs(scores).max()):
        return 1.0
    return (float(scores[chosen].mean(dtype=np.float64)) - average) / advantage


def decode_loss(forms: Sequence[Form], examples: Examples, manifest: Manifest, threads: int | None) -> Loss:
    """The LLM: logits of every step, fed with the float LLM's tokens."""
    session = watched_session(forms, (), threads)
    outputs: list[tuple[Floats, Floats]] = []
    for sequence in examples.sequences:
        capacity = sum(len(embeds) for embeds, _, _ in sequence)
        decoder = OrtDecoder(session, manifest, "cpu", capacity)
        outputs += [(decoder.step(embeds, positions), logits) for embeds, positions, logits in sequence]
    same = [int(found.argmax() == wanted.argmax()) for found, wanted in outputs]
    return loss_of(outputs, agreement=float(np.mean(same)))
