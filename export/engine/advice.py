"""What to ask for in place of what does not fit: less scratch memory, smaller sizes, or a narrower bundle.

Every suggestion was computed: with its words added to the command, the estimate fits. What belongs to another bundle
is ``narrower``'s to find. Compares with no device itself: ``fit`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from export.engine.estimate import WORKSPACE, Estimate
from export.engine.fit import Room, fits, mib
from export.engine.narrower import Change, narrower
from export.engine.options import MIB, BuildOptions
from export.engine.shapes import TEXT, Range, Ranges
from runtime.manifest import Manifest

__all__ = ["Asked", "changes", "suggestion"]

FEWEST_TOKENS = 256  # rows of prompt and answer below which a suggestion helps nobody
# MiB below which a suggestion would cost products their fast tactics: what the cuBLAS documentation recommends on GPUs
# other than Hopper (cublasSetWorkspace).
LEAST_WORKSPACE = 4


@dataclass(frozen=True)
class Asked:
    """A build that does not fit.

    Attributes:
        manifest: of the bundle.
        ranges: as the options have them.
        estimated: what the engines take for other ranges; with True, where all but SVR computed in float32.
    """

    manifest: Manifest
    options: BuildOptions
    ranges: Ranges
    estimated: Callable[[Ranges, bool], Estimate]


@dataclass(frozen=True)
class Less:
    """Options to add to the command, and what they ask for.

    Attributes:
        workspace: MiB; None as it was.
    """

    words: str
    ranges: Ranges
    workspace: int | None = None


def suggestion(candidates: Iterable[Change], room: Room) -> str:
    """The first change that fits, in words."""
    tried: dict[str, None] = {}
    for change in candidates:
        if how := fits(change.estimate, room):
            low = how == "one by one"
            need = change.estimate.one_by_one if low else change.estimate.together
            return f"{change.advice} ({mib(need)} MiB{', with --low-memory at run time' if low else ''})"
        tried.setdefault(change.precision)
    *some, last = "smaller size", "workspace", *filter(None, tried)
    return f"no {', '.join(some)} or {last} would make it fit: take a smaller model or a larger device"


def changes(asked: Asked) -> Iterator[Change]:
    """What can be asked for in place, what costs least first, and in the end all of it."""
    spaces = list(smaller_workspaces(asked))
    sizes = list(smaller_sizes(asked))
    for less in (*spaces, *sizes):
        yield change_of(asked, less)
    yield from narrower(asked.manifest, partial(estimate_at, asked, Less("", asked.ranges)))
    together = [with_workspace(less, spaces) for less in (*(sizes if spaces else ()), *smallest(asked))]
    for less in together:
        yield change_of(asked, less)
    for less in together[-1:] or spaces[-1:]:
        for change in narrower(asked.manifest, partial(estimate_at, asked, less)):
            yield replace(change, advice=f"{change.advice} and give {less.words}")


def change_of(asked: Asked, less: Less) -> Change:
    """Of the same bundle."""
    return Change(f"give {less.words}", estimate_at(asked, less, False))


def estimate_at(asked: Asked, less: Less, wide: bool) -> Estimate:
    """What engines for less take."""
    found = asked.estimated(less.ranges, wide)
    return found if less.workspace is None else replace(found, workspace=less.workspace * MIB)


def smaller_workspaces(asked: Asked) -> Iterator[Less]:
    """Scratch memory of a layer, halved as often as it makes sense."""
    most = WORKSPACE // MIB if asked.options.workspace is None else asked.options.workspace
    for workspace in halves(most, min(LEAST_WORKSPACE, most)):
        yield Less(f"--workspace {workspace}", asked.ranges, workspace)


def smaller_sizes(asked: Asked) -> Iterator[Less]:
    """One size after the other, halved as often as it makes sense."""
    group = asked.manifest.frames.group
    for key, least in least_sizes(asked).items():
        step = group if key == "batch" else 1
        for size in halves(getattr(asked.ranges, key).most // step, least // step):
            yield cut(asked, {key: size * step})


def smallest(asked: Asked) -> Iterator[Less]:
    """All sizes at their least, where any is larger."""
    least = {key: size for key, size in least_sizes(asked).items() if size < getattr(asked.ranges, key).most}
    if least:
        yield cut(asked, least)


def least_sizes(asked: Asked) -> dict[str, int]:
    """How small a suggestion makes each size, in the order in which to try."""
    ranges, frames = asked.ranges, asked.manifest.frames
    found = {"tokens": min(FEWEST_TOKENS, ranges.tokens.most)}
    if ranges.frames:
        found["frames"] = frames.minimum
    found["batch"] = frames.group
    if ranges.text:
        found["text"] = min(TEXT, ranges.text.most)
    return found


def halves(size: int, least: int) -> Iterator[int]:
    """Half of a size, half of that, down to the least."""
    while size > least:
        size = max(size // 2, least)
        yield size


def cut(asked: Asked, sizes: Mapping[str, int]) -> Less:
    """Ranges up to ``sizes``; smallest and best sizes that were asked for and lie above come down with them."""
    words = [f"--max {in_words(sizes)}"]
    for option, given in (("min", asked.options.least), ("opt", asked.options.best)):
        if above := {key: size for key, size in sizes.items() if given.get(key, size) > size}:
            words.append(f"--{option} {in_words(above)}")
    ranges = {key: up_to(getattr(asked.ranges, key), size) for key, size in sizes.items()}
    return Less(" ".join(words), replace(asked.ranges, **ranges))


def in_words(sizes: Mapping[str, int]) -> str:
    """Sizes as the command line has them."""
    return ",".join(f"{key}={size}" for key, size in sizes.items())


def up_to(sizes: Range, most: int) -> Range:
    """A range that ends at ``most``."""
    return Range(min(sizes.least, most), min(sizes.best, most), most)


def with_workspace(less: Less, spaces: list[Less]) -> Less:
    """Smaller sizes with the least scratch memory too."""
    if not spaces:
        return less
    return replace(less, words=f"{spaces[-1].words} {less.words}", workspace=spaces[-1].workspace)
