"""Qwen2-VL's frames have sizes that fit, and files that do not fit are refused by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.checkpoint import Checkpoint
from export.decoder import Decoder
from export.families.qwen2vl import QWEN2VL, fitted
from export.load import load_module
from runtime.errors import CheckpointError, LinvtError, OptionError
from runtime.preprocess import Preprocess
from tests.qwen2vl import ABSENT, backbone_of, copied, edit

# --- sizes of frames


def test_without_a_size_frames_are_336_pixels_square() -> None:
    backbone = backbone_of(size=None)
    assert (backbone.preprocess.size, backbone.grid, backbone.tokens_per_frame) == ((336, 336), (12, 12), 144)


def test_without_a_size_the_published_limits_hold(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    edit(folder, "preprocessor_config.json", "max_pixels", 60000)
    assert backbone_of(folder, None).preprocess.size == (224, 224)


@pytest.mark.parametrize(
    ("size", "named"),
    [
        ((100, 90), "multiples of 28 pixels, the side of a token, and 3136 to 12845056 pixels in all"),
        ((100, 90), "the nearest height x width is 112x84"),
        ((28, 28), "56x56"),
        ((4088, 4088), "3584x3584"),
        ((20, 4088), "neither more than 200 times the other"),
        ((0, 28), "sides of 1 to 4096"),
        ((28, 5600), "sides of 1 to 4096"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_the_nearest(size: tuple[int, int], named: str) -> None:
    with pytest.raises(OptionError) as caught:
        backbone_of(size=size)
    message = str(caught.value)
    assert named in message and f"{size[0]}x{size[1]}" in message and "\n" not in message


def test_a_fitting_size_is_the_processor_s_own_choice(random: np.random.Generator) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for height, width in random.integers(28, 4000, (300, 2)).tolist():
        if max(height, width) <= 200 * min(height, width):
            limits = {"min_pixels": 200 * 28 * 28, "max_pixels": 1300 * 28 * 28}
            assert fitted(height, width, 28, tuple(limits.values())) == smart_resize(height, width, 28, **limits)


@pytest.mark.parametrize(
    "changes",
    [
        {"min_pixels": ABSENT, "max_pixels": ABSENT, "size": {"shortest_edge": 10000, "longest_edge": 20000}},
        {"min_pixels": ABSENT, "max_pixels": ABSENT, "size": {"min_pixels": 10000, "max_pixels": 20000}},
        {"min_pixels": 10000, "max_pixels": 20000, "size": {"shortest_edge": 1, "longest_edge": 2}},
    ],
)
def test_the_limits_stand_where_a_version_of_the_processor_wrote_them(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = copied(tmp_path)
    for name, value in changes.items():
        edit(folder, "preprocessor_config.json", name, value)
    with pytest.raises(OptionError, match="10000 to 20000 pixels"):
        backbone_of(folder, (56, 84))


def test_preprocessing_is_read_from_the_one_file_of_newer_processors(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    settings |= {"image_mean": [0.1, 0.2, 0.3], "resample": 2, "rescale_factor": 0.5}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert backbone_of(folder).preprocess == Preprocess(
        size=(56, 84),
        mean=(0.1, 0.2, 0.3),
        std=(0.26862954, 0.26130258, 0.27577711),
        resample="bilinear",
        rescale=0.5,
    )


# --- refusals


def refusal(folder: Path) -> str:
    with pytest.raises(LinvtError) as caught:
        checkpoint, backbone = Checkpoint.open(folder), backbone_of(folder)
        load_module(backbone.vision, checkpoint.tensors, backbone.vision_names)
        load_module(lambda: Decoder(backbone.llm.config), checkpoint.tensors, backbone.llm.names)
    assert isinstance(caught.value, CheckpointError)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("model_type", "qwen2_5_vl", "window attention, RMS norm and SwiGLU"),
        ("architectures", ["Qwen2VLForSequenceClassification"], "supported: ['Qwen2VLForConditionalGeneration']"),
        ("rope_scaling", None, "rope_scaling.mrope_section is None"),
        ("rope_scaling.mrope_section", [2, 3], "rope_scaling.mrope_section is [2, 3], expected three numbers"),
        ("rope_scaling.mrope_section", [2, 3, 4], "whose sum is 8"),
        ("rope_scaling.mrope_section", [3.0, 3, 2], "expected three numbers"),
        ("rope_scaling.mrope_section", [-1, 5, 4], "expected three numbers"),
        ("rope_scaling.type", "yarn", "rope_scaling.type is 'yarn'; supported: 'mrope', 'default'"),
        ("rope_scaling.rope_type", "linear", "rope_scaling.rope_type"),
        ("rope_scaling.mrope_interleaved", True, "mrope_interleaved is True; supported: False"),
        ("rope_theta", ABSENT, "rope_theta is None, expected float"),
        ("use_sliding_window", True, "use_sliding_window is True; supported: False"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'; supported: 'silu'"),
        ("text_config", [], "text_config is [], expected dict"),
        ("text_config.hidden_size", 64, "text_config.rope_scaling.mrope_section is None"),
        ("tie_word_embeddings", False, "lm_head.weight is missing"),
        ("image_token_id", 311_000, "image_token_id is 311000, which is none of the tokenizer's 14 added tokens"),
        ("video_token_id", ABSENT, "video_token_id is 151656"),
        ("vision_start_token_id", "309", "vision_start_token_id is '309', expected int"),
        ("vision_config", ABSENT, "vision_config.patch_size is None"),
        ("vision_config.depth", ABSENT, "vision_config.depth is None, expected int"),
        ("num_hidden_layers", 4, "model.layers.3.self_attn.q_proj.weight is missing"),
        ("vision_config.depth", 4, "visual.blocks.3.attn.qkv.weight is missing"),
        ("vision_config.embed_dim", 48, "tensor visual.patch_embed.proj.weight has shape [32, 3, 2, 14, 14]"),
        ("vision_config.num_heads", 3, "multiple of vision_config.num_heads, which is 3"),
        ("vision_config.num_heads", 16, "channels are a multiple of 4"),
        ("vision_config.mlp_ratio", ABSENT, "vision_config.mlp_ratio is None, expected float"),
        ("vision_config.mlp_ratio", 1e9, "MLP of 3.2e+10 channels"),
        ("vision_config.mlp_ratio", 2, "visual.blocks.0.mlp.fc1.weight has shape [128, 32]"),
        ("vision_config.hidden_size", 32, "vision_config.hidden_size is 32, expected 64"),
        ("vision_config.hidden_act", "silu", "supported: 'quick_gelu'"),
        ("vision_config.in_chans", 1, "vision_config.in_chans is 1; supported: 3"),
        ("vision_config.in_channels", 4, "vision_config.in_channels is 4; supported: 3"),
        ("vision_config.patch_size", 16, "preprocessor_config.json field patch_size is 14; supported: 16"),
        ("vision_config.patch_size", [14, 14], "vision_config.patch_size is [14, 14], expected int"),
        ("vision_config.spatial_merge_size", 1, "preprocessor_config.json field merge_size is 2; supported: 1"),
        ("vision_config.temporal_patch_size", 4, "preprocessor_config.json field temporal_patch_size is 2"),
        ("vision_config.rope_parameters", {"rope_type": "linear"}, "rope_parameters.rope_type is 'linear'"),
        ("vision_config.rope_parameters", {"rope_theta": 0}, "rope_parameters.rope_theta is 0.0"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, field: str, value: object, named: str
) -> None:
    folder = copied(tmp_path)
    edit(folder, "config.json", field, value)
    assert named in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("do_resize", False, "field do_resize is False; supported: True"),
        ("do_normalize", False, "do_normalize"),
        ("resample", 1, "field resample is 1; supported: 3, 2"),
        ("rescale_factor", 0, "rescale_factor is 0.0"),
        ("image_mean", [0.5], "field image_mean is [0.5], expected three numbers"),
        ("image_std", [0.5, 0.5, "0.5"], "field image_std"),
        ("image_std", [0.5, 0.5, 0], "std is (0.5, 0.5, 0), expected three finite numbers above 0"),
        ("min_pixels", "3136", "field min_pixels is '3136', expected int"),
        ("min_pixels", 2**24, "min_pixels is 16777216, expected at most max_pixels, 12845056"),
        ("max_pixels", -1, "field max_pixels is -1"),
    ],
)
def test_preprocessing_that_does_not_fit_is_refused_by_file_and_name(
    tmp_path: Path, field: str, value: object, named: str
) -> None:
    folder = copied(tmp_path)
    edit(folder, "preprocessor_config.json", field, value)
    message = refusal(folder)
    assert named in message and message.startswith("preprocessor_config.json")


@pytest.mark.parametrize("entry", [{"id": "313", "content": "x"}, {"id": 313}, "x"])
def test_a_damaged_list_of_tokens_is_refused(tmp_path: Path, entry: object) -> None:
    folder = copied(tmp_path)
    edit(folder, "tokenizer.json", "added_tokens", [entry])
    assert refusal(folder).startswith("tokenizer.json")


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "chat_template.json").unlink()
    edit(folder, "tokenizer_config.json", "chat_template", ABSENT)
    assert "has no chat template" in refusal(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert backbone_of(folder).family == "qwen2vl"


def test_only_its_own_configuration_is_recognised() -> None:
    assert QWEN2VL.recognises({"model_type": "qwen2_vl"})
    assert not QWEN2VL.recognises({"model_type": "internvl_chat"})
    assert not QWEN2VL.recognises({})
