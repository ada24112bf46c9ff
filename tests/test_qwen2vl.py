"""Qwen2-VL in PyTorch is the original code and transformers' class, number for number and token for token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from export.checkpoint import Checkpoint
from export.decoder import KVCache
from export.families.base import Route
from export.peer import PeerDecoder, peer_model
from runtime.preprocess import pixel_values_from_frames
from tests.conftest import Recorded
from tests.qwen2vl import FOLDER, backbone_of, copied, decoder_of, edit, vision_of

NAME = "qwen2vl-a"
LIMIT = 1e-4
ROUTES: tuple[Route, ...] = ("images", "video")

Load = Callable[[str], Recorded]


@pytest.fixture(scope="module")
def arrays(recorded: Load) -> Recorded:
    return recorded(NAME)


def close(found: Tensor, expected: Any, what: str = "") -> None:
    expected = torch.as_tensor(expected)
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    difference = float((found.detach() - expected).abs().max())
    print(f"{what} largest difference {difference:.2e}")
    assert difference < LIMIT, what


def cut(pixel_values: Any, patch: int, merge: int, group: int, frames: int) -> torch.Tensor:
    """(F, 3, H, W) -> (F / group, patches, 3 * frames * patch^2) in the order of the published processor."""
    values = np.asarray(pixel_values)
    sets = values.reshape(-1, group, *values.shape[1:]).repeat(frames // group, axis=1)  # (S, frames, 3, H, W)
    rows, columns = values.shape[2] // patch // merge, values.shape[3] // patch // merge
    split = sets.reshape(len(sets), frames, 3, rows, merge, patch, columns, merge, patch)
    ordered = split.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)  # S, block row, block column, row, column, channel, time, y, x
    return torch.from_numpy(ordered.reshape(len(sets), rows * columns * merge**2, -1).copy())


# --- the recorded stages


@pytest.mark.parametrize("route", ROUTES)
def test_frames_are_preprocessed_as_recorded(arrays: Recorded, route: Route) -> None:
    backbone = backbone_of(route=route)
    pixel_values = pixel_values_from_frames(list(arrays["frames_u8"]), backbone.preprocess)
    expected = arrays["pixel_values" if route == "images" else "video.pixel_values"]
    close(cut(pixel_values, 14, 2, backbone.frame_group, 2).flatten(0, 1), expected)


def test_an_odd_last_frame_stands_twice(arrays: Recorded) -> None:
    frames = [*arrays["frames_u8"][:3], arrays["frames_u8"][2]]
    pixel_values = pixel_values_from_frames(frames, backbone_of(route="video").preprocess)
    assert cut(pixel_values, 14, 2, 2, 2).double().sum().item() == pytest.approx(
        float(arrays["video3.pixel_values_checksum"]), rel=1e-6
    )


def test_vision_reproduces_every_recorded_stage_of_images(arrays: Recorded) -> None:
    backbone, vision = backbone_of(), vision_of()
    pixel_values = torch.from_numpy(pixel_values_from_frames(list(arrays["frames_u8"]), backbone.preprocess))
    with torch.no_grad():
        tower = vision.tower
        embedded = tower.patch_embed(pixel_values)
        close(embedded.flatten(0, 1), arrays["vision_patch_embed"], "patch embedding")
        angles = tower.angles(4)
        close(torch.cat(angles), torch.cat([arrays_angle(arrays, "cos"), arrays_angle(arrays, "sin")]), "angles")
        close(tower.blocks[0](embedded, angles).flatten(0, 1), arrays["vision_block0"], "first block")
        close(tower(pixel_values).flatten(0, 1), arrays["vision_features"], "features")
        close(vision(pixel_values), arrays["visual_tokens"], "tokens")


def arrays_angle(arrays: Recorded, function: str) -> Tensor:
    recorded_angles = torch.from_numpy(arrays["vision_rotary"]).unflatten(0, (4, 24))
    return recorded_angles.cos() if function == "cos" else recorded_angles.sin()


def test_vision_reproduces_every_recorded_stage_of_pairs(arrays: Recorded) -> None:
    backbone, vision = backbone_of(route="video"), vision_of(route="video")
    assert (backbone.frame_group, backbone.tokens_per_frame, backbone.grid) == (2, 6, (2, 3))
    pixel_values = torch.from_numpy(pixel_values_from_frames(list(arrays["frames_u8"]), backbone.preprocess))
    with torch.no_grad():
        close(vision.tower(pixel_values).flatten(0, 1), arrays["video.vision_features"], "features")
        close(vision(pixel_values), arrays["video.visual_tokens"], "tokens")


def test_decoder_reproduces_every_recorded_stage(arrays: Recorded) -> None:
    decoder = decoder_of()
    embeds, positions = (torch.from_numpy(arrays[name]) for name in ("inputs_embeds", "position_ids"))
    length = embeds.shape[1]
    with torch.no_grad():
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        states, angles = embeds, decoder.angles(positions)
        inputs = []
        for layer in decoder.model.layers:
            inputs.append(states)
            states = layer(states, angles, mask, None)[0]
        close(inputs[1], arrays["hidden_first"], "first layer")
        close(inputs[-1], arrays["hidden_last_prenorm_input"], "last layer's input")
        close(decoder.model.norm(states), arrays["hidden_final_norm"], "final norm")
        close(decoder(embeds, positions), arrays["logits"], "logits")


def prompt_of(arrays: Recorded, route: str) -> tuple[Tensor, Tensor]:
    """Embeddings (1, S, D) with the visual rows in place, and positions (3, 1, S)."""
    backbone = backbone_of()
    table = backbone.llm.table.read(Checkpoint.open(FOLDER).tensors, (320, 64))
    ids = torch.from_numpy(arrays[f"{route}input_ids"])[0]
    embeds = table[ids].clone()
    rows = {"": "visual_tokens", "video.": "video.visual_tokens", "linvt.": "linvt.vectors"}.get(route)
    if rows:
        token = 312 if route == "" else 313
        embeds[ids == token] = torch.from_numpy(arrays[rows]).reshape(-1, 64)
    name = f"{route}position_ids"
    positions = torch.from_numpy(arrays[name]) if name in arrays else torch.arange(len(ids)).expand(3, 1, -1)
    return embeds[None], positions


@pytest.mark.parametrize("route", ["", "video.", "linvt.", "text."])
def test_logits_are_the_recorded_ones_on_every_route(arrays: Recorded, route: str) -> None:
    embeds, positions = prompt_of(arrays, route)
    if f"{route}inputs_embeds" in arrays:
        close(embeds, arrays[f"{route}inputs_embeds"], "embeddings")
    expected = arrays[f"{route}logits"]
    with torch.no_grad():
        close(decoder_of()(embeds, positions)[:, -expected.shape[1] :], expected, "logits")


@pytest.mark.parametrize("route", ["", "video.", "linvt."])
def test_greedy_ids_are_the_recorded_ones_over_the_cache(arrays: Recorded, route: str) -> None:
    decoder, (embeds, positions) = decoder_of(), prompt_of(arrays, route)
    table = backbone_of().llm.table.read(Checkpoint.open(FOLDER).tensors, (320, 64))
    config, found = decoder.config, []
    past = [torch.randn(1, config.heads_kv, 128, config.head_dim) for _ in range(2 * config.layers)]
    delta = int(arrays[f"{route}rope_deltas"].item()) if f"{route}rope_deltas" in arrays else 0
    at = 0
    with torch.no_grad():
        for _ in range(16):
            index = torch.tensor([at])
            caches = [KVCache(key, value, index) for key, value in zip(past[::2], past[1::2], strict=True)]
            logits, past = decoder.step(embeds, positions, caches)
            at += embeds.shape[1]
            found.append(int(logits.argmax()))
            embeds, positions = table[found[-1]][None, None], torch.full((3, 1, 1), at + delta)
    assert found == arrays[f"{route}greedy_ids"].tolist()


# --- transformers' own class, at other sizes

HEIGHT, WIDTH = 24, 36  # two by three tokens of 3 x 3 patches of 4 pixels


@pytest.fixture
def theirs(tmp_path: Path) -> tuple[Path, Qwen2VLForConditionalGeneration]:
    """A model with an untied head, other sizes and three frames a kernel, as transformers saves it in bfloat16."""
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "intermediate_size": 80,
            "vocab_size": 331,
            "bos_token_id": 300,
            "eos_token_id": 302,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "mrope_section": [4, 1, 3]},
        },
        vision_config={
            "depth": 2,
            "embed_dim": 48,
            "num_heads": 3,
            "mlp_ratio": 3,
            "hidden_size": 96,
            "patch_size": 4,
            "spatial_merge_size": 3,
            "temporal_patch_size": 3,
            "hidden_act": "gelu",
        },
        image_token_id=312,
        video_token_id=313,
        vision_start_token_id=309,
        vision_end_token_id=310,
        architectures=["Qwen2VLForConditionalGeneration"],
    )
    model = Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1) * 0.5).bfloat16())
    folder = copied(tmp_path)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    for name, value in (("patch_size", 4), ("merge_size", 3), ("temporal_patch_size", 3), ("min_pixels", 144)):
        edit(folder, "preprocessor_config.json", name, value)
    return folder, model


@pytest.mark.parametrize("route", ROUTES)
def test_vision_is_that_of_transformers(
    theirs: tuple[Path, Qwen2VLForConditionalGeneration], route: Route, random: np.random.Generator
) -> None:
    folder, model = theirs
    backbone, vision = backbone_of(folder, (HEIGHT, WIDTH), route), vision_of(folder, (HEIGHT, WIDTH), route)
    assert (backbone.grid, backbone.tokens_per_frame) == ((2, 3), 6)
    pixel_values = random.standard_normal((6, 3, HEIGHT, WIDTH)).astype(np.float32)
    patches = cut(pixel_values, 4, 3, backbone.frame_group, 3)
    grid = torch.tensor([[1, 6, 9]] * 6 if route == "images" else [[2, 6, 9]])
    with torch.no_grad():
        expected = model.model.visual(patches.flatten(0, 1), grid_thw=grid).pooler_output
        close(vision(torch.from_numpy(pixel_values)), expected.unflatten(0, (-1, 6)), route)


def test_decoder_is_that_of_transformers_on_three_axes(
    theirs: tuple[Path, Qwen2VLForConditionalGeneration], random: np.random.Generator
) -> None:
    folder, model = theirs
    embeds = torch.from_numpy(random.standard_normal((1, 29, 96)).astype(np.float32))
    positions = torch.from_numpy(random.integers(0, 60, (3, 1, 29)))
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, position_ids=positions).logits
        close(decoder_of(folder, (HEIGHT, WIDTH))(embeds, positions), expected, "logits")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_the_same_model_under_published_and_newer_names(
    theirs: tuple[Path, Qwen2VLForConditionalGeneration], layout: str, tied: bool
) -> None:
    folder, size = theirs[0], (HEIGHT, WIDTH)
    edit(folder, "config.json", "tie_word_embeddings", tied)
    before = [vision_of(folder, size).state_dict(), decoder_of(folder, size).state_dict()]
    assert torch.equal(before[1]["lm_head.weight"], theirs[1].model.language_model.embed_tokens.weight) == tied
    if layout == "flat":  # as published
        config = json.loads((folder / "config.json").read_text())
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        rope_scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        flat = {**text, **config, "rope_theta": rope["rope_theta"], "rope_scaling": rope_scaling}
        (folder / "config.json").write_text(json.dumps(flat))
    else:  # as a state dict of a newer transformers is
        tensors = load_file(folder / "model.safetensors")
        newer = {newer_name(name): tensor for name, tensor in tensors.items() if not (tied and "lm_head" in name)}
        save_file(newer, folder / "model.safetensors")
    for state, earlier in zip((vision_of(folder, size), decoder_of(folder, size)), before, strict=True):
        assert all(torch.equal(tensor, earlier[name]) for name, tensor in state.state_dict().items())


def newer_name(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


# --- the peer that the comparison takes


@pytest.mark.parametrize("route", ROUTES)
def test_the_peer_is_the_same_model_from_the_same_tensors(
    theirs: tuple[Path, Qwen2VLForConditionalGeneration], route: Route, random: np.random.Generator
) -> None:
    folder, model = theirs
    backbone = backbone_of(folder, (HEIGHT, WIDTH), route)
    assert backbone.llm.peer
    peer = peer_model(backbone.llm.peer, Checkpoint.open(folder).tensors)
    for name, parameter in model.named_parameters():
        assert torch.equal(peer.get_parameter(name), parameter), name
    embeds = torch.from_numpy(random.standard_normal((1, 29, 96)).astype(np.float32))
    positions = torch.from_numpy(random.integers(0, 60, (3, 1, 29)))
    pixel_values = random.standard_normal((6, 3, HEIGHT, WIDTH)).astype(np.float32)
    patches = cut(pixel_values, 4, 3, backbone.frame_group, 3)
    grid = torch.tensor([[1, 6, 9]] * len(patches))
    with torch.no_grad():
        expected = PeerDecoder(peer)(embeds, positions)
        close(decoder_of(folder, (HEIGHT, WIDTH))(embeds, positions), expected, "logits")
        expected = peer.get_submodule("model.visual")(patches.flatten(0, 1), grid_thw=grid).pooler_output
        ours = vision_of(folder, (HEIGHT, WIDTH), route)(torch.from_numpy(pixel_values))
        close(ours, expected.unflatten(0, (-1, 6)), "tokens")


def test_the_peer_of_a_published_layout_says_what_was_recorded(arrays: Recorded) -> None:
    peer = backbone_of().llm.peer
    assert peer
    embeds, positions = (torch.from_numpy(arrays[name]) for name in ("inputs_embeds", "position_ids"))
    with torch.no_grad():
        found = PeerDecoder(peer_model(peer, Checkpoint.open(FOLDER).tensors))(embeds, positions)
    close(found, arrays["logits"], "logits")


# --- the graph


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("route", ROUTES)
def test_vision_traces_with_any_number_of_frames(
    theirs: tuple[Path, Qwen2VLForConditionalGeneration], route: Route, random: np.random.Generator
) -> None:
    import onnxruntime as ort
    from onnxscript import optimizer
    from torch.export import Dim

    backbone = backbone_of(theirs[0], (HEIGHT, WIDTH), route)
    vision = vision_of(theirs[0], (HEIGHT, WIDTH), route)
    group = backbone.frame_group
    frames = group * Dim("groups", min=1, max=8) if group > 1 else Dim("frames", min=1, max=8)
    program = torch.onnx.export(
        *(vision, (torch.randn(3 * group, 3, HEIGHT, WIDTH),)),
        dynamo=True,
        opset_version=24,
        input_names=["pixel_values"],
        dynamic_shapes=({0: frames},),
        optimize=False,
        verbose=False,
    )
    assert program is not None
    optimizer.optimize_ir(program.model, input_size_limit=1024, output_size_limit=1024)
    nodes = [node.op_type for node in program.model.graph]
    counted = {kind: nodes.count(kind) for kind in ("Conv", "Attention", "RotaryEmbedding", "Expand")}
    assert counted == {"Conv": 1, "Attention": 2, "RotaryEmbedding": 4, "Expand": 2}
    options = ort.SessionOptions()
    options.log_severity_level = 4
    model = program.model_proto.SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        values = random.standard_normal((count * group, 3, HEIGHT, WIDTH)).astype(np.float32)
        with torch.no_grad():
            expected = vision(torch.from_numpy(values))
        close(torch.from_numpy(session.run(None, {"pixel_values": values})[0]), expected, f"{count} sets")
