"""Every file that BLIP-3's sizes are read from: what stands for what is absent, and what is refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from export.checkpoint import Checkpoint
from export.connector.perceiver import Perceiver, PerceiverConfig
from export.decoder import Decoder
from export.families.base import FrameRoute
from export.families.xgenmm import EXTRA_TOKENS, XGENMM
from export.load import load_module
from runtime.errors import CheckpointError, OptionError
from tests.checkpoints import ABSENT, copied, edit_json, rewrite
from tests.xgenmm import FOLDER, read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return copied(FOLDER, tmp_path / "checkpoint")


def refusal(folder: Path) -> str:
    """The one line that says why the checkpoint is not taken."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint = Checkpoint.open(folder)
        backbone = XGENMM.backbone(checkpoint, FrameRoute())
        load_module(backbone.vision, checkpoint.tensors, backbone.vision_names)
        load_module(lambda: Decoder(backbone.llm.config), checkpoint.tensors, backbone.llm.names)
        backbone.llm.table.read(checkpoint.tensors, (backbone.llm.table_rows, backbone.llm.config.width))
    message = str(caught.value)
    print(message)
    assert "\n" not in message and len(message) < 600
    return message


# --- what the files say


def test_sizes_of_perceiver_and_vocabulary_come_from_the_tensors(folder: Path, random: np.random.Generator) -> None:
    latents, head_dim, mlp_width, layers = (int(value) for value in random.integers(1, 9, 4))
    config = {"latents": latents, "inner": 16 * head_dim, "mlp_width": mlp_width, "layers": layers}
    first = int(random.integers(1, 362))

    def resize(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("vlm.vision_tokenizer.")]:
            del tensors[name]
        made = Perceiver(PerceiverConfig(width=32, **config), 48)
        tensors |= {f"vlm.vision_tokenizer.{name}": value for name, value in made.state_dict().items()}

    rewrite(folder, resize)
    edit_json(folder / "config.json", "vision_tokenizer_config", {"model_type": "xgenmm_vision_tokenizer"})
    edit_json(folder / "config.json", "text_config.initial_tokenizer_len", first)
    (folder / "tokenizer.json").unlink()  # whose ids would no longer fit
    backbone, checkpoint = read(folder), Checkpoint.open(folder)
    assert backbone.tokens_per_frame == latents
    assert backbone.llm.config.vocab == backbone.llm.table_rows == first + 3
    vision: Any = load_module(backbone.vision, checkpoint.tensors, backbone.vision_names)
    assert len(vision.connector.layers) == layers
    with torch.no_grad():
        assert vision(torch.randn(2, 3, 75, 75)).shape == (2, latents, 48)
    load_module(lambda: Decoder(backbone.llm.config), checkpoint.tensors, backbone.llm.names)


def test_the_published_config_which_says_next_to_nothing_means_the_published_sizes(folder: Path) -> None:
    """The published file has four fields of the LLM and none of tower and perceiver."""
    checkpoint = Checkpoint.open(folder)
    text = {"initial_tokenizer_len": 32012, "model_type": "phi3", "sliding_window": 2047, "torch_dtype": "bfloat16"}
    config = {
        "model_type": "xgenmm",
        "text_config": text,
        "vision_encoder_config": {"anyres_patch_sampling": True, "image_aspect_ratio": "anyres"},
        "vision_tokenizer_config": {"model_type": "xgenmm_vision_tokenizer"},
    }
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (folder / name).unlink()
    shapes = {
        "vlm.lang_model.model.embed_tokens.weight": (32064, 3072),
        "vlm.lang_model.model.embed_tokens.additional_embedding.weight": (3, 3072),
        "vlm.lang_model.model.layers.0.mlp.gate_up_proj.weight": (16384, 3072),
        "vlm.vision_tokenizer.latents": (128, 1152),
        "vlm.vision_tokenizer.layers.0.0.to_q.weight": (1536, 1152),
        "vlm.vision_tokenizer.layers.0.1.1.weight": (4608, 1152),
        **{f"vlm.vision_tokenizer.layers.{layer}.0.to_out.weight": (1152, 1536) for layer in range(6)},
        **{f"vlm.lang_model.model.layers.{layer}.input_layernorm.weight": (3072,) for layer in range(32)},
    }

    class Published:
        files = shapes

        def shape(self, name: str) -> tuple[int, ...]:
            return shapes[name]

    found = XGENMM.backbone(replace(checkpoint, config=config, tensors=Published()), FrameRoute())  # type: ignore[arg-type]
    llm = found.llm.config
    assert (llm.width, llm.layers, llm.heads, llm.heads_kv, llm.head_dim) == (3072, 32, 32, 32, 96)
    assert (llm.mlp_width, llm.vocab, llm.context, llm.window) == (8192, 32015, 4096, 2047)
    assert (llm.norm_eps, llm.rotary.theta, llm.rotary.dims, llm.head_bias) == (1e-5, 1e4, 96, True)
    assert (found.preprocess.size, found.preprocess.mean, found.preprocess.std) == ((384, 384), (0.5,) * 3, (0.5,) * 3)
    assert found.tokens_per_frame == 128
    with torch.device("meta"):
        vision: Any = found.vision()
    assert len(vision.tower.encoder.layers) == 27 and len(vision.connector.layers) == 6
    assert vision.tower.embeddings.position_embedding.weight.shape == (729, 1152)
    assert vision.tower.encoder.layers[0].mlp.fc1.weight.shape == (4304, 1152)
    assert vision.tower.encoder.layers[0].attn.heads == 16
    assert vision.tower.post_layernorm.eps == 1e-6


