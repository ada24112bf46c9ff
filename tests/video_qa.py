"""An opened bundle and the recorded frames it has seen: fixtures, of which a module takes one by giving it a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime import GenerationOptions, Video, VideoQA

QUESTION = "What happens?"
Recorded = Callable[[str], dict[str, Any]]


def tokens(count: int) -> GenerationOptions:
    """So many tokens, whatever they are."""
    return GenerationOptions(max_new_tokens=count, ignore_eos=True)


@pytest.fixture(scope="module")
def frames(recorded: Recorded) -> Any:
    """(6, 50, 72, 3) uint8."""
    return recorded("linvt-internvl2-a")["frames_u8"]


@pytest.fixture(scope="module")
def qa(linvt_bundle: Path) -> Iterator[VideoQA]:
    """An opened bundle; no test closes it."""
    with VideoQA.open(linvt_bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def video(qa: VideoQA, frames: Any) -> Video:
    """The recorded frames, seen."""
    return qa.video(frames)
