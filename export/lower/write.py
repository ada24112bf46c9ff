"""``write_lowered``: the lowered graph of one stage as a small file beside symbolic links to the bundle's weights.

Weights keep the names that the graph holds and lie beside it, where TensorRT's parser looks; they are neither read nor
copied where the file system has links. onnx and ONNX Runtime refuse links that lead out of a graph's folder; they also
refuse a file that has several hard links, so hard ones would make the bundle itself unreadable to them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir

from export.lower.graph import lower
from export.lower.read import read_graph, understood
from export.lower.release import Release
from runtime.errors import OutputError

__all__ = ["put_lowered", "write_lowered"]


def write_lowered(bundle: Path, stage_file: str, release: Release, folder: Path, *, plugin: bool) -> Path:
    """Write ``folder / stage_file`` and links to the weights it names.

    Args:
        bundle: the bundle's folder, checked before (``Bundle.open``).
        stage_file: the graph's name in it, e.g. "decode.onnx".
        release: what to lower for.
        folder: an existing folder; files of these names are replaced.
        plugin: see ``lower``.

    Raises:
        BundleError: the graph cannot be read or lowered.
        OutputError: the folder cannot be written.
    """
    target = folder / stage_file
    try:
        put_lowered(bundle / stage_file, release, target, plugin=plugin)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}; check the folder and the disk") from error
    return target


def put_lowered(source: Path, release: Release, target: Path, *, plugin: bool) -> None:
    """Write ``source`` lowered to ``target``, and links to its weights beside it; nothing where it cannot be lowered.

    Raises:
        BundleError: the graph cannot be read or lowered.
        OSError: as the file system says it; what was written until then stays.
    """
    model, names = read_graph(source)
    with understood():
        lower(model, release, plugin=plugin)
    for name in sorted(names):
        link(source.parent / name, target.parent / name)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    ir.save(model, target)


def link(source: Path, target: Path) -> None:
    """The same file under another name: by a symbolic link, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        target.symlink_to(source.resolve())
    except OSError:  # a file system or an account without links
        shutil.copyfile(source, target)
