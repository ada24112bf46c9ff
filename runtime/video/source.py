"""What every source of frames can do, and the factory that picks the source for what the user gave.

Does not decode: ``container`` (video files), ``images`` (pictures, folders of them) and ``array`` do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.errors import VideoError

Frame: TypeAlias = NDArray[np.uint8]  # (H, W, 3) RGB
VideoLike: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | NDArray[np.uint8]"
ImageLike: TypeAlias = "str | os.PathLike[str] | bytes | NDArray[np.uint8]"
Self = TypeVar("Self", bound="FrameSource")

MAX_PIXELS = 8192 * 8192  # of one frame; an 8K frame has half of it, RGB of the limit is 192 MiB
LONG_NAME = 150  # characters of a path that an error repeats
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
IMAGE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6")


class FrameSource(Protocol):
    """Frames of one video, by index, inside ``with``: entering reads the timestamps, leaving frees them."""

    @property
    def timestamps(self) -> NDArray[np.float64]:
        """Seconds at which each frame appears, (n,) f64, ascending from 0."""
        ...

    def frames(self, indices: NDArray[np.int64]) -> Iterator[Frame]:
        """Read-only (H, W, 3) uint8 RGB for each ascending index; a repeat gives the same array again."""
        ...

    def close(self) -> None:
        """Free what the source holds; a second call does nothing."""
        ...

    def __enter__(self: Self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_source(source: VideoLike) -> FrameSource:
    """A path (video, picture or folder of them), a file's bytes or a (T, H, W, 3) uint8 array -> its source.

    Raises:
        VideoError: here or on entering, where the source is none of these or cannot be read.
    """
    if isinstance(source, np.ndarray):
        from runtime.video.array import ArraySource

        return ArraySource(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return _source_from_bytes(bytes(source))
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise VideoError(
            f"the video is {source!r:.80}; "
            "expected the path of a video or of a folder of images, a file's bytes or an array"
        )
    return _source_from_path(Path(source))


def check_indices(indices: NDArray[np.int64], count: int) -> None:
    """A caller's bug, not a user's mistake: indices must ascend within 0 .. count - 1."""
    ascending = indices.ndim == 1 and bool((np.diff(indices) >= 0).all())
    assert ascending and (indices.size == 0 or 0 <= indices[0] <= indices[-1] < count), indices


def check_size(width: int, height: int, name: str) -> None:
    """Refuse a frame too large to hold, before memory is taken for it."""
    if width * height > MAX_PIXELS:
        raise VideoError(
            f"{name}: a frame has {width} x {height} pixels, at most {MAX_PIXELS} are accepted; scale it down first"
        )


def _source_from_path(path: Path) -> FrameSource:
    name = str(path) if len(str(path)) <= LONG_NAME else f"...{str(path)[-LONG_NAME:]}"
    try:
        is_folder, is_file, exists = path.is_dir(), path.is_file(), path.exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VideoError(f"{name}: cannot be opened ({reason}); check the path") from error
    if not is_folder and not is_file:
        found = "is not a regular file" if exists else "there is no such file"
        raise VideoError(f"{name}: {found}; expected a video or a folder of images, check the path")
    if is_folder:
        from runtime.video.images import source_from_folder

        return source_from_folder(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        from runtime.video.images import ImagesSource

        return ImagesSource((path,))
    from runtime.video.container import ContainerSource

    return ContainerSource(path)


def _source_from_bytes(data: bytes) -> FrameSource:
    if data.startswith(IMAGE_MAGIC) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        from runtime.video.images import ImagesSource

        return ImagesSource((data,))
    from runtime.video.container import ContainerSource

    return ContainerSource(data)
