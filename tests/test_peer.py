"""The PyTorch side of a comparison is transformers' code wherever transformers has the model, and reads it once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export.checkpoint import Checkpoint, TensorFiles
from export.convert import load_vision
from export.decoder import Decoder
from export.families import Backbone, backbone_from_checkpoint
from export.families.base import FrameRoute
from export.peer import Peer, PeerDecoder, peer_model
from export.reference import Reference, decoder_of, vision_of
from export.vision.qwen2vl import Qwen2VLTowerConfig, flat_patches
from runtime.bundle import Bundle
from runtime.errors import CheckpointError
from runtime.preprocess import vision_feeds
from tests.checkpoints import copied, edit_json, rewrite
from tests.conftest import GOLDEN, Recorded

Load = Callable[[str], Recorded]

SIZE = (56, 84)
SIGLIP = "transformers' SiglipVisionModel and this project's connector"
WITH_TOWER = {
    "aquila-a": (FrameRoute(), SIGLIP),
    "mipha-a": (FrameRoute(), SIGLIP),
    "xgenmm-a": (FrameRoute(), SIGLIP),
    "qwen2vl-a": (FrameRoute(SIZE), "transformers' Qwen2VLForConditionalGeneration"),
}
VIDEO = {"qwen2vl-a": FrameRoute(SIZE, "video"), "aquila-a": FrameRoute(route="video")}


def read(name: str | Path, route: FrameRoute | None = None) -> tuple[Checkpoint, Backbone]:
    checkpoint = Checkpoint.open(GOLDEN / name)
    return checkpoint, backbone_from_checkpoint(checkpoint, route or WITH_TOWER[str(name)][0])


def towers(checkpoint: Checkpoint, backbone: Backbone) -> tuple[nn.Module, str]:
    """The reference's vision stage, and whose it is."""
    return vision_of(checkpoint, backbone, decoder_of(checkpoint, backbone)[1])


def feeds_of(frames: np.ndarray, backbone: Backbone) -> list[torch.Tensor]:  # type: ignore[type-arg]
    return [torch.from_numpy(value) for value in vision_feeds(list(frames), backbone.preprocess).values()]


def difference(found: torch.Tensor, expected: object) -> float:
    largest = float((found - torch.as_tensor(expected)).abs().max())
    print(f"largest difference {largest:.2e}")
    return largest


# --- vision


@pytest.mark.parametrize("name", WITH_TOWER)
def test_transformers_vision_gives_the_recorded_tokens(name: str, recorded: Load) -> None:
    arrays, (checkpoint, backbone) = recorded(name), read(name)
    vision, made_of = towers(checkpoint, backbone)
    assert made_of == WITH_TOWER[name][1]
    code = Counter(type(module).__module__ for module in vision.modules())
    assert not code["export.vision.block"] and any(place.startswith("transformers.models.") for place in code)
    with torch.no_grad():
        assert difference(vision(*feeds_of(arrays["frames_u8"], backbone)), arrays["visual_tokens"]) < 1e-4


@pytest.mark.parametrize("name", VIDEO)
def test_videos_of_a_route_of_their_own_are_those_of_transformers_too(name: str, recorded: Load) -> None:
    arrays = recorded(name)
    checkpoint, backbone = read(name, VIDEO[name])
    vision, _ = towers(checkpoint, backbone)
    inputs = feeds_of(arrays["frames_u8"], backbone)
    with torch.no_grad():
        found = vision(*inputs)
        assert difference(found, load_vision(checkpoint, backbone)(*inputs)) < 1e-4
        if name == "qwen2vl-a":
            assert difference(found, arrays["video.visual_tokens"]) < 1e-4


def test_an_earlier_layer_of_the_tower_is_taken_without_its_last_norm(tmp_path: Path) -> None:
    folder = copied(GOLDEN / "mipha-a", tmp_path / "checkpoint")
    edit_json(folder / "config.json", "vision_config.vision_tower.mm_vision_select_layer", -3)
    rewrite(folder, lambda tensors: [tensor.mul_(3) for name, tensor in tensors.items() if "post_layernorm" in name])
    checkpoint, backbone = read(folder, FrameRoute())
    inputs = torch.randn(2, 3, *backbone.preprocess.size)
    vision, _ = towers(checkpoint, backbone)
    _, usual = read("mipha-a")
    with torch.no_grad():
        found = vision(inputs)
        assert difference(found, load_vision(checkpoint, backbone)(inputs)) < 1e-4
        assert difference(found, towers(checkpoint, usual)[0](inputs)) > 1e-2


