"""What a build is asked for, and the numbers behind ``--min``, ``--opt`` and ``--max``.

Knows nothing of a bundle: whether a number suits one is for ``shapes`` to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runtime.errors import OptionError

__all__ = ["KEYS", "MIB", "BuildOptions", "numbers"]

MIB = 2**20  # bytes
MOST_MIB = 2**40 // MIB
KEYS = {
    "batch": "frames of one vision run",
    "frames": "frames of a video",
    "text": "tokens of a question, as LinVT reads it",
    "tokens": "tokens of prompt and answer together",
}
LEVELS = range(6)  # IBuilderConfig.builder_optimization_level


@dataclass(frozen=True)
class BuildOptions:
    """What to build, for which sizes, within which limits.

    Attributes:
        least: smallest sizes, by key of ``KEYS``; a key that is not there follows the bundle.
        best: sizes that tactics are chosen for.
        most: largest sizes.
        workspace: MiB of scratch memory that one layer may use; None leaves it to the memory that is there.
        max_memory: MiB of the device's memory to make do with, building and running; None for what is free.
        stages: which to build; none named means all.
        timing_cache: the file of measured tactics; None for the one beside the engines.
        level: TensorRT's optimisation level, 0 to 5; None for its default.
        tf32: products of float32 may round their inputs to 10 bits, which is faster and not what was compared.
        plugin: whether ``linvt::GatherPool`` may become the plugin; its function body otherwise.
        ptx: folders with further PTX of the plugin.
        force: build what is up to date too, and what seems too large.
    """

    least: Mapping[str, int] = field(default_factory=dict)
    best: Mapping[str, int] = field(default_factory=dict)
    most: Mapping[str, int] = field(default_factory=dict)
    workspace: int | None = None
    max_memory: int | None = None
    stages: tuple[str, ...] = ()
    timing_cache: Path | None = None
    level: int | None = None
    tf32: bool = False
    plugin: bool = True
    ptx: tuple[Path, ...] = ()
    force: bool = False

    def __post_init__(self) -> None:
        for option, sizes in (("min", self.least), ("opt", self.best), ("max", self.most)):
            if unknown := sorted(sizes.keys() - KEYS):
                raise OptionError(f"--{option} has the key {unknown[0]!r:.40}, expected some of {', '.join(KEYS)}")
        for option, amount in (("workspace", self.workspace), ("max-memory", self.max_memory)):
            if amount is not None and not 1 <= amount < MOST_MIB:
                raise OptionError(f"--{option} is {amount}, expected 1 to {MOST_MIB - 1} MiB")
        if self.level is not None and self.level not in LEVELS:
            raise OptionError(f"--optimization-level is {self.level}, expected {LEVELS[0]} to {LEVELS[-1]}")


def numbers(text: str) -> dict[str, int]:
    """ "frames=32,tokens=1024" -> numbers by key.

    Raises:
        ValueError: an unknown key, one that comes twice, or no whole number from 1 on; the text is one line.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        key, equals, number = part.strip().partition("=")
        if key not in KEYS or not equals:
            raise ValueError(f"found {part!r:.40}, expected KEY=N with a key of {', '.join(KEYS)}")
        if key in found:
            raise ValueError(f"{key} comes twice, expected it once")
        if not (number.isascii() and number.isdecimal()) or not 1 <= int(number) < 2**31:
            raise ValueError(f"{key} is {number!r:.40}, expected a whole number from 1 on")
        found[key] = int(number)
    return found
