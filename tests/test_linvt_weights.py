"""LinVT weights in a file of their own bring their settings or find them, and what does not belong is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from export.checkpoint import Checkpoint
from export.convert import choose_linvt
from export.families import backbone_from_checkpoint
from export.linvt.layout import LinVTWeights
from tests.checkpoints import PLAIN, WITH_LINVT, assert_equal_parts, copied, edit_json, parts_of, refusal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the LinVT-InternVL2 checkpoint, to be damaged."""
    return copied(WITH_LINVT, tmp_path / "checkpoint")


def cut_linvt(folder: Path, target: Path, metadata: dict[str, str] | None = None) -> Path:
    """Move the LinVT tensors, and what config.json says about them, out of the checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    linvt = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("linVT.", "query_tokens"))}
    save_file(tensors, folder / "model.safetensors")
    target.parent.mkdir(exist_ok=True)
    save_file(linvt, target, metadata=metadata)
    return target


LINVT_KEYS = ("linvt_num_heads", "linvt_num_layers", "linvt_top_k", "num_video_query_token")


def take_linvt_keys(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    taken = {key: config.pop(key) for key in LINVT_KEYS}
    (folder / "config.json").write_text(json.dumps(config))
    return taken


def test_weights_in_their_own_file_take_their_settings_from_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    weights = cut_linvt(folder, tmp_path / "linvt" / "linvt.safetensors")
    assert_equal_parts(parts_of(folder, str(weights)), parts_of(WITH_LINVT))
    assert_equal_parts(parts_of(folder, str(weights.parent)), parts_of(WITH_LINVT))


def test_weights_in_their_own_file_bring_their_settings_in_metadata(folder: Path, tmp_path: Path) -> None:
    keys = {key: json.dumps(value) for key, value in take_linvt_keys(folder).items()}
    weights = cut_linvt(folder, tmp_path / "linvt.safetensors", {"format": "pt", **keys})
    assert_equal_parts(parts_of(folder, str(weights)), parts_of(WITH_LINVT))


def test_weights_in_their_own_file_bring_their_settings_in_a_config_beside_them(folder: Path, tmp_path: Path) -> None:
    keys = take_linvt_keys(folder)
    weights = cut_linvt(folder, tmp_path / "linvt" / "linvt.safetensors")
    (weights.parent / "config.json").write_text(json.dumps(keys))
    assert_equal_parts(parts_of(folder, str(weights)), parts_of(WITH_LINVT))


def settings_of(folder: Path, linvt: Path | None) -> LinVTWeights:
    checkpoint = Checkpoint.open(folder)
    weights = choose_linvt(str(linvt) if linvt else None, checkpoint, backbone_from_checkpoint(checkpoint))
    assert weights
    return weights


def test_metadata_goes_before_a_config_beside_the_weights_and_that_before_the_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    weights = cut_linvt(folder, tmp_path / "linvt" / "linvt.safetensors", {"linvt_top_k": "5"})
    (weights.parent / "config.json").write_text(json.dumps({"linvt_top_k": 6, "linvt_norm_eps": 1e-6}))
    config = settings_of(folder, weights).config
    assert (config.top_k, config.norm_eps, config.heads) == (5, 1e-6, 4)


def test_a_checkpoint_does_not_say_how_many_queries_another_file_holds(folder: Path, tmp_path: Path) -> None:
    weights = cut_linvt(folder, tmp_path / "linvt.safetensors")
    edit_json(folder / "config.json", "num_video_query_token", 32)
    edit_json(folder / "config.json", "linvt_num_layers", 8)
    config = settings_of(folder, weights).config
    assert (config.queries, config.layers) == (8, 2)


def test_without_settings_the_released_code_s_sizes_hold(folder: Path, tmp_path: Path) -> None:
    take_linvt_keys(folder)
    config = settings_of(folder, cut_linvt(folder, tmp_path / "linvt.safetensors")).config
    assert (config.heads, config.top_k, config.layers, config.queries) == (4, 1024, 2, 8)


def test_a_checkpoint_without_linvt_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    cut_linvt(folder, tmp_path / "linvt.safetensors")
    message = refusal(folder)
    assert "--linvt WEIGHTS" in message and "--linvt none" in message
    assert "linvt" not in parts_of(folder, "none")


def test_linvt_of_another_width_is_refused() -> None:
    message = refusal(PLAIN, str(WITH_LINVT / "model.safetensors"))
    assert "query_tokens has shape [1, 8, 48], expected [1, queries, 64]" in message


def test_linvt_weights_that_are_none_are_refused(folder: Path, tmp_path: Path) -> None:
    empty, text = tmp_path / "empty", tmp_path / "text.safetensors"
    empty.mkdir()
    text.write_text("these are not the weights")
    assert "expected a safetensors file" in refusal(folder, str(empty))
    assert "expected a safetensors file" in refusal(folder, str(tmp_path / "absent"))
    assert "text.safetensors is not a whole safetensors file" in refusal(folder, str(text))
    assert "tensor query_tokens is missing" in refusal(folder, str(PLAIN / "model.safetensors"))
