"""Aquila-VL in PyTorch is the original code's, number for number, on every recorded route."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.checkpoint import Checkpoint
from export.families.aquila import AQUILA
from export.families.base import FrameRoute
from runtime.errors import CheckpointError, OptionError
from runtime.preprocess import pixel_values_from_frames
from tests.checkpoints import ABSENT, copied, edit_json, rewrite
from tests.conftest import GOLDEN, Recorded
from tests.llava import Loaded, greedy, largest, loaded, peer_of, video

Arrays = Recorded
NAME = "aquila-a"
QUESTION = "What is happening in this video? Describe what happens next."
VIDEO = FrameRoute(route="video")


@pytest.fixture(scope="module")
def images() -> Loaded:
    """Every frame an image of one view."""
    return loaded(AQUILA, GOLDEN / NAME)


@pytest.fixture(scope="module")
def pooled() -> Loaded:
    """The original's own way for videos."""
    return loaded(AQUILA, GOLDEN / NAME, VIDEO)


@pytest.fixture
def arrays(recorded: Callable[[str], Arrays]) -> Arrays:
    """What the original recorded."""
    return recorded(NAME)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be changed."""
    return copied(GOLDEN / NAME, tmp_path / "checkpoint")


def text(array: np.ndarray[Any, Any]) -> str:
    return bytes(array).decode()


def refusal(folder: Path, route: FrameRoute | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        loaded(AQUILA, folder, route)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- numbers


def test_frames_are_stretched_and_normalised_as_recorded(images: Loaded, arrays: Arrays) -> None:
    found = pixel_values_from_frames(list(arrays["frames_u8"]), images.backbone.preprocess)
    difference = np.abs(found - arrays["pixel_values"])
    print(f"largest difference {difference.max():.1e}")
    assert difference.mean() <= 1 / 255 and difference.max() < 1e-5


def test_vision_reproduces_every_recorded_stage(images: Loaded, arrays: Arrays) -> None:
    pixel_values, tower = torch.tensor(arrays["pixel_values"]), images.vision.tower
    with torch.no_grad():
        embedded = tower.embeddings(pixel_values)
        assert largest(embedded, arrays["vision_embeddings"]) < 1e-4
        assert largest(tower.encoder.layers[0](embedded), arrays["vision_layer0"]) < 1e-4
        assert largest(tower(pixel_values), arrays["vision_features"]) < 1e-4
        assert largest(images.vision(pixel_values), arrays["visual_tokens"]) < 1e-4


def test_the_video_route_pools_behind_the_connector(pooled: Loaded, arrays: Arrays) -> None:
    assert pooled.backbone.tokens_per_frame == 9
    with torch.no_grad():
        assert largest(pooled.vision(torch.tensor(arrays["pixel_values"])), arrays["video.pooled_tokens"]) < 1e-4


def test_the_llm_reproduces_every_recorded_stage(images: Loaded, arrays: Arrays) -> None:
    decoder, embeds = images.decoder, torch.tensor(arrays["inputs_embeds"])
    rows = embeds.shape[1]
    positions, mask = torch.arange(rows)[None], torch.ones(rows, rows, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        angles, states = decoder.angles(positions), embeds
        for index, layer in enumerate(decoder.model.layers):
            if index == len(decoder.model.layers) - 1:
                assert largest(states, arrays["hidden_last_prenorm_input"]) < 1e-4
            states, _, _ = layer(states, angles, mask, None)
            if index == 0:
                assert largest(states, arrays["hidden_first"]) < 1e-4
        assert largest(decoder.model.norm(states), arrays["hidden_final_norm"]) < 1e-4
        assert largest(decoder(embeds, positions), arrays["logits"]) < 1e-4


@pytest.mark.parametrize("prefix", ["", "video.", "linvt."])
def test_every_route_answers_as_recorded(images: Loaded, arrays: Arrays, prefix: str) -> None:
    embeds = torch.tensor(arrays[f"{prefix}inputs_embeds"])
    with torch.no_grad():
        logits = images.decoder(embeds, torch.arange(embeds.shape[1])[None])
        assert largest(logits, arrays[f"{prefix}logits"]) < 1e-4
        ids, steps = greedy(images.decoder, embeds, images.table, 16)
    assert largest(steps[:1], arrays[f"{prefix}logits"][:, -1]) < 1e-4
    assert ids == arrays[f"{prefix}greedy_ids"].tolist()


def test_transformers_own_class_is_the_same_llm(images: Loaded) -> None:
    model = peer_of(Checkpoint.open(GOLDEN / NAME), images.backbone)
    embeds, positions = torch.randn(1, 33, 64), torch.arange(33)[None]
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, position_ids=positions).logits
        assert largest(images.decoder(embeds, positions), expected) < 1e-4


# --- the prompt


def test_frames_become_the_recorded_prompt(images: Loaded, arrays: Arrays) -> None:
    rendered = images.text("frames", video(QUESTION), frames=3, tokens=25)
    once = images.text("frames", video(QUESTION), frames=3, tokens=1).replace("<image_newline>", "")
    assert once == text(arrays["prompt_text"])
    ids = images.ids(rendered)
    special = np.isin(ids, [images.token("<image>"), images.token("<image_newline>")])
    assert np.array_equal(np.where(special, -200, ids), arrays["expanded_ids"][0])
    with torch.no_grad():
        tokens = images.vision(torch.tensor(arrays["pixel_values"])).flatten(0, 1)
    assert largest(images.embeds(ids, tokens), arrays["inputs_embeds"]) < 1e-4


def test_pictures_become_the_same_prompt_as_frames(images: Loaded) -> None:
    parts = [{"type": "image"}] * 3
    message = {"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}
    as_images = images.text("video", [message], images=3, image_tokens=25)
    assert as_images == images.text("frames", video(QUESTION), frames=3, tokens=25)


@pytest.mark.parametrize("newline", ["one_token", "grid", "frame", "no_token", ABSENT])
def test_the_video_route_becomes_the_recorded_span(folder: Path, arrays: Arrays, newline: Any) -> None:
    edit_json(folder / "config.json", "mm_newline_position", newline)
    model, name = loaded(AQUILA, folder, VIDEO), "one_token" if newline is ABSENT else newline
    ids = model.ids(model.text("frames", video(QUESTION), frames=3, tokens=9))
    with torch.no_grad():
        tokens = model.vision(torch.tensor(arrays["pixel_values"])).flatten(0, 1)
    embeds, span = model.embeds(ids, tokens), arrays[f"video.visual_span_{name}"]
    start = int(arrays["video.span"][0])
    assert largest(embeds[0, start : start + len(span)], span) < 1e-4
    if name == "one_token":
        assert largest(embeds, arrays["video.inputs_embeds"]) < 1e-4
    rendered = model.text("frames", video(QUESTION), frames=3, tokens=9)
    assert re.sub("(<image>|<image_newline>)+", "<image>", rendered) == text(arrays["video.prompt_text"])


def test_linvt_s_rows_stand_without_a_newline(images: Loaded, arrays: Arrays) -> None:
    vectors = arrays["linvt.vectors"][0]
    ids = images.ids(images.text("video", video(QUESTION), frames=3, tokens=len(vectors)))
    assert images.text("video", video(QUESTION), frames=3, tokens=1) == text(arrays["linvt.prompt_text"])
    assert largest(images.embeds(ids, vectors), arrays["linvt.inputs_embeds"]) < 1e-5


def test_a_conversation_goes_on_as_recorded_for_text(images: Loaded, arrays: Arrays) -> None:
    asked = {"role": "user", "content": "How many people are there?"}
    first = images.text("video", [asked])
    assert first == text(arrays["text.prompt_text"])
    assert images.ids(first).tolist() == arrays["text.input_ids"][0].tolist()
    again = images.text("video", [asked, {"role": "assistant", "content": "Two."}, asked])
    body = "<|im_start|>user\nHow many people are there?<|im_end|>\n<|im_start|>assistant\n"
    assert again == first + "Two.<|im_end|>\n" + body
    assert images.text("video", [asked], ask=False) == first.removesuffix("<|im_start|>assistant\n")
    logits = images.decoder(images.table[images.ids(first)][None], torch.arange(len(images.ids(first)))[None])
    assert largest(logits[:, -8:], arrays["text.logits"]) < 1e-4


def test_the_newline_is_one_more_row_of_the_table(images: Loaded, arrays: Arrays) -> None:
    facts = images.backbone.prompt
    assert facts.extra_tokens == ("<image>", "<image_newline>")
    assert set(facts.extra_tokens) < set(facts.reserved)
    assert facts.prompt_rows == {"<image_newline>": 340} and images.table.shape == (341, 64)
    np.testing.assert_array_equal(images.table[340].numpy(), arrays["image_newline"])


# --- variants and refusals


@pytest.mark.parametrize("kind", ["llava", "qwen2", "llava_qwen", ABSENT])
def test_it_is_recognised_by_its_class_alone(folder: Path, kind: object) -> None:
    edit_json(folder / "config.json", "model_type", kind)
    assert AQUILA.recognises(Checkpoint.open(folder).config)
    assert not AQUILA.recognises({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"})


def test_a_checkpoint_without_newline_has_none_in_its_prompt(folder: Path) -> None:
    edit_json(folder / "config.json", "mm_patch_merge_type", "spatial")
    rewrite(folder, lambda tensors: tensors.pop("model.image_newline"))
    for route in (FrameRoute(), VIDEO):
        model = loaded(AQUILA, folder, route)
        assert "newline" not in model.text("frames", video(QUESTION), frames=2, tokens=4)
        assert model.backbone.prompt.extra_tokens == ("<image>",) and model.table.shape == (340, 64)
    edit_json(folder / "config.json", "mm_newline_position", "grid")
    loaded(AQUILA, folder)
    assert "mm_newline_position" in refusal(folder, VIDEO)


@pytest.mark.parametrize(("mode", "tokens"), [("bilinear", 9), ("average", 4), ("max", 4)])
def test_the_pooling_has_the_configured_form(folder: Path, arrays: Arrays, mode: str, tokens: int) -> None:
    edit_json(folder / "config.json", "mm_spatial_pool_mode", mode)
    model = loaded(AQUILA, folder, VIDEO)
    with torch.no_grad():
        found = model.vision(torch.tensor(arrays["pixel_values"]))
    assert found.shape == (3, tokens, 64) and model.backbone.tokens_per_frame == tokens


def test_pictures_are_padded_where_the_checkpoint_was_trained_so(folder: Path) -> None:
    edit_json(folder / "config.json", "image_aspect_ratio", "pad")
    spec = loaded(AQUILA, folder).backbone.preprocess
    assert (spec.fit, spec.fill) == ("pad", (127, 127, 127))
    assert loaded(AQUILA, folder, VIDEO).backbone.preprocess.fit == "stretch"


def test_a_head_of_its_own_is_read_where_the_configuration_says_so(folder: Path) -> None:
    head = torch.randn(340, 64)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    assert not torch.equal(loaded(AQUILA, folder).decoder.lm_head.weight, head)
    edit_json(folder / "config.json", "tie_word_embeddings", False)
    assert torch.equal(loaded(AQUILA, folder).decoder.lm_head.weight, head)


def test_without_the_tower_s_folder_it_is_so400m(folder: Path) -> None:
    edit_json(folder / "config.json", "mm_vision_tower", "google/siglip-so400m-patch14-384")
    message = refusal(folder)
    assert "729 patches and width 1152" in message and "[25, 32]" in message


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("architectures", ["LlavaLlamaForCausalLM"], "supported: ['LlavaQwenForCausalLM']"),
        ("architectures", ABSENT, "architectures is None"),
        ("mm_vision_tower", "openai/clip-vit-large-patch14-336", "mm_vision_tower"),
        ("mm_vision_tower", "laion/siglip", "mm_vision_tower"),
        ("mm_vision_tower", ABSENT, "mm_vision_tower"),
        ("mm_vision_tower", "../siglip/..", "mm_vision_tower"),
        ("mm_vision_tower", "siglip" * 100, "mm_vision_tower"),
        ("mm_projector_type", "linear", "mm_projector_type"),
        ("mm_projector_type", ABSENT, "mm_projector_type"),
        ("mm_projector_type", "mlp3x_gelu", "model.mm_projector.4.weight is missing"),
        ("mm_resampler_type", "spatial_pool", "mm_resampler_type"),
        ("mm_hidden_size", 33, "mm_hidden_size is 33"),
        ("mm_hidden_size", ABSENT, "mm_hidden_size"),
        ("mm_patch_merge_type", "spatial_nobase", "mm_patch_merge_type"),
        ("mm_patch_merge_type", "flat", "mm_patch_merge_type"),
        ("mm_patch_merge_type", ABSENT, "mm_patch_merge_type"),
        ("mm_use_im_start_end", True, "mm_use_im_start_end"),
        ("image_aspect_ratio", "crop_split", "image_aspect_ratio"),
        ("image_aspect_ratio", 4, "image_aspect_ratio"),
        ("use_sliding_window", True, "use_sliding_window"),
        ("rope_theta", ABSENT, "rope_theta"),
        ("num_hidden_layers", 4, "model.layers.3"),
        ("vocab_size", 341, "model.embed_tokens.weight"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(folder: Path, field: str, value: object, named: str) -> None:
    edit_json(folder / "config.json", field, value)
    assert named in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mm_spatial_pool_mode", ABSENT),
        ("mm_spatial_pool_mode", "conv"),
        ("mm_newline_position", "row"),
        ("add_faster_video", True),
    ],
)
def test_what_the_video_route_cannot_do_is_refused_there_only(folder: Path, field: str, value: object) -> None:
    edit_json(folder / "config.json", field, value)
    assert field in refusal(folder, VIDEO)
    loaded(AQUILA, folder)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("hidden_size", 36, "siglip-tiny-patch14/config.json, and tensor"),
        ("hidden_size", "32", "siglip-tiny-patch14/config.json field vision_config.hidden_size"),
        ("num_hidden_layers", 1, "expected more than 1"),
        ("num_hidden_layers", 4, "encoder.layers.2"),
        ("image_size", 89, "36 patches"),
    ],
)
def test_the_tower_s_own_file_is_checked(folder: Path, field: str, value: object, named: str) -> None:
    edit_json(folder / "siglip-tiny-patch14" / "config.json", f"vision_config.{field}", value)
    assert named in refusal(folder)


def test_a_tower_file_of_another_kind_is_refused(folder: Path) -> None:
    edit_json(folder / "siglip-tiny-patch14" / "config.json", "model_type", "siglip2")
    assert "siglip-tiny-patch14/config.json field model_type is 'siglip2'" in refusal(folder)


def test_a_flat_tower_file_is_read_as_well(folder: Path) -> None:
    path = folder / "siglip-tiny-patch14" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text())["vision_config"]))
    assert loaded(AQUILA, folder).backbone.tokens_per_frame == 25


def test_another_image_size_is_refused() -> None:
    with pytest.raises(OptionError, match="--image-size"):
        loaded(AQUILA, GOLDEN / NAME, FrameRoute(image_size=(384, 384)))
