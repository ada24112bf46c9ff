"""Copies of the golden checkpoints to damage, read as the export reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from export.checkpoint import Checkpoint
from export.convert import choose_linvt, frame_spec, load_decoder, load_linvt, load_table
from export.families import backbone_from_checkpoint
from export.load import load_module
from export.tokenizer import generation_defaults, stop_ids, tokenizer_from_checkpoint
from runtime.errors import CheckpointError, LinvtError
from tests.conftest import GOLDEN

WITH_LINVT, PLAIN = GOLDEN / "linvt-internvl2-a", GOLDEN / "internvl2-qwen2-a"
ABSENT = object()


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, ignore=shutil.ignore_patterns("expected.npz", "NOTES.md")))


def edit_json(path: Path, key: str, value: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    *parents, last = key.split(".")
    place = content
    for parent in parents:
        place = place[parent]
    if value is ABSENT:
        place.pop(last, None)
    else:
        place[last] = value
    path.write_text(json.dumps(content))


def parts_of(source: Path, linvt: str | None = None) -> dict[str, nn.Module]:
    """All modules, loaded as the export loads them, and everything else it reads of a checkpoint."""
    checkpoint = Checkpoint.open(source)
    backbone = backbone_from_checkpoint(checkpoint)
    weights = choose_linvt(linvt, checkpoint, backbone)
    frame_spec(backbone, weights, None)
    tokenizer = tokenizer_from_checkpoint(checkpoint, backbone.prompt)
    stop_ids(checkpoint, tokenizer, backbone.prompt.end_token)
    generation_defaults(checkpoint)
    load_table(checkpoint, backbone)
    checkpoint.fingerprint()
    parts: dict[str, nn.Module] = {
        "vision": load_module(backbone.vision, checkpoint.tensors, backbone.vision_names),
        "decoder": load_decoder(checkpoint, backbone),
    }
    return parts | ({"linvt": load_linvt(weights)} if weights else {})


def refusal(source: Path, linvt: str | None = None) -> str:
    with pytest.raises(LinvtError) as caught:
        parts_of(source, linvt)
    assert isinstance(caught.value, CheckpointError)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def assert_equal_parts(first: dict[str, nn.Module], second: dict[str, nn.Module]) -> None:
    assert first.keys() == second.keys()
    for name, part in first.items():
        state, other = part.state_dict(), second[name].state_dict()
        assert state.keys() == other.keys()
        assert all(torch.equal(state[key], other[key]) for key in state), name


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
