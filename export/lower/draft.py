"""``folder_draft``: a folder of links and graphs, whole or not at all.

As ``calibration.write.bundle_draft`` does, but replaces nothing, and leaves what its links lead to alone: putting a
bundle in place sets the mode of every file in it. An empty folder that is there is filled where it is, for it may be a
place to mount at, or stand where nothing can be renamed: only a killed process leaves half of it.
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
    """A folder to fill: it becomes ``folder`` when the block ends without an error, or is that, emptied otherwise.

    Raises:
        OutputError: ``folder`` holds something, or cannot be written.
    """
    with written(folder):
        target = Path(os.path.realpath(folder))
        refuse_occupied(folder, target)
        with emptied(target) if target.is_dir() else renamed(target) as draft:
            yield draft


def refuse_occupied(folder: Path, target: Path) -> None:
    """The folder is not there, or empty."""
    if os.path.lexists(target) and not target.is_dir():
        raise OutputError(f"{folder} is a file; give a folder that is empty or not there")
    if target.is_dir() and any(target.iterdir()):
        raise OutputError(f"{folder} holds files; give a folder that is empty or not there")


@contextmanager
def emptied(folder: Path) -> Iterator[Path]:
    """A folder that is as empty as before unless the block ends without an error."""
    done = False
    try:
        yield folder
        done = True
    finally:
        for path in () if done else list(folder.iterdir()):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def renamed(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that takes its name in one step; one that somebody filled meanwhile is refused."""
    draft = target.with_name(f"{draft_prefix(target)}{os.getpid()}-{secrets.token_hex(4)}")
    with made_parents(target):
        remove_abandoned(target)
        try:
            draft.mkdir()
            yield draft
            draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
