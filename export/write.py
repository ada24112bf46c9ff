"""A bundle on disk, whole or not at all.

Files go into a hidden folder beside the target, which takes the target's name in the end. Whatever ends the export in
between, the target is as it was. Knows nothing of models.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from runtime.bundle import MANIFEST, sha256_of
from runtime.errors import OutputError
from runtime.manifest import FileSpec

__all__ = ["bundle_draft", "file_specs", "replace_file", "save_graph"]


@contextmanager
def bundle_draft(target: Path, *, force: bool) -> Iterator[Path]:
    """A folder to fill that becomes ``target`` when the block ends without an error.

    Raises:
        OutputError: the target exists (with ``force``: exists and is not a bundle), or cannot be written.
    """
    target = Path(target).absolute()
    refuse_occupied(target, force)
    with written(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target)
        draft = Path(tempfile.mkdtemp(prefix=f"{draft_prefix(target)}{os.getpid()}-", dir=target.parent))
    try:
        with written(target):
            yield draft
            draft.chmod(0o777 & ~current_umask())
            put_in_place(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def refuse_occupied(target: Path, force: bool) -> None:
    """The target is free, or a bundle that may be replaced."""
    if not os.path.lexists(target):
        return
    if not force:
        raise OutputError(f"{target} exists; choose another --output or give --force to replace it")
    replaceable = target.is_dir() and not target.is_symlink()
    if not replaceable or (any(target.iterdir()) and not (target / MANIFEST).is_file()):
        raise OutputError(f"{target} exists and is not a bundle; --force replaces bundles only")


def draft_prefix(target: Path) -> str:
    """How drafts of ``target`` are called; the process number follows."""
    return f".{target.name}.draft-"


def remove_abandoned(target: Path) -> None:
    """Remove drafts of processes that were killed."""
    for draft in target.parent.glob(f"{draft_prefix(target)}*"):
        owner = draft.name.removeprefix(draft_prefix(target)).split("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists() and Path("/proc").exists():
            shutil.rmtree(draft, ignore_errors=True)


def put_in_place(draft: Path, target: Path) -> None:
    """Rename ``draft`` to ``target``; a bundle that stood there goes last."""
    if not target.exists():
        draft.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f"{draft_prefix(target)}{os.getpid()}-", dir=target.parent))
    target.rename(old / "replaced")
    draft.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def written(target: Path) -> Iterator[None]:
    """Turn the file system's refusals into ``OutputError``."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error


def current_umask() -> int:
    """The process' umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def save_graph(model: ir.Model, folder: Path, name: str) -> str:
    """Write ``{name}.onnx`` with its weights in ``{name}.onnx.data``; the graph file's name."""
    file = f"{name}.onnx"
    ir.save(model, folder / file, external_data=f"{file}.data", size_threshold_bytes=1024)
    return file


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with written(path):
            draft.write_bytes(data)
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def file_specs(folder: Path) -> dict[str, FileSpec]:
    """Size and SHA-256 of every file below ``folder``, by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): FileSpec(path.stat().st_size, sha256_of(path)) for path in paths}