@pytest.mark.parametrize("group", [1, 3])
def test_patches_are_cut_in_merge_order(group: int) -> None:
    """Against plain indexing, with sides, merge and kernel that all differ."""
    config = Qwen2VLTowerConfig(8, 1, 1, 8, patch_size=2, merge=3, rows=3, columns=6, frames=3, group=group)
    frames = torch.randn(6, 3, 6, 12)
    found = flat_patches(frames, config)
    expected = [
        [
            torch.stack(
                [
                    frames[
                        at if group == 1 else 3 * at + frame, channel, 2 * row : 2 * row + 2, 2 * left : 2 * left + 2
                    ]
                    for channel in range(3)
                    for frame in range(3)
                ]
            ).flatten()
            for column in range(2)
            for row in range(3)
            for left in range(3 * column, 3 * column + 3)
        ]
        for at in range(6 // group)
    ]
    assert torch.equal(found, torch.stack([torch.stack(patches) for patches in expected]))


# --- the LLM of xGen-MM, whose head transformers' class does not have


def test_a_head_with_a_bias_and_added_rows_says_what_was_recorded(recorded: Load, tmp_path: Path) -> None:
    arrays, (checkpoint, backbone) = recorded("xgenmm-a"), read("xgenmm-a")
    peer = backbone.llm.peer
    assert peer and peer.name == "Phi3ForCausalLM"
    embeds = torch.from_numpy(arrays["inputs_embeds"])
    positions = torch.arange(embeds.shape[1])[None]
    with torch.no_grad():
        assert difference(decoder_of(checkpoint, backbone)[0](embeds, positions), arrays["logits"]) < 1e-4
        folder = copied(GOLDEN / "xgenmm-a", tmp_path / "checkpoint")
        biases = ("vlm.lang_model.lm_head.bias", "vlm.lang_model.lm_head.additional_fc.bias")
        rewrite(folder, lambda tensors: [tensors[name].add_(1) for name in biases])
        moved = decoder_of(*read(folder, FrameRoute()))[0](embeds, positions)
    assert difference(moved - 1, arrays["logits"]) < 1e-4


# --- reading


@pytest.mark.parametrize("name", WITH_TOWER)
def test_nothing_is_read_twice_and_nothing_is_kept_that_no_stage_needs(
    name: str, export_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"image_size": SIZE} if name == "qwen2vl-a" else {}
    manifest = Bundle.open(export_bundle(name, linvt="none", **options)).manifest
    counted: Counter[str] = Counter()
    tensor = TensorFiles.tensor

    def count(self: TensorFiles, name: str) -> torch.Tensor:
        counted[name] += 1
        return tensor(self, name)

    monkeypatch.setattr(TensorFiles, "tensor", count)
    reference = Reference.open(str(GOLDEN / name), "none", manifest)
    tables = {part for part in counted if "embed_tokens" in part}
    assert tables and max(counted[part] for part in counted.keys() - tables) == 1
    kept = {id(each): each for module in (reference.vision_module, reference.decoder) for each in module.parameters()}
    assert all(each.dtype == torch.float32 and not each.is_meta for each in kept.values())
    stages = read(name)[1]
    decoder = stages.llm.config
    with torch.device("meta"):
        ours = [*stages.vision().parameters(), *decoder_parameters(stages)]
    unused = 2 * 32 if name in ("aquila-a", "mipha-a") else 0  # the norm that does not run
    frames = 2 * 3 * 14 * 14 * 32 - 3 * 14 * 14 * 32 if name == "qwen2vl-a" else 0  # its kernel's second frame
    assert sum(map(torch.numel, kept.values())) == sum(map(torch.numel, ours)) + unused + frames
    assert reference.table.shape == (stages.llm.table_rows, decoder.width)


def decoder_parameters(backbone: Backbone) -> list[nn.Parameter]:
    return list(Decoder(backbone.llm.config).parameters())


def test_the_table_of_a_peer_is_let_go() -> None:
    checkpoint, backbone = read("aquila-a")
    assert backbone.llm.peer
    model = peer_model(backbone.llm.peer, checkpoint.tensors)
    assert any("embed_tokens" in name for name, _ in model.named_parameters())
    decoder = PeerDecoder(model)
    assert not any("embed_tokens" in name for name, _ in decoder.named_parameters())


def test_a_class_is_taken_with_what_the_checkpoint_says_about_it() -> None:
    checkpoint, backbone = read("mipha-a")
    assert backbone.vision_peer
    peer: Peer = backbone.vision_peer.peer
    wrong = replace(peer, config={**peer.config, "intermediate_size": 7})
    with pytest.raises(CheckpointError, match=r"mlp\.fc1\.weight has shape"):
        peer_model(wrong, checkpoint.tensors)


# --- another model


def test_a_bundle_of_another_size_or_family_is_refused_before_anything_is_loaded(
    export_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Bundle.open(export_bundle("qwen2vl-a", linvt="none", image_size=SIZE)).manifest

    def loading(self: TensorFiles, name: str) -> torch.Tensor:
        raise AssertionError(name)

    monkeypatch.setattr(TensorFiles, "tensor", loading)
    for name in ("internvl2-qwen2-a", "aquila-a"):
        with pytest.raises(CheckpointError) as caught:
            Reference.open(str(GOLDEN / name), "none", manifest)
        message = str(caught.value)
        assert message.startswith("the bundle is of another model: its frames are 56x84 by the route images")
        assert "--image-size" not in message and "give the checkpoint" in message
