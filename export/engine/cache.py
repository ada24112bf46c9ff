"""TensorRT's timing cache: measured tactics in a file, read before a build and written, with what others added, after.

One belongs to one TensorRT release and one kind of GPU, as the folder does in which it lies. A file that TensorRT does
not take is left out, with a note, and replaced: it only costs time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from calibration.write import written
from export.engine.files import put

__all__ = ["BINDING_ERRORS", "TimingCache"]

Note = Callable[[str], None]
BINDING_ERRORS = (RuntimeError, TypeError, ValueError)  # what the bindings make of a null pointer or an odd value


class TimingCache:
    """The file of measured tactics."""

    def __init__(self, path: Path, note: Note) -> None:
        self.path = path
        self.note = note
        self.held: Any = None  # the cache in use: it has to outlive the build
        self.refused = b""  # what the file held that TensorRT does not take

    def attach(self, config: Any) -> None:
        """Give a builder's configuration what the file holds, or an empty cache.

        Raises:
            OutputError: the file cannot be read.
        """
        data = self.read()
        if data and not self.taken(config, data):
            self.note(f"{self.path} is no timing cache of this TensorRT and GPU; tactics are measured again")
            self.refused, data = data, b""
        if not data:
            self.taken(config, data)

    def taken(self, config: Any, data: bytes) -> bool:
        """Whether TensorRT took a serialised cache; empty bytes are a fresh one."""
        try:
            self.held = config.create_timing_cache(data)
            return self.held is not None and bool(config.set_timing_cache(self.held, False))
        except BINDING_ERRORS:
            return False

    def keep(self, config: Any) -> None:
        """Write what was measured, together with what another build has written meanwhile.

        Raises:
            OutputError: the file cannot be written.
        """
        cache = config.get_timing_cache()
        if cache is None:
            return
        others = self.read()
        if others and others != self.refused:
            self.add(config, cache, others)
        put(self.path, memoryview(cache.serialize()))

    def add(self, config: Any, cache: Any, others: bytes) -> None:
        """Combine a cache with the file's, unless that is of another device by now."""
        try:
            other = config.create_timing_cache(others)
            if other is not None:
                cache.combine(other, False)
        except BINDING_ERRORS:
            self.note(f"{self.path} was no timing cache of this TensorRT and GPU; it is replaced")

    def read(self) -> bytes:
        """The file's bytes; none where there is no file."""
        with written(self.path):
            return self.path.read_bytes() if self.path.exists() else b""
