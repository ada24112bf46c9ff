"""Open a bundle: a folder with ``bundle.json`` and the files it lists.

Opening checks every file's presence and size, and its SHA-256 once: the result is remembered in the user's cache
folder until the file's size, inode or change time differs. Files that leave the folder, by path or by symbolic link,
are refused, and so are graphs that keep weights in a file which is not listed.

Loads no graph and holds no session.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec

from runtime.errors import BundleError
from runtime.external_data import external_files
from runtime.manifest import JSON_ERRORS, FileSpec, Manifest, decode_manifest

__all__ = ["DEMO", "DEMOS", "MANIFEST", "Bundle", "bundle_path", "sha256_of"]

MANIFEST = "bundle.json"
EVIDENCE = "evidence.json"
DEMO = "demo"
DEMOS = {DEMO: "bundle", "demo-float": "float"}  # the demo quantised, and what it was made of: folders of runtime/demo
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
        """Read and check the bundle at ``path``; the words "demo" and "demo-float" name the bundled demo.

        Args:
            path: the bundle's folder.
            verify: hash every file even if it was found good before.

        Raises:
            BundleError: not a bundle, another version, or a file missing, altered or outside the folder.
        """
        folder = bundle_path(path)
        data = read_manifest(folder)
        manifest = decode_manifest(data)
        identity = hashlib.sha256(data).hexdigest()
        memory = memory_file(folder, identity)
        with readable(folder):
            for name, spec in manifest.files.items():
                check_presence(folder, name, spec)
            stamps = {name: stamp_of(folder / name) for name in manifest.files}
            known = {} if verify else recall(memory)
            if unknown := {name for name in stamps if known.get(name) != stamps[name]}:
                check_contents(folder, manifest, unknown)
                remember(memory, stamps)
        return cls(folder, manifest, identity)

    def path(self, name: str) -> Path:
        """Where the listed file ``name`` lies."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.folder}: bundle.json lists no {name}; export the bundle again")
        if sha256_of(self.folder / MANIFEST) != self.identity:  # files are opened when they are first needed
            raise BundleError(f"{self.folder} was replaced after it was opened; open it again")
        return self.folder / name


def bundle_path(path: str | os.PathLike[str]) -> Path:
    """The folder that ``path`` names; the words in ``DEMOS`` are the demo that ships with the package."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or "\0" in str(path):
        raise BundleError(f"the bundle is {path!r:.80}; expected the path of a bundle's folder, or 'demo'")
    demo = DEMOS.get(str(os.fspath(path)))
    return Path(__file__).parent / "demo" / demo if demo else Path(path)


def read_manifest(folder: Path) -> bytes:
    """The bytes of ``bundle.json``."""
    source = folder / MANIFEST
    with readable(source):
        if not source.exists():
            found = f"it has no {MANIFEST}" if os.path.lexists(folder) else "there is no such folder"
            raise BundleError(
                f"{folder} is not a bundle: {found}; make one with 'python -m export CHECKPOINT -o BUNDLE'"
            )
        if not source.is_file() or source.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(
                f"{source} is no manifest: expected a file of at most {MAX_MANIFEST_BYTES} bytes; "
                "export the bundle again"
            )
        return source.read_bytes()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the file system's refusals into ``BundleError``."""
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"cannot read {error.filename or path}: {error.strerror}; check the path and its permissions"
        ) from error


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


def check_contents(folder: Path, manifest: Manifest, names: set[str]) -> None:
    """Hash these files; what they must not be is said in the order of the manifest."""
    for name in manifest.files:
        if name not in names:
            continue
        if sha256_of(folder / name) != manifest.files[name].sha256:
            raise BundleError(
                f"{folder}: {name} is altered: its SHA-256 is not the manifest's; "
                "copy the bundle again or export it again"
            )
        if name.endswith(".onnx"):
            check_weights(folder, name, manifest)


def check_weights(folder: Path, graph: str, manifest: Manifest) -> None:
    """A graph's weights lie in listed files, whatever the engine would allow."""
    try:
        named = external_files((folder / graph).read_bytes())
    except ValueError as error:
        raise BundleError(f"{folder}: {graph} is not an ONNX graph: {error}; export the bundle again") from error
    for name in sorted(named):
        if str(PurePosixPath(graph).parent / name) not in manifest.files:
            raise BundleError(
                f"{folder}: {graph} keeps weights in {name!r:.80}, which bundle.json does not list; "
                "export the bundle again"
            )


def sha256_of(file: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with readable(file), file.open("rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def stamp_of(file: Path) -> Stamp:
    """What changes whenever the content does; the change time cannot be set back by a user."""
    status = file.stat()
    return status.st_size, status.st_ino, status.st_ctime_ns


def memory_file(folder: Path, identity: str) -> Path | None:
    """Where this manifest's good stamps are kept, another file for another manifest; None without a home."""
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        cache = asked if asked.is_absolute() else Path.home() / ".cache"
        key = f"{folder.resolve()}\n{identity}"
    except (OSError, RuntimeError):
        return None
    return cache / "linvt-edge" / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.json"


def recall(memory: Path | None) -> dict[str, Stamp]:
    """The stamps under which files were found good; empty when nothing usable is there."""
    try:
        return msgspec.json.decode(memory.read_bytes(), type=dict[str, Stamp]) if memory else {}
    except (OSError, *JSON_ERRORS):
        return {}


def remember(memory: Path | None, stamps: dict[str, Stamp]) -> None:
    """Keep the stamps; a cache folder that cannot be written only costs the next opening its time."""
    if memory is None:
        return
    draft = memory.with_suffix(f".{os.getpid()}")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(msgspec.json.encode(stamps))
        draft.replace(memory)
    except OSError:
        return
