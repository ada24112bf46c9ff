"""How an answer is generated: the bundle's defaults, the user's overrides, both resolved into one record.

``GenerationDefaults`` travels in the bundle's manifest. ``GenerationOptions`` is what a user asked for, with
None for "as the bundle says". ``GenerationOptions.resolve`` returns the ``Sampling`` that the sampler reads;
names, meanings and defaults are those of Hugging Face's ``GenerationConfig``.

Does not sample (``sample`` does), does not parse a command line and does not print.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import msgspec

from runtime.errors import OptionError

__all__ = ["GenerationDefaults", "GenerationOptions", "Sampling"]

_SAMPLING_ONLY = ("temperature", "top_p", "top_k", "seed")


class _Rule(NamedTuple):
    """What a value of one option must be: its kind, its range, and both in words."""

    kind: type[Any]
    accepts: Callable[[Any], bool]
    expected: str


_RULES = {
    "max_new_tokens": _Rule(Integral, lambda v: v >= 1, "an integer of at least 1"),
    "do_sample": _Rule(bool, lambda v: True, "true or false"),
    "temperature": _Rule(Real, lambda v: v > 0 and math.isfinite(v), "a finite number above 0"),
    "top_p": _Rule(Real, lambda v: 0 < v <= 1, "a number above 0 and at most 1"),
    "top_k": _Rule(Integral, lambda v: v >= 0, "an integer of at least 0 (0 switches it off)"),
    "repetition_penalty": _Rule(Real, lambda v: v > 0 and math.isfinite(v), "a finite number above 0"),
    "seed": _Rule(Integral, lambda v: v >= 0, "an integer of at least 0"),
    "ignore_eos": _Rule(bool, lambda v: True, "true or false"),
}


def _fault(name: str, value: object) -> str | None:
    """One line on why ``value`` cannot be option ``name``, or None where it can."""
    rule = _RULES[name]
    kind_fits = isinstance(value, rule.kind) and (rule.kind is bool or not isinstance(value, bool))
    if kind_fits and rule.accepts(value):
        return None
    return f"{name} is {value!r}; expected {rule.expected}"


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bundle's own generation settings; a value out of range is a ``ValueError``.

    Attributes:
        max_new_tokens: most tokens an answer may have.
        do_sample: draw tokens; False takes the likeliest one and ignores temperature, top_k and top_p.
        temperature: divides the logits; below 1 sharpens.
        top_p: smallest share of probability that the kept tokens must hold; 1 keeps all.
        top_k: number of likeliest tokens kept; 0 keeps all.
        repetition_penalty: above 1 makes tokens that were already generated less likely.
    """

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 50
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if fault := _fault(name, getattr(self, name)):
                raise ValueError(fault)


@dataclass(frozen=True)
class Sampling:
    """Resolved settings of one answer; fields as in ``GenerationDefaults`` and ``GenerationOptions``."""

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int | None
    ignore_eos: bool


@dataclass(frozen=True)
class GenerationOptions:
    """What the user asked for; None leaves the bundle's default in place. Out of range is an ``OptionError``.

    Attributes:
        seed: makes drawing repeatable; None draws afresh each time.
        ignore_eos: go on to ``max_new_tokens`` past every stop token, for benchmarks.

    The other names are explained in ``GenerationDefaults``.
    """

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in _RULES:
            value = getattr(self, name)
            fault = _fault(name, value) if value is not None or name == "ignore_eos" else None
            if fault:
                raise OptionError(f"{fault}; change it, or leave it out to use the bundle's default")

    def resolve(self, defaults: GenerationDefaults) -> Sampling:
        """The settings that hold: the user's where given, the bundle's elsewhere."""
        values = msgspec.structs.asdict(defaults)
        values.update((name, getattr(self, name)) for name in values if getattr(self, name) is not None)
        return Sampling(**values, seed=self.seed, ignore_eos=self.ignore_eos)

    def ignored(self, defaults: GenerationDefaults) -> tuple[str, ...]:
        """Names the user gave that have no effect because nothing is sampled, for a remark under ``-v``."""
        if self.resolve(defaults).do_sample:
            return ()
        return tuple(name for name in _SAMPLING_ONLY if getattr(self, name) is not None)
