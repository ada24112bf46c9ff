"""Engines, their records and timing caches on disk: each whole or not at all.

A record is removed before its engine is replaced and comes back after it, so an engine without a record is never
taken, and one with a record is whole. What a killed process left is removed by the next.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from calibration.write import runs, written
from runtime.engines import EngineRecord

__all__ = ["engine_paths", "prepared", "put", "put_engine"]

DRAFT = ".draft-"  # in hidden names; the number of the process follows


def engine_paths(folder: Path, stage: str) -> tuple[Path, Path]:
    """Where a stage's engine and its record lie."""
    return folder / f"{stage}.engine", folder / f"{stage}.json"


def prepared(folder: Path) -> None:
    """Make the folder of engines, and clean it of what killed processes left.

    Raises:
        OutputError: it cannot be written.
    """
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)


def remove_abandoned(folder: Path) -> None:
    """Remove drafts of processes that were killed."""
    for path in folder.iterdir():
        owner = path.name.rpartition(DRAFT)[2].split("-")[0]
        if DRAFT not in path.name or not owner.isdecimal() or runs(int(owner)):
            continue
        path.unlink(missing_ok=True)


def put_engine(folder: Path, stage: str, blob: Any, record: EngineRecord) -> None:
    """Write an engine and its record.

    Raises:
        OutputError: the folder cannot be written or the disk is full; the engine before stays.
    """
    engine, description = engine_paths(folder, stage)
    text = msgspec.json.format(msgspec.json.encode(record, order="deterministic"), indent=1) + b"\n"
    with drafted(engine, blob) as new, drafted(description, text) as about, written(engine):
        description.unlink(missing_ok=True)
        new.replace(engine)
        about.replace(description)
    sync_folder(folder)


def put(path: Path, data: Any) -> None:
    """Write a file whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with drafted(path, data) as draft, written(path):
        draft.replace(path)


@contextmanager
def drafted(path: Path, data: Any) -> Iterator[Path]:
    """A file beside ``path`` with its bytes to be, on the disk; removed in the end if nobody renamed it."""
    draft = path.with_name(f".{path.name}{DRAFT}{os.getpid()}")
    try:
        with written(path), draft.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the names to the disk too; file systems that cannot need not."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        return
    finally:
        os.close(handle)
