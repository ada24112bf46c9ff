"""A bundle on disk, whole or not at all.

Files go into a hidden folder beside the target, which takes the target's name in the end. Whatever ends the export in
between, the target is as it was. Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from runtime.bundle import MANIFEST, sha256_of
from runtime.errors import OutputError
from runtime.manifest import FORMAT, FileSpec, Header

__all__ = ["bundle_draft", "file_specs", "replace_file", "written"]

AT_FDCWD = -100  # relative paths count from the working folder, as everywhere
RENAME_EXCHANGE = 2  # of linux/fs.h
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some of the disk or choose another"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "a folder above it is a file, choose another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that you may write to"),
}


@contextmanager
def bundle_draft(target: Path, *, force: bool) -> Iterator[Path]:
    """A folder to fill that becomes ``target`` when the block ends without an error.

    Raises:
        OutputError: the target exists (with ``force``: exists and is not a bundle), or cannot be written.
    """
    target = located(target)
    refuse_occupied(target, force)
    draft = target.with_name(f"{draft_prefix(target)}{os.getpid()}-{secrets.token_hex(4)}")
    with made_parents(target), written(target):
        remove_abandoned(target)
        try:
            draft.mkdir()
            yield draft
            refuse_occupied(target, force)
            put_in_place(draft, target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def located(target: Path) -> Path:
    """The absolute path; its last part is a name, even of "." and "..", and is not followed if it is a link."""
    target = Path(target)
    named = target.name not in ("", "..")
    if named:
        return Path(os.path.realpath(target.parent)) / target.name
    return Path(os.path.realpath(target))


def refuse_occupied(target: Path, force: bool) -> None:
    """The target is free, or a bundle that may be replaced."""
    if not os.path.lexists(target):
        return
    if not force:
        raise OutputError(f"{target} exists; choose another --output or give --force to replace it")
    with written(target):
        replaceable = target.is_dir() and not target.is_symlink() and (is_bundle(target) or not any(target.iterdir()))
    if not replaceable:
        raise OutputError(
            f"{target} exists and is not a bundle; --force replaces bundles only, choose another --output"
        )


def is_bundle(folder: Path) -> bool:
    """Whether ``folder`` holds a manifest of ours, of whatever version."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Header).format == FORMAT
    except (OSError, ValueError, RecursionError):  # also what msgspec raises
        return False


def draft_prefix(target: Path) -> str:
    """How drafts of ``target`` are called; the process number follows."""
    return f".{target.name}.draft-"


@contextmanager
def made_parents(target: Path) -> Iterator[None]:
    """Make the folders above ``target``; those that are empty in the end go again."""
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        with written(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # it holds the bundle
                folder.rmdir()


def remove_abandoned(target: Path) -> None:
    """Remove drafts of processes that were killed."""
    for draft in target.parent.iterdir():
        owner = draft.name.removeprefix(draft_prefix(target)).split("-")[0]
        if draft.name.startswith(draft_prefix(target)) and owner.isdecimal() and not runs(int(owner)):
            shutil.rmtree(draft, ignore_errors=True)


def runs(process: int) -> bool:
    """Whether a process of this number lives."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def put_in_place(draft: Path, target: Path) -> None:
    """Rename ``draft`` to ``target``; where a bundle stands there, the two change places in one step."""
    for path in (draft, *draft.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~current_umask())
    if not os.path.lexists(target):
        draft.rename(target)
    elif not exchanged(draft, target):
        replace_in_two_steps(draft, target)


def exchanged(first: Path, second: Path) -> bool:
    """Swap two paths, in one step; False where the system cannot (it has to be Linux, and the file system willing)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    code: int = renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE)
    return code == 0


def replace_in_two_steps(draft: Path, target: Path) -> None:
    """The old bundle leaves, the new one comes; without the new one the old one returns."""
    old = draft.with_name(f"{draft.name}-old")
    target.rename(old)
    try:
        draft.rename(target)
    finally:
        if not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def written(target: Path) -> Iterator[None]:
    """Turn the file system's refusals into ``OutputError``."""
    try:
        yield
    except OSError as error:
        # A write that the disk cut short comes without the system's reason and number.
        full = error.errno is None and type(error) is OSError
        advice = ADVICE.get(errno.ENOSPC if full else error.errno or 0, "choose another place")
        raise OutputError(f"cannot write {target}: {error.strerror or error}; {advice}") from error


def current_umask() -> int:
    """The process' umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


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
