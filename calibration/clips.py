"""A folder, a video or a list file -> the clips of a calibration run, in an order that does not change.

A folder gives every video below it, by suffix, and every subfolder that directly holds pictures (one frame a second, as
in ``runtime.video``). The folder itself is such a clip where pictures and no videos lie directly in it. A folder is
entered once, whatever links lead to it, and never by a link up. Hidden and all other files are passed over. Files
are not compared: ``distinct`` does that.

A list (.txt) holds one path per line, relative to the list's folder; lines that start with ``#`` are comments.

Does not open a video: whether it decodes shows when it is played.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from runtime.errors import CalibrationError
from runtime.video.images import natural_key
from runtime.video.source import IMAGE_SUFFIXES, LONG_NAME

__all__ = ["VIDEO_SUFFIXES", "Clip", "clips_from", "distinct", "numbered_lines", "shown"]

# fmt: off
VIDEO_SUFFIXES = frozenset({  # containers and raw streams that ffmpeg plays, as they are commonly named
    ".264", ".265", ".3g2", ".3gp", ".amv", ".asf", ".av1", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264",
    ".h265", ".hevc", ".ivf", ".m1v", ".m2t", ".m2ts", ".m2v", ".m4v", ".mj2", ".mjpeg", ".mjpg", ".mkv", ".mov",
    ".mp4", ".mpe", ".mpeg", ".mpg", ".mpv", ".mts", ".mxf", ".nut", ".obu", ".ogm", ".ogv", ".qt", ".rm", ".rmvb",
    ".tod", ".ts", ".vob", ".webm", ".wmv", ".wtv", ".y4m",
})
# fmt: on
EXPECTED = f"videos (.mp4 .mkv .mov and other usual suffixes) or folders of images ({' '.join(sorted(IMAGE_SUFFIXES))})"
TEXT_LIMIT = 16 * 2**20  # bytes of a list of clips or of questions
PIECE = 2**20  # bytes


@dataclass(frozen=True)
class Clip:
    """A video file, or a folder of images.

    Attributes:
        path: where it is.
        name: its path below the folder that was given, or as the list writes it.
    """

    path: Path
    name: str

    def sha256(self) -> str:
        """SHA-256 (hex) of the file's bytes; of a folder, of its images' names and bytes, sorted by name."""
        with _translated(f"{shown(self.path)}: "):
            if not self.path.is_dir():
                return _hash_of(self.path).hex()
            digest = hashlib.sha256()
            images = {os.fsencode(path.name): path for path in self._images()}
            for name in sorted(images):
                digest.update(name + b"\0" + _hash_of(images[name]))
            return digest.hexdigest()

    def size(self) -> int:
        """Bytes of the file, or of the folder's images."""
        with _translated(f"{shown(self.path)}: "):
            return sum(path.stat().st_size for path in (self._images() if self.path.is_dir() else [self.path]))

    def _images(self) -> list[Path]:
        return [path for path in _entries(self.path) if _is_image(path)]


def clips_from(path: str | Path) -> tuple[Clip, ...]:
    """The clips of a folder, of a single video or of a list file.

    Raises:
        CalibrationError: the path or a listed one is missing or is no clip, or no clip was found.
    """
    if not os.fspath(path):
        raise CalibrationError("the path of the clips is empty; give a folder, a video or a list of paths (.txt)")
    given = Path(path)
    with _translated(""):
        if given.suffix.lower() == ".txt" and not given.is_dir():
            return _listed(given)
        return tuple(_clips_at(given, PurePosixPath() if given.is_dir() else PurePosixPath(given.name)))


def distinct(clips: Sequence[Clip]) -> tuple[tuple[Clip, ...], dict[str, str]]:
    """Clips of different content, and for every copy, a link being one too, its name and that of the first like it.

    What is alone in its size is not read. A clip that cannot be read is like no other: when it is played, that shows.
    """
    sizes = [_size(clip) for clip in clips]
    counts = Counter(sizes)
    first: dict[str, Clip] = {}
    copies: dict[str, str] = {}
    for clip, size in zip(clips, sizes, strict=True):
        found = first.setdefault(_content(clip) if counts[size] > 1 else f"clip {clip.name}", clip)
        if found is not clip:
            copies[clip.name] = found.name
    return tuple(first.values()), copies


def _size(clip: Clip) -> int | None:
    """Bytes of a clip; None where that cannot be read."""
    try:
        return clip.size()
    except CalibrationError:
        return None


def _content(clip: Clip) -> str:
    """What a clip has in common with its copies alone."""
    try:
        return clip.sha256()
    except CalibrationError:
        return f"clip {clip.name}"


