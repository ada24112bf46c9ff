"""Pictures as a video: one per frame, one frame per second, in natural order (img2 before img10).

EXIF orientation is applied, alpha is dropped (colours as stored), 16-bit grey keeps its upper 8 bits. Sizes
may differ. Hidden files and files without a picture's suffix are passed over; sub-folders are not entered.

Does not play animated WebP or PNG (refused) or GIF (a video: ``container``).
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime.errors import VideoError
from runtime.video.source import IMAGE_SUFFIXES, Frame, ImageLike, check_indices, check_size

PILLOW_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    struct.error,
    UserWarning,  # of damaged metadata, where the host program turns warnings into errors
)
PILLOW_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class ImagesSource:
    """Paths of pictures, or the bytes of one, as a ``FrameSource``; each is opened when it is asked for."""

    def __init__(self, images: tuple[Path | bytes, ...]) -> None:
        self._images = images

    @property
    def timestamps(self) -> NDArray[np.float64]:
        """0, 1, 2, ... seconds, (n,) f64."""
        return np.arange(len(self._images), dtype=np.float64)

    def frames(self, indices: NDArray[np.int64]) -> Iterator[Frame]:
        """Opens one picture at a time."""
        check_indices(indices, len(self._images))
        return self._frames(indices)

    def _frames(self, indices: NDArray[np.int64]) -> Iterator[Frame]:
        shown, rgb = -1, np.empty((0, 0, 3), np.uint8)
        for index in indices.tolist():
            if index != shown:
                shown, rgb = index, rgb_from_image(self._images[index])
            yield rgb

    def close(self) -> None:
        """Nothing to free: no file stays open between frames."""

    def __enter__(self) -> ImagesSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def source_from_folder(folder: Path) -> ImagesSource:
    """Every picture in the folder, in natural order; a folder without any is a ``VideoError``."""
    try:
        images = [path for path in folder.iterdir() if _is_picture(path)]
    except OSError as error:
        raise VideoError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from error
    ordered = sorted(images, key=natural_key)
    if not ordered:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise VideoError(f"{folder}: no images in this folder; expected files ending in {suffixes}")
    return ImagesSource(tuple(ordered))


def natural_key(path: Path) -> tuple[list[tuple[bool, int, str]], str]:
    """Sort key of a name without suffix: numbers by value, before letters; ties (1, 01) by the whole name."""
    runs = re.findall(r"([0-9]+)|([^0-9]+)", path.stem.casefold())
    return [(not digits, int(digits or 0), text) for digits, text in runs], path.name


def picture(image: ImageLike) -> Frame:
    """A file, its bytes or an array -> (H, W, 3) uint8 RGB."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise VideoError(f"the image is {image.dtype} {image.shape}; expected uint8 (H, W, 3) RGB")
        check_size(image.shape[1], image.shape[0], "the image")
        return image
    if not isinstance(image, str | os.PathLike | bytes) or not image:
        raise VideoError(f"the image is {image!r:.80}; expected a file, its bytes or an array")
    return rgb_from_image(image if isinstance(image, bytes) else Path(image))


def rgb_from_image(image: Path | bytes) -> Frame:
    """A picture -> (H, W, 3) uint8 RGB, upright, read-only."""
    name = "the image" if isinstance(image, bytes) else image.name
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            check_size(opened.width, opened.height, name)
            if opened.format in ("WEBP", "PNG") and getattr(opened, "is_animated", False):
                raise VideoError(f"{name}: is an animated {opened.format}; convert it to a video first")
            rgb = np.asarray(ImageOps.exif_transpose(_eight_bit(opened)).convert("RGB"))
    except PILLOW_BOMBS as error:
        raise VideoError(f"{name}: the image is too large ({error}); scale it down first") from error
    except UnidentifiedImageError as error:
        raise VideoError(f"{name}: is not an image, whatever its name says; replace or remove it") from error
    except PILLOW_ERRORS as error:
        raise VideoError(f"{name}: the image cannot be read ({error}); replace or remove it") from error
    rgb.flags.writeable = False
    return rgb


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey -> 8 bit by its upper byte, where ``convert`` would clip; other modes unchanged."""
    if not image.mode.startswith("I;16"):
        return image
    reduced = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    reduced.info = image.info
    return reduced


def _is_picture(path: Path) -> bool:
    return not path.name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
