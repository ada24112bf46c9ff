"""Every field of config.json that the export reads is checked: what is missing, odd or unsupported is named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from export.checkpoint import Checkpoint
from export.convert import choose_linvt, frame_spec
from export.families import backbone_from_checkpoint
from runtime.errors import OptionError
from tests.checkpoints import ABSENT, WITH_LINVT, copied, edit_json, refusal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the LinVT-InternVL2 checkpoint, to be damaged."""
    return copied(WITH_LINVT, tmp_path / "checkpoint")


@pytest.mark.parametrize("kind", ["llava", None, 5, {"a": 1}, ABSENT])
def test_an_unknown_family_is_refused_with_the_known_ones(folder: Path, kind: object) -> None:
    edit_json(folder / "config.json", "model_type", kind)
    message = refusal(folder)
    assert "model_type" in message and "known: internvl2" in message


@pytest.mark.parametrize(
    "field",
    [
        "vision_config.hidden_size",
        "vision_config.num_attention_heads",
        "vision_config.num_hidden_layers",
        "vision_config.intermediate_size",
        "vision_config.patch_size",
        "vision_config.image_size",
        "vision_config.layer_norm_eps",
        "llm_config.hidden_size",
        "llm_config.num_attention_heads",
        "llm_config.num_key_value_heads",
        "llm_config.num_hidden_layers",
        "llm_config.intermediate_size",
        "llm_config.vocab_size",
        "llm_config.max_position_embeddings",
        "llm_config.rope_theta",
        "llm_config.rms_norm_eps",
        "llm_config.architectures",
    ],
)
@pytest.mark.parametrize("value", [ABSENT, None, "8", [8], {}, 0, -1, True, 10**30, math.nan, math.inf])
def test_a_size_that_is_missing_or_none_is_refused_by_name(folder: Path, field: str, value: object) -> None:
    edit_json(folder / "config.json", field, value)
    assert field in refusal(folder)


@pytest.mark.parametrize("field", ["llm_config", "vision_config"])
@pytest.mark.parametrize("value", [ABSENT, None, "x", [], [1], 3, False])
def test_a_nested_config_that_is_no_object_is_refused_by_name(folder: Path, field: str, value: object) -> None:
    edit_json(folder / "config.json", field, value)
    assert field in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("downsample_ratio", 0, "downsample_ratio"),
        ("downsample_ratio", -0.5, "downsample_ratio"),
        ("downsample_ratio", 3, "downsample_ratio"),
        ("downsample_ratio", 1e-12, "downsample_ratio"),
        ("downsample_ratio", math.nan, "downsample_ratio"),
        ("downsample_ratio", 1 / 3, "divides the 4 patches"),
        ("downsample_ratio", "half", "downsample_ratio"),
        ("ps_version", "v3", "supported: 'v1', 'v2'"),
        ("ps_version", 2, "ps_version"),
        ("select_layer", 0, "expected -2 to -1"),
        ("select_layer", -3, "expected -2 to -1"),
        ("select_layer", "last", "select_layer"),
        ("force_image_size", 448, "force_image_size 448 differs"),
        ("force_image_size", "56", "force_image_size"),
        ("template", "vicuna", "template is 'vicuna'; supported: 'Hermes-2'"),
        ("template", "phi3-chat", "the tokenizer has no token '<|assistant|>'"),
        ("template", ["Hermes-2"], "template"),
        ("vision_config.num_attention_heads", 5, "multiple of vision_config.num_attention_heads, which is 5"),
        ("vision_config.patch_size", 15, "multiple of vision_config.patch_size, which is 15"),
        ("vision_config.image_size", 5600, "expected 1 to 4096"),
        ("vision_config.num_hidden_layers", 10**6, "expected 1 to 1024"),
        ("vision_config.hidden_act", "relu", "supported: 'gelu'"),
        ("vision_config.num_channels", 1, "supported: 3"),
        ("llm_config.num_attention_heads", 5, "multiple of llm_config.num_key_value_heads, which is 2"),
        ("llm_config.num_attention_heads", 10, "multiple of llm_config.num_attention_heads, which is 10"),
        ("llm_config.head_dim", 11, "heads of 11 channels, expected an even number"),
        ("llm_config.head_dim", "12", "llm_config.head_dim"),
        ("llm_config.max_position_embeddings", 16, "expected 64 to"),
        ("llm_config.hidden_act", "gelu", "supported: 'silu'"),
        ("llm_config.use_sliding_window", True, "supported: False"),
        ("llm_config.rope_scaling", {"type": "dynamic", "factor": 2.0}, "rope_scaling"),
        ("llm_config.architectures", ["LlamaForCausalLM"], "LlamaForCausalLM"),
        ("llm_config.architectures", ["InternLM2ForCausalLM"], "InternLM2"),
        ("llm_config.architectures", "Qwen2ForCausalLM", "['Qwen2ForCausalLM']"),
        ("vision_config.norm_type", "rms_norm", "InternViT-6B"),
        ("vision_config.qk_normalization", True, "InternViT-6B"),
        ("linvt_top_k", 0, "LinVT sizes must all be at least 1"),
        ("linvt_top_k", 10**9, "at most 65536"),
        ("linvt_top_k", "12", "LinVT settings"),
        ("linvt_num_heads", 5, "does not divide into 5 heads"),
        ("linvt_num_layers", 10**6, "linvt_num_layers is 1000000, the LinVT weights hold 2"),
        ("num_video_query_token", 16, "num_video_query_token is 16, the LinVT weights hold 8"),
        ("linvt_axes", "sideways", "LinVT settings"),
        ("linvt_norm_eps", -1, "norm_eps"),
        ("linvt_positions", "absolute", "absolute positions need tokens_per_frame and max_frames"),
        ("linvt_max_frames", 2, "needs 3 frames for its top_k and has positions for 2"),
        ("use_multi_scale", "yes", "use_multi_scale"),
    ],
)
def test_a_choice_that_does_not_fit_is_refused_by_name(folder: Path, field: str, value: object, named: str) -> None:
    edit_json(folder / "config.json", field, value)
    assert named in refusal(folder)


@pytest.mark.parametrize("frames", [0, -1, 2, 513])
def test_frames_outside_what_the_model_takes_are_refused_with_the_range(frames: int) -> None:
    checkpoint = Checkpoint.open(WITH_LINVT)
    backbone = backbone_from_checkpoint(checkpoint)
    with pytest.raises(OptionError, match=r"--frames .* 3 to 512"):
        frame_spec(backbone, choose_linvt(None, checkpoint, backbone), frames)
