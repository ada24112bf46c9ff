"""The parts of a Qwen2-VL checkpoint as the export reads them, and copies of the golden one to change."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from export.checkpoint import Checkpoint
from export.decoder import Decoder
from export.families.base import Backbone, FrameRoute, Route
from export.families.qwen2vl import QWEN2VL
from export.load import load_module
from tests.conftest import GOLDEN

FOLDER = GOLDEN / "qwen2vl-a"
ABSENT = object()


def backbone_of(folder: Path = FOLDER, size: tuple[int, int] | None = (56, 84), route: Route = "images") -> Backbone:
    return QWEN2VL.backbone(Checkpoint.open(folder), FrameRoute(size, route))


def vision_of(folder: Path = FOLDER, size: tuple[int, int] = (56, 84), route: Route = "images") -> nn.Module:
    backbone = backbone_of(folder, size, route)
    return load_module(backbone.vision, Checkpoint.open(folder).tensors, backbone.vision_names)


def decoder_of(folder: Path = FOLDER, size: tuple[int, int] = (56, 84)) -> Decoder:
    llm = backbone_of(folder, size).llm
    return load_module(lambda: Decoder(llm.config), Checkpoint.open(folder).tensors, llm.names)


def copied(target: Path) -> Path:
    folder = target / "checkpoint"
    folder.mkdir()
    for path in FOLDER.iterdir():
        if path.suffix not in (".npz", ".md"):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def edit(folder: Path, file: str, field: str, value: object) -> None:
    content = json.loads((folder / file).read_text())
    *parents, last = field.split(".")
    place = content
    for parent in parents:
        place = place.setdefault(parent, {})
    if value is ABSENT:
        place.pop(last, None)
    else:
        place[last] = value
    (folder / file).write_text(json.dumps(content))