def test_the_tower_s_sizes_may_lie_beside_the_checkpoint_and_be_the_vision_tower_s_alone(folder: Path) -> None:
    before = read(folder)
    config = json.loads((folder / "siglip-tiny/config.json").read_text())["vision_config"]
    beside = folder.parent / "siglip-tiny"
    (folder / "siglip-tiny").rename(beside)
    (beside / "config.json").write_text(json.dumps(config))
    edit_json(folder / "config.json", "vision_encoder_config.model_name", "some/siglip-tiny")
    assert str(before.vision()) == str(read(folder).vision())


def test_a_tower_s_own_file_means_transformers_defaults_where_it_is_silent(folder: Path) -> None:
    edit_json(folder / "siglip-tiny/config.json", "vision_config.num_hidden_layers", ABSENT)
    assert "encoder.layers.2." in refusal(folder)  # 12 layers, of which the checkpoint has 2


def test_the_preprocessor_may_be_absent_only_where_the_published_size_fits(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    message = refusal(folder)
    assert "preprocessor_config.json" in message and "[384, 384]" in message and "[75, 75]" in message


@pytest.mark.parametrize(
    ("size", "interpolation", "expected"),
    [([75, 75], "bilinear", (75, 75)), (83, "bicubic", (83, 83)), ([70, 83], ABSENT, (70, 83))],
)
def test_the_preprocessor_s_size_may_be_any_with_the_tower_s_patches(
    folder: Path, size: object, interpolation: object, expected: tuple[int, int]
) -> None:
    edit_json(folder / "preprocessor_config.json", "size", size)
    edit_json(folder / "preprocessor_config.json", "interpolation_mode", interpolation)
    spec = read(folder).preprocess
    assert spec.size == expected and spec.fit == "stretch"
    assert spec.resample == ("bilinear" if interpolation == "bilinear" else "bicubic")


def test_there_is_no_choice_of_route_or_size() -> None:
    for route in (FrameRoute(image_size=(75, 75)), FrameRoute(route="video")):
        with pytest.raises(OptionError, match="xgenmm"):
            XGENMM.backbone(Checkpoint.open(FOLDER), route)


def test_the_family_is_recognised() -> None:
    assert XGENMM.recognises({"model_type": "xgenmm"}) and XGENMM.recognises({"model_type": "blip_3"})
    assert not any(XGENMM.recognises({"model_type": kind}) for kind in ("phi3", None, ["xgenmm"], {}))


# --- what is refused


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text_config", ABSENT),
        ("text_config", []),
        ("text_config.initial_tokenizer_len", ABSENT),
        ("text_config.initial_tokenizer_len", "362"),
        ("text_config.initial_tokenizer_len", 0),
        ("text_config.initial_tokenizer_len", 375),
        ("text_config.model_type", "llama"),
        ("text_config.tie_word_embeddings", True),
        ("text_config.rope_parameters", {"rope_theta": 5e5}),
        ("text_config.rope_theta", None),
        ("text_config.rope_scaling", {"type": "linear", "factor": 2.0}),
        ("text_config.hidden_act", "gelu"),
        ("text_config.rms_norm_eps", 0.0),
        ("text_config.hidden_size", None),
        ("text_config.hidden_size", True),
        ("text_config.num_attention_heads", 5),
        ("text_config.num_hidden_layers", -1),
        ("vision_encoder_config.model_name", 7),
        ("vision_encoder_config.model_name", "openai/clip-vit-large-patch14"),
        ("vision_encoder_config.model_name", "google/.."),
        ("vision_tokenizer_config.num_vis_tokens", 9),
        ("vision_tokenizer_config.num_vis_tokens", "8"),
        ("vision_tokenizer_config.vis_feature_dim", 1152),
    ],
)
def test_an_odd_field_is_refused_by_name(folder: Path, field: str, value: object) -> None:
    edit_json(folder / "config.json", field, value)
    assert field in refusal(folder)


