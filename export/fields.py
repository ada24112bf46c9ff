"""Fields of a ``config.json``, read strictly: a missing or odd one is refused by its dotted name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from runtime.errors import CheckpointError

__all__ = [
    "LARGEST",
    "MOST_LAYERS",
    "SHORTEST_CONTEXT",
    "Field",
    "divided",
    "field",
    "one_of",
    "optional",
    "positive",
    "reading",
    "shortened",
    "size",
]

Field = TypeVar("Field")

LARGEST = 2**24  # of any width, vocabulary or context; no published model comes near
MOST_LAYERS = 1024  # of tower or LLM; building a module for a mistyped number would not end
SHORTEST_CONTEXT = 64  # tokens; the template alone takes about as many
HIGHEST = 1e12  # of an epsilon, a base of wave lengths or a factor
LONGEST_SHOWN = 80  # characters of a value in an error message


@contextmanager
def reading(file: str) -> Iterator[None]:
    """Have the readers below, who speak of config.json, speak of another file."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("config.json", file, 1)) from error
    except ValueError as error:
        raise CheckpointError(f"{file} does not fit: {error}; download it again") from error


def field(config: Mapping[str, Any], path: str, kind: type[Field]) -> Field:
    """The value at a dotted ``path`` of ``config.json``, which must be of ``kind``.

    Raises:
        CheckpointError: absent or of another type; the message names the field.
    """
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(
            f"config.json field {path} is {shortened(value)}, expected {kind.__name__}; the checkpoint is incomplete"
        )
    return value


def optional(config: Mapping[str, Any], path: str, default: Field) -> Field:
    """As ``field``, of the type of ``default``, which stands for an absent or null value."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return default if value is None else field(config, path, type(default))


def size(config: Mapping[str, Any], path: str, *, least: int = 1, most: int = LARGEST) -> int:
    """A whole number within bounds, e.g. a width."""
    value = field(config, path, int)
    if not least <= value <= most:
        raise CheckpointError(f"config.json field {path} is {shortened(value)}, expected {least} to {most}")
    return value


def divided(config: Mapping[str, Any], whole: str, part: str) -> int:
    """How often the size at ``part`` goes into the size at ``whole``, which it must do without a rest."""
    total, each = size(config, whole), size(config, part)
    if total % each:
        raise CheckpointError(f"config.json field {whole} is {total}, expected a multiple of {part}, which is {each}")
    return total // each


def positive(config: Mapping[str, Any], path: str) -> float:
    """A finite number above 0, e.g. an epsilon."""
    value = field(config, path, float)
    if not 0 < value <= HIGHEST:
        raise CheckpointError(f"config.json field {path} is {value}, expected a number above 0, at most {HIGHEST:g}")
    return value


def one_of(config: Mapping[str, Any], path: str, *known: Field) -> Field:
    """A choice of which only the ``known`` ones are supported; the first holds where it is absent."""
    value = optional(config, path, known[0])
    if value not in known:
        supported = ", ".join(map(repr, known))
        raise CheckpointError(f"config.json field {path} is {shortened(value)}; supported: {supported}")
    return value


def shortened(value: object) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
