"""``folder_draft``: a folder of links and graphs that appears whole or not at all.

As ``calibration.write.bundle_draft`` does, but replaces nothing, and leaves what its links lead to alone: putting a
bundle in place sets the mode of every file in it.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calibration.write import draft_prefix, made_parents, remove_abandoned, written
from runtime.errors import OutputError

__all__ = ["folder_draft"]


@contextmanager
def folder_draft(folder: Path) -> Iterator[Path]:
    """A folder to fill that becomes ``folder`` when the block ends without an error.

    Raises:
        OutputError: ``folder`` holds something, is the working folder, or cannot be written.
    """
    target = Path(os.path.realpath(folder))
    refuse_occupied(folder, target)
    draft = target.with_name(f"{draft_prefix(target)}{os.getpid()}-{secrets.token_hex(4)}")
    with made_parents(target), written(folder):
        remove_abandoned(target)
        try:
            draft.mkdir()
            yield draft
            if target.exists():
                shutil.copymode(target, draft)
            draft.rename(target)  # in one step; an empty folder goes, one that was filled meanwhile is refused
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def refuse_occupied(folder: Path, target: Path) -> None:
    """The folder is not there, or empty and nobody's place."""
    with written(folder):
        if os.path.lexists(target) and not target.is_dir():
            raise OutputError(f"{folder} is a file; give a folder that is empty or not there")
        if target.is_dir() and any(target.iterdir()):
            raise OutputError(f"{folder} holds files; give a folder that is empty or not there")
    if target == Path.cwd():
        raise OutputError(f"{folder} is the working folder; give another, which is empty or not there")