def numbered_lines(path: Path, what: str) -> list[tuple[int, str]]:
    """Number (from 1) and text of every line of a UTF-8 file that is not blank; ``what`` is what it should hold.

    Raises:
        CalibrationError: missing, not a file, larger than 16 MiB, unreadable, or not text.
    """
    with _translated(""):
        if not path.is_file():
            raise CalibrationError(f"{shown(path)}: {_absence(path)}; expected {what}, check the path")
        if (size := path.stat().st_size) > TEXT_LIMIT:
            raise CalibrationError(f"{shown(path)}: has {size} bytes; expected {what}, {TEXT_LIMIT} at most; split it")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{shown(path)}: is not UTF-8 text; expected {what}, save it as UTF-8") from error
    if "\0" in text:
        raise CalibrationError(f"{shown(path)}: holds binary data; expected {what}, as UTF-8 text")
    lines = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in lines if line]


def shown(path: Path) -> str:
    """A path as errors repeat it: the end of one that is very long."""
    text = str(path)
    return text if len(text) <= LONG_NAME else f"...{text[-LONG_NAME:]}"


def _listed(path: Path) -> tuple[Clip, ...]:
    """The clips that a list names, each file and folder once."""
    clips: dict[Path, Clip] = {}
    for number, line in numbered_lines(path, "a list of clips, one path per line"):
        if not line.startswith("#"):
            for clip in _clips_at(path.parent / line, PurePosixPath(line), f"{shown(path)}, line {number}: "):
                clips.setdefault(clip.path.resolve(), clip)
    if not clips:
        raise CalibrationError(f"{shown(path)}: lists no clips; expected one path per line, of {EXPECTED}; add some")
    return tuple(clips.values())


def _clips_at(path: Path, name: PurePosixPath, place: str = "") -> list[Clip]:
    """The clips of a folder or video called ``name``; an error begins with ``place``."""
    with _translated(place):
        if path.is_dir():
            if clips := _clips_below(path, name):
                return clips
            raise CalibrationError(f"{place}{shown(path)}: no clips in this folder; expected {EXPECTED}; add some")
        if not path.is_file():
            raise CalibrationError(f"{place}{shown(path)}: {_absence(path)}; expected {EXPECTED}; check the path")
        if path.suffix.lower() not in VIDEO_SUFFIXES:
            found = "is a single picture" if _is_image(path) else "does not end like a video"
            raise CalibrationError(f"{place}{shown(path)}: {found}; expected {EXPECTED}; rename it or give another")
        return [Clip(path, _printable(str(name)))]


def _clips_below(root: Path, name: PurePosixPath) -> list[Clip]:
    """The clips of a folder and of those below it, in natural order of their paths."""
    found = list[Path]()
    for folder in _folders(root):
        entries = _entries(folder)
        videos = [path for path in entries if _is_video(path)]
        if any(map(_is_image, entries)) and (folder != root or not videos):
            found.append(folder)
        found += videos
    found.sort(key=lambda path: [natural_key(Path(part)) for part in path.relative_to(root).parts])
    names = [name / path.relative_to(root) for path in found]
    texts = [str(at) if at.parts else root.resolve().name for at in names]
    return [Clip(path, _printable(text)) for path, text in zip(found, texts, strict=True)]


def _printable(name: str) -> str:
    """A file's name as text that can be written: bytes that are not UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _folders(root: Path) -> Iterator[Path]:
    """``root`` and the folders below it, each once; those behind links come last, those above ``root`` never."""
    seen = set(root.resolve().parents)
    real, linked = [root], list[Path]()
    while real or linked:
        folder = (real or linked).pop()
        where = folder.resolve()
        if where in seen:
            continue
        seen.add(where)
        yield folder
        for entry in reversed(_entries(folder)):
            if entry.is_dir():
                (linked if entry.is_symlink() else real).append(entry)


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder and is not hidden, sorted by name."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_video(path: Path) -> bool:
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        return False
    if path.is_symlink() and not path.exists():
        raise CalibrationError(f"{shown(path)}: is a link that leads nowhere; expected a video; fetch or remove it")
    return path.is_file()


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _absence(path: Path) -> str:
    return "is not a regular file" if path.exists() else "there is no such file"


def _hash_of(file: Path) -> bytes:
    """SHA-256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(PIECE):
            digest.update(piece)
    return digest.digest()


@contextmanager
def _translated(place: str) -> Iterator[None]:
    """The file system's refusals become a ``CalibrationError`` that begins with ``place``."""
    try:
        yield
    except OSError as error:
        path = shown(Path(os.fsdecode(error.filename or "")))
        raise CalibrationError(
            f"{place}{path} cannot be opened ({error.strerror}); check the path and its permissions"
        ) from error
