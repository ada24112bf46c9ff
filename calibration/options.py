"""What a calibration run is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from calibration.choose import CHOICES, Choice
from calibration.choose_blocks import ROUNDINGS, Rounding
from runtime.backend import MAX_THREADS
from runtime.errors import OptionError

__all__ = ["LLM", "PRECISIONS", "Embedding", "Precision", "QuantizeOptions"]

Precision = Literal["int8", "int4"]
LLM = Literal["int8", "int4", "float"]
Embedding = Literal["float", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
BLOCKS = (16, 32, 64, 128, 256)
DEFAULT_BLOCK = 128


@dataclass(frozen=True)
class QuantizeOptions:
    """What to quantise, how, and what must be kept.

    Attributes:
        precision: "int8" for W8A8 everywhere; "int4" for an LLM with 4-bit weights behind W8A8 stages.
        llm: the LLM's own precision, in place of the one that follows from ``precision``.
        embedding: how the token embedding table is stored.
        method: how activations' thresholds are chosen.
        rounding: how 4-bit weights are rounded; "auto" takes what errs least for each layer.
        block: rows of a 4-bit weight that share a scale, at most; smaller where it does not divide.
        min_cosine: least cosine of vision, refine and aggregate with the float stage, on any measured example.
        min_cosine_llm: the same of the LLM's logits; None asks for nothing.
        max_drop: most percentage points of labelled answers that may be lost; None asks for nothing.
        questions: file of questions; None for a small set of our own.
        frames: frames taken of every clip; None for the bundle's default.
        scales: a scale table to use in place of what this run would choose.
        threads: compute threads; None for one a core.
        force: replace a bundle that exists.
    """

    precision: Precision = "int8"
    llm: LLM | None = None
    embedding: Embedding = "float"
    method: Choice = "auto"
    rounding: Rounding = "auto"
    block: int = DEFAULT_BLOCK
    min_cosine: float = 0.999
    min_cosine_llm: float | None = None
    max_drop: float | None = None
    questions: Path | None = None
    frames: int | None = None
    scales: Path | None = None
    threads: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("precision", self.precision, PRECISIONS),
            ("llm", self.llm, (None, *get_args(LLM))),
            ("embedding", self.embedding, get_args(Embedding)),
            ("method", self.method, CHOICES),
            ("rounding", self.rounding, ROUNDINGS),
            ("block", self.block, BLOCKS),
        ):
            if value not in allowed:
                raise OptionError(f"{name} is {value!r}, expected one of {', '.join(map(str, allowed))}")
        for name, cosine in (("min-cosine", self.min_cosine), ("min-cosine-llm", self.min_cosine_llm)):
            if cosine is not None and not 0 <= cosine < 1:
                raise OptionError(f"--{name} is {cosine}, expected 0 or more and below 1")
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise OptionError(f"--max-drop is {self.max_drop}, expected 0 to 100 percentage points")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise OptionError(
                f"--threads is {self.threads}, expected 1 to {MAX_THREADS}; leave it out for one per core"
            )

    @property
    def decode(self) -> LLM:
        """What the LLM becomes."""
        return self.llm or self.precision

    @property
    def narrow_options(self) -> dict[str, bool]:
        """Options about 4-bit weights, and whether something but the default is asked for."""
        return {"rounding": self.rounding != "auto", "block-size": self.block != DEFAULT_BLOCK}
