"""Open a bundle: a folder with ``bundle.json`` and the files it lists.

Opening checks every file's presence and size, and its SHA-256 once: the result is remembered in the user's cache
folder until the file's size, inode or change time differs. Files that leave the folder, by path or by symbolic link,
are refused.

Loads no graph and holds no session.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from runtime.errors import BundleError
from runtime.manifest import FileSpec, Manifest, decode_manifest

__all__ = ["DEMO", "MANIFEST", "Bundle", "bundle_path", "sha256_of"]

MANIFEST = "bundle.json"
EVIDENCE = "evidence.json"
DEMO = "demo"
MAX_MANIFEST_BYTES = 16 * 2**20

Stamp = tuple[int, int, int]  # size in bytes, inode, change time in ns


@dataclass(frozen=True)
class Bundle:
    """A checked bundle.

    Attributes:
        identity: SHA-256 of ``bundle.json``, which holds the hashes of all other files.
    """

    folder: Path
    manifest: Manifest
    identity: str

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = False) -> Bundle:
        """Read and check the bundle at ``path``; the word "demo" names the bundled demo.

        Args:
            path: the bundle's folder.
            verify: hash every file even if it was found good before.

        Raises:
            BundleError: not a bundle, another version, or a file missing, altered or outside the folder.
        """
        folder = bundle_path(path)
        data = read_manifest(folder)
        manifest = decode_manifest(data)
        for name, spec in manifest.files.items():
            check_presence(folder, name, spec)
        check_hashes(folder, manifest.files, remembered={} if verify else recall(folder))
        return cls(folder, manifest, hashlib.sha256(data).hexdigest())

    def path(self, name: str) -> Path:
        """Where the listed file ``name`` lies."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.folder}: bundle.json lists no {name}; export the bundle again")
        return self.folder / name


def bundle_path(path: str | os.PathLike[str]) -> Path:
    """The folder that ``path`` names; "demo" is the demo that ships with the package."""
    if os.fspath(path) == DEMO:
        return Path(__file__).parent / "demo" / "bundle"
    return Path(path)


def read_manifest(folder: Path) -> bytes:
    """The bytes of ``bundle.json``."""
    source = folder / MANIFEST
    try:
        if source.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{source} is larger than {MAX_MANIFEST_BYTES} bytes, which no manifest is")
        return source.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST}; make one with 'python -m export CHECKPOINT -o BUNDLE'"
        ) from error
    except OSError as error:
        raise BundleError(f"cannot read {source}: {error.strerror}") from error


def check_presence(folder: Path, name: str, spec: FileSpec) -> None:
    """The file is there, inside the folder, and has its size."""
    file = folder / name
    if not file.is_file():
        raise BundleError(f"{folder}: {name} is missing; copy the bundle again or export it again")
    if not file.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{folder}: {name} leads outside the bundle; replace the link by the file itself")
    size = file.stat().st_size
    if size != spec.size:
        raise BundleError(
            f"{folder}: {name} has {size} bytes, expected {spec.size}; copy the bundle again or export it again"
        )


def check_hashes(folder: Path, files: dict[str, FileSpec], remembered: dict[str, Stamp]) -> None:
    """Hash the files whose stamp is not remembered, and remember them all."""
    stamps = {name: stamp_of(folder / name) for name in files}
    unknown = [name for name in files if remembered.get(name) != stamps[name]]
    for name in unknown:
        if sha256_of(folder / name) != files[name].sha256:
            raise BundleError(
                f"{folder}: {name} is altered: its SHA-256 is not the manifest's; "
                "copy the bundle again or export it again"
            )
    if unknown:
        remember(folder, stamps)


def sha256_of(file: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while piece := stream.read(2**20):
                digest.update(piece)
    except OSError as error:
        raise BundleError(f"cannot read {file}: {error.strerror}") from error
    return digest.hexdigest()


def stamp_of(file: Path) -> Stamp:
    """What changes whenever the content does; the change time cannot be set back by a user."""
    status = file.stat()
    return status.st_size, status.st_ino, status.st_ctime_ns


def memory_file(folder: Path) -> Path:
    """Where this manifest's good stamps are kept; a new manifest has another file."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    key = f"{folder.resolve()}\n{sha256_of(folder / MANIFEST)}"
    return Path(base).expanduser() / "linvt-edge" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def recall(folder: Path) -> dict[str, Stamp]:
    """The stamps under which files were found good; empty when nothing usable is there."""
    try:
        return msgspec.json.decode(memory_file(folder).read_bytes(), type=dict[str, Stamp])
    except (OSError, RuntimeError, msgspec.MsgspecError):
        return {}


def remember(folder: Path, stamps: dict[str, Stamp]) -> None:
    """Keep the stamps; a cache folder that cannot be written only costs the next opening its time."""
    try:
        target = memory_file(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_suffix(f".{os.getpid()}")
        draft.write_bytes(msgspec.json.encode(stamps))
        draft.replace(target)
    except (OSError, RuntimeError):
        return
