"""Copies of a bundle with chosen faults, and the line with which a faulty one is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle import MANIFEST
from runtime.engine import VideoQA
from runtime.errors import BundleError, LinvtError

Edit = Callable[[dict[str, Any]], object]


def forge(source: Path, target: Path, *, edit: Edit = lambda manifest: None, **files: bytes) -> Path:
    """A copy of a bundle with an edited manifest and replaced files whose hashes fit; ``__`` is a dot in a name."""
    shutil.copytree(source, target)
    manifest = json.loads((target / MANIFEST).read_bytes())
    for name, data in files.items():
        path = name.replace("__", ".")
        (target / path).write_bytes(data)
        manifest["files"][path] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(manifest)
    (target / MANIFEST).write_text(json.dumps(manifest))
    return target


def replaced(place: str, value: object) -> Edit:
    """Puts ``value`` at a dotted place of the manifest."""

    def edit(manifest: dict[str, Any]) -> None:
        *folders, last = place.split("/")
        for name in folders:
            manifest = manifest[name]
        manifest[last] = value

    return edit


def refusal(path: Any, kind: type[LinvtError] = BundleError) -> str:
    """The one line with which opening, or opening every graph, is refused."""
    with pytest.raises(kind) as caught, VideoQA.open(path) as qa:
        for stage in qa.bundle.manifest.stages:
            qa.backend.graph(stage)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 800, message
    return message