@pytest.mark.parametrize("name", ["..", "google/..", "", "/", "siglip-tiny/."])
def test_the_tower_s_name_leads_to_a_folder_of_that_name_only(folder: Path, name: str) -> None:
    """A SigLIP's config.json lies in the folder above, which no name may mean."""
    (folder / "siglip-tiny/config.json").rename(folder.parent / "config.json")
    edit_json(folder / "config.json", "vision_encoder_config.model_name", name)
    assert "vision_encoder_config.model_name" in refusal(folder)


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])
def test_a_size_that_is_left_out_and_contradicted_by_the_tensors_is_refused(folder: Path, name: str) -> None:
    edit_json(folder / "config.json", f"text_config.{name}", ABSENT)
    message = refusal(folder)
    assert f"no field text_config.{name}" in message and "Phi-3-mini" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vision_config.hidden_act", "relu"),
        ("vision_config.image_size", "75"),
        ("vision_config.num_attention_heads", 7),
        ("model_type", "clip"),
        ("vision_config", []),
    ],
)
def test_an_odd_field_of_the_tower_is_refused_with_its_file(folder: Path, field: str, value: object) -> None:
    edit_json(folder / "siglip-tiny/config.json", field, value)
    message = refusal(folder)
    assert "siglip-tiny/config.json" in message and field.split(".")[-1] in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("resize_mode", "shortest"),
        ("interpolation_mode", "nearest"),
        ("size", {"height": 75, "width": 75}),
        ("size", [75]),
        ("size", [75.5, 75]),
        ("size", [384, 384]),
        ("size", [75, -75]),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", "0.5"),
        ("image_std", [0.5, 0.5, 0.0]),
        ("image_std", [0.5, 0.5, math.nan]),
    ],
)
def test_an_odd_field_of_the_preprocessor_is_refused_with_its_file(folder: Path, field: str, value: object) -> None:
    edit_json(folder / "preprocessor_config.json", field, value)
    message = refusal(folder)
    assert "preprocessor_config.json" in message and field.removeprefix("image_") in message


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("config.json", "vision_encoder_config.model_name", "ViT-H-14-378-quickgelu"),
        ("config.json", "vision_encoder_config.force_image_size", 378),
        ("config.json", "model_type", "blip_3"),
    ],
)
def test_v1_is_refused_by_name_from_its_config(folder: Path, file: str, field: str, value: object) -> None:
    edit_json(folder / file, field, value)
    message = refusal(folder)
    assert "xGen-MM v1," in message and "depend on the question" in message and field in message


@pytest.mark.parametrize(
    "name",
    [
        "vlm.vision_tokenizer.text_projection.0.weight",
        "vlm.vision_encoder.transformer.resblocks.0.attn.in_proj_weight",
        "vlm.vision_encoder.conv1.weight",
    ],
)
def test_v1_is_refused_by_name_from_its_tensors(folder: Path, name: str) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: torch.randn(4, 4)}))
    message = refusal(folder)
    assert "xGen-MM v1," in message and name in message


@pytest.mark.parametrize(
    "name",
    ["frame_embs", "media_time_embs", "layers.0.0.to_q.bias", "layers.0.2.weight", "layers.1000.1.0.bias"],
)
def test_a_perceiver_with_other_tensors_is_refused_by_name(folder: Path, name: str) -> None:
    rewrite(folder, lambda tensors: tensors.update({f"vlm.vision_tokenizer.{name}": torch.randn(4, 4)}))
    assert f"vlm.vision_tokenizer.{name} is not part of xGen-MM v1.5's perceiver" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "vlm.lang_model.lm_head.bias",
        "vlm.lang_model.lm_head.additional_fc.weight",
        "vlm.lang_model.lm_head.additional_fc.bias",
        "vlm.lang_model.model.embed_tokens.weight",
        "vlm.lang_model.model.embed_tokens.additional_embedding.weight",
        "vlm.lang_model.model.layers.0.mlp.gate_up_proj.weight",
        "vlm.vision_encoder.post_layernorm.weight",
        "vlm.vision_tokenizer.latents",
        "vlm.vision_tokenizer.layers.0.0.to_q.weight",
        "vlm.vision_tokenizer.layers.5.0.to_kv.weight",
        "vlm.vision_tokenizer.projection.bias",
    ],
)
def test_a_missing_or_misshapen_tensor_is_refused_by_name(folder: Path, name: str) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: torch.randn(5, 7, 3)}))
    assert name in refusal(folder)
    rewrite(folder, lambda tensors: tensors.pop(name))
    assert name in refusal(folder)


def test_queries_that_do_not_divide_into_16_heads_are_refused(folder: Path) -> None:
    name = "vlm.vision_tokenizer.layers.0.0.to_q.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.randn(47, 32)}))
    message = refusal(folder)
    assert name in message and "16 heads" in message


def test_another_number_of_added_tokens_is_refused(folder: Path) -> None:
    name = "vlm.lang_model.model.embed_tokens.additional_embedding.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.randn(4, 48)}))
    assert name in refusal(folder)


def test_ids_of_added_tokens_that_are_not_their_rows_are_refused(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<another>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    message = refusal(folder)
    assert "'<image>'" in message and "363" in message and "362" in message and "initial_tokenizer_len" in message


def test_a_tokenizer_that_has_the_added_tokens_already_is_taken(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(EXTRA_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    assert read(folder).llm.config.vocab == 365
