"""Molmo checkpoints with other choices: computed as the original code does, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from export.checkpoint import Checkpoint
from export.decoder import Decoder
from export.families.base import Backbone, FrameRoute
from export.families.molmo import CLIP_MEAN, CLIP_STD, MOLMO, VISION
from export.load import load_module
from export.peer import PeerDecoder, peer_model
from runtime.errors import CheckpointError
from tests.checkpoints import ABSENT, copied, edit_json, rewrite
from tests.conftest import GOLDEN
from tests.olmo import BLOCK, HEAD, slow_7b_o

VIT = "model.vision_backbone.image_vit."
TABLE = "model.transformer.wte.embedding"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint with fresh random weights."""
    copy = copied(GOLDEN / "molmo-a", tmp_path / "molmo")

    def shuffle(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            norm = "norm" in name or "ln" in name
            tensors[name] = torch.randn_like(tensor) * 0.2 + (1 if norm and name.endswith("weight") else 0)

    rewrite(copy, shuffle)
    return copy


def configured(folder: Path, **fields: object) -> Path:
    for name, value in fields.items():
        edit_json(folder / "config.json", name.replace("__", "."), value)
    return folder


def backbone_of(folder: Path) -> tuple[Checkpoint, Backbone]:
    checkpoint = Checkpoint.open(folder)
    return checkpoint, MOLMO.backbone(checkpoint, FrameRoute())


def decoder_of(folder: Path) -> Decoder:
    checkpoint, backbone = backbone_of(folder)
    return load_module(lambda: Decoder(backbone.llm.config), checkpoint.tensors, backbone.llm.names)


def vision_of(folder: Path) -> Any:
    checkpoint, backbone = backbone_of(folder)
    return load_module(backbone.vision, checkpoint.tensors, backbone.vision_names)


def normed_behind(folder: Path) -> Path:
    """As Molmo-7B-O: norms behind the parts, normed queries and keys, no biases, spare rows in the vocabulary."""

    def edit(tensors: dict[str, Tensor]) -> None:
        for layer in range(2):
            del tensors[f"{BLOCK}{layer}.att_proj.bias"]
            tensors[f"{BLOCK}{layer}.q_norm.weight"] = 1 + torch.randn(64) * 0.2
            tensors[f"{BLOCK}{layer}.k_norm.weight"] = 1 + torch.randn(32) * 0.2

    rewrite(folder, edit)
    return configured(folder, qkv_bias=False, norm_after=True, attention_layer_norm=True, vocab_size=380)


def without_biases(folder: Path) -> Path:
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("att_proj.bias")])
    return configured(folder, qkv_bias=False)


VARIANTS = {
    "Qwen2ForCausalLM": lambda same: same,
    "Olmo2ForCausalLM": normed_behind,
    "LlamaForCausalLM": without_biases,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_peer_in_transformers_gives_the_same_logits(name: str, folder: Path) -> None:
    VARIANTS[name](folder)
    checkpoint, backbone = backbone_of(folder)
    assert backbone.llm.peer is not None and backbone.llm.peer.name == name
    theirs = PeerDecoder(peer_model(backbone.llm.peer, checkpoint.tensors)).eval()
    embeds, positions = torch.randn(1, 41, 64), torch.arange(41)[None]
    with torch.no_grad():
        difference = (decoder_of(folder)(embeds, positions) - theirs(embeds, positions)).abs().max()
    print(f"{name}: largest difference {difference:.2e}")
    assert difference < 1e-4


def test_norms_behind_the_parts_are_7b_os(folder: Path) -> None:
    decoder = decoder_of(normed_behind(folder))
    assert decoder.config.vocab == 384
    kept: dict[str, Tensor] = {}
    rewrite(folder, kept.update)
    embeds = torch.randn(17, 64)
    with torch.no_grad():
        expected = slow_7b_o(kept, embeds, heads=4, theta=1e6, eps=1e-6)
        difference = (decoder(embeds[None], torch.arange(17)[None])[0] - expected).abs().max()
    print(f"largest difference {difference:.2e}")
    assert difference < 1e-4


def test_a_head_that_is_not_there_is_the_first_table(folder: Path) -> None:
    kept: dict[str, Tensor] = {}
    rewrite(folder, lambda tensors: [kept.update(tensors), tensors.pop(HEAD)])
    with pytest.raises(CheckpointError, match=r"ff_out\.weight is missing"):
        decoder_of(folder)
    assert torch.equal(decoder_of(configured(folder, weight_tying=True)).lm_head.weight, kept[TABLE])


def test_a_head_that_is_there_is_used_whatever_is_said_about_tying(folder: Path) -> None:
    kept: dict[str, Tensor] = {}
    rewrite(folder, kept.update)
    assert torch.equal(decoder_of(configured(folder, tie_word_embeddings=True)).lm_head.weight, kept[HEAD])


def test_rows_of_the_second_table_are_counted_in_the_tensor(folder: Path) -> None:
    name = "model.transformer.wte.new_embedding"
    rewrite(folder, lambda tensors: tensors.update({name: torch.randn(7, 64)}))
    checkpoint, backbone = backbone_of(folder)
    assert backbone.llm.table_rows == 391
    assert backbone.llm.table.read(checkpoint.tensors, (391, 64)).shape == (391, 64)
    configured(folder, additional_vocab_size=128)
    with pytest.raises(CheckpointError, match=r"new_embedding has shape \[7, 64\], expected 128 rows"):
        backbone_of(folder)


def resized(folder: Path, side: int) -> Path:
    """The tower for another square, here with an odd grid."""
    grid = side // 14
    table = {f"{VIT}positional_embedding": torch.randn(grid**2 + 1, 32) * 0.2}
    rewrite(folder, lambda tensors: tensors.update(table))
    edit_json(folder / "preprocessor_config.json", "base_image_input_size", [side, side])
    for name in ("image_token_length_h", "image_token_length_w"):
        edit_json(folder / "preprocessor_config.json", name, -(-grid // 2))
    size = {"vision_backbone__image_default_input_size": [side, side], "vision_backbone__image_num_pos": grid**2 + 1}
    return configured(folder, **size)


def slow_pooling(part: dict[str, Tensor], grid: Tensor, heads: int) -> Tensor:
    """(rows, columns, C) -> (tokens, E), window by window and head by head; outside the grid lie zeros."""
    tokens = []
    for top in range(0, grid.shape[0], 2):
        for left in range(0, grid.shape[1], 2):
            window = torch.zeros(2, 2, grid.shape[2]).double()
            found = grid[top : top + 2, left : left + 2]
            window[: found.shape[0], : found.shape[1]] = found
            patches = window.reshape(4, -1)
            query = part["wq.weight"] @ patches.mean(0) + part["wq.bias"]
            keys, values = (patches @ part[f"{name}.weight"].T + part[f"{name}.bias"] for name in ("wk", "wv"))
            split = len(query) // heads
            attended = [
                (keys[:, at : at + split] @ query[at : at + split] / split**0.5).softmax(0) @ values[:, at : at + split]
                for at in range(0, len(query), split)
            ]
            tokens.append(part["wo.weight"] @ torch.cat(attended) + part["wo.bias"])
    return torch.stack(tokens)


@pytest.mark.parametrize("side", [56, 70, 14])
def test_pooling_at_even_and_odd_grids(side: int, folder: Path) -> None:
    vision = vision_of(resized(folder, side))
    _, backbone = backbone_of(folder)
    grid = side // 14
    assert backbone.tokens_per_frame == (-(-grid // 2)) ** 2 and backbone.preprocess.size == (side, side)
    kept: dict[str, Tensor] = {}
    rewrite(folder, kept.update)
    head = "model.vision_backbone."
    pooling = {name.removeprefix(f"{head}image_pooling_2d."): value.double() for name, value in kept.items()}
    projector = {name.removeprefix(f"{head}image_projector."): value.double() for name, value in kept.items()}
    pixel_values, mask = torch.randn(2, 3, side, side), torch.tensor([0, 0.3, 1, -1])[torch.randint(4, (2, grid**2))]
    with torch.no_grad():
        tokens, features = vision(pixel_values, mask), vision.tower(pixel_values).double()
    nothing, partly = kept[f"{head}pad_embed"].double()
    for frame in range(2):
        for patch, share in enumerate(mask[frame].tolist()):
            features[frame, patch] += nothing if share == 0 else partly if share < 1 else 0
        pooled = slow_pooling(pooling, features[frame].unflatten(0, (grid, grid)), heads=4)
        gate, up = (pooled @ projector[f"{name}.weight"].T for name in ("w1", "w3"))
        expected = (gate * gate.sigmoid() * up) @ projector["w2.weight"].T
        difference = float((tokens[frame] - expected).abs().max() / expected.abs().max())
        print(f"grid {grid}: largest difference {difference:.2e} of the largest value")
        assert difference < 1e-5


@pytest.mark.parametrize(
    ("layers", "used", "blocks"), [([-2, -9], (8, 1), 9), ([-1], (9,), 10), ([0, 3, -10], (0, 3, 0), 4)]
)
def test_blocks_are_joined_in_their_order_and_later_ones_do_not_exist(
    layers: list[int], used: tuple[int, ...], blocks: int, folder: Path
) -> None:
    wide = 32 * len(layers)
    pooling = {f"model.vision_backbone.image_pooling_2d.w{part}.weight": torch.randn(32, wide) for part in "qkv"}
    table = {"model.vision_backbone.pad_embed": torch.randn(2, wide)}
    rewrite(folder, lambda tensors: tensors.update({**pooling, **table}))
    vision = vision_of(configured(folder, vit_layers=layers))
    assert len(vision.tower.blocks) == blocks
    pixel_values, outputs = torch.randn(2, 3, 84, 84), []
    with torch.no_grad():
        states = vision.tower.embeddings(pixel_values)
        for block in vision.tower.blocks:
            states = block(states)
            outputs.append(states[:, 1:])
        expected = torch.cat([outputs[layer] for layer in used], dim=-1)
        torch.testing.assert_close(vision.tower(pixel_values), expected)
        assert vision(pixel_values, torch.ones(2, 36)).shape == (2, 9, 64)


def test_a_configuration_without_vision_fields_has_the_published_constants(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    _, backbone = backbone_of(configured(folder, vision_backbone=ABSENT, vit_layers=ABSENT))
    with torch.device("meta"):
        vision: Any = backbone.vision()
    shapes = {name: tuple(parameter.shape) for name, parameter in vision.named_parameters()}
    assert shapes["tower.embeddings.positional_embedding"] == (577, 1024)
    assert shapes["tower.embeddings.patch_embedding.weight"] == (1024, 3, 14, 14)
    assert shapes["tower.blocks.21.mlp.fc1.weight"] == (4096, 1024)
    assert shapes["connector.image_pooling_2d.wq.weight"] == (1024, 2048)
    assert len(vision.tower.blocks) == 22 and vision.tower.config.layers == (21, 14)
    assert backbone.tokens_per_frame == 144
    spec = backbone.preprocess
    assert (spec.size, spec.mean, spec.std, spec.mask_patch) == ((336, 336), CLIP_MEAN, CLIP_STD, 14)
    assert (spec.fit, spec.resample) == ("letterbox", "bilinear")
    assert VISION["image_num_layers"] == 23


def test_queries_keys_and_gates_are_cut_from_the_packed_tensors(folder: Path) -> None:
    kept: dict[str, Tensor] = {}
    rewrite(folder, kept.update)
    layer: Any = decoder_of(folder).model.layers[1]
    packed, fused = kept[f"{BLOCK}1.att_proj.weight"], kept[f"{BLOCK}1.ff_proj.weight"]
    assert torch.equal(layer.self_attn.k_proj.weight, packed[64:96])
    assert torch.equal(layer.self_attn.v_proj.bias, kept[f"{BLOCK}1.att_proj.bias"][96:])
    assert torch.equal(layer.mlp.up_proj.weight, fused[:96])
    assert torch.equal(layer.mlp.gate_proj.weight, fused[96:])


def test_a_first_token_of_its_own_begins_the_prompt(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", "bos_token", {"content": "<s>"})
    edit_json(folder / "tokenizer_config.json", "eos_token", ABSENT)
    _, backbone = backbone_of(folder)
    assert backbone.prompt.layouts["video"].template.startswith("<s>")
    assert backbone.prompt.end_token == "<|endoftext|>"  # from special_tokens_map.json
    assert {"<s>", "<|endoftext|>"} <= set(backbone.prompt.reserved)
    edit_json(folder / "special_tokens_map.json", "eos_token", ABSENT)
    assert "eos_token" in refusal(folder)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint, backbone = backbone_of(folder)
        load_module(backbone.vision, checkpoint.tensors, backbone.vision_names)
        load_module(lambda: Decoder(backbone.llm.config), checkpoint.tensors, backbone.llm.names)
        backbone.llm.table.read(checkpoint.tensors, (backbone.llm.table_rows, backbone.llm.config.width))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600, message
    return message


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("architectures", ["OLMoForCausalLM"], "MolmoE"),
        ("d_model", 2048, "MolmoE"),
        ("moe_num_experts", 64, "MolmoE"),
        ("architectures", ["Molmo2ForConditionalGeneration"], "MolmoForCausalLM"),
        ("architectures", ABSENT, "architectures"),
        ("layer_norm_type", "default", "layer_norm_type"),
        ("rope_impl", "interleave", "rope_impl"),
        ("alibi", True, "alibi"),
        ("clip_qkv", 8.0, "clip_qkv"),
        ("rope_scaling", {"factor": 2.0}, "rope_scaling"),
        ("final_logit_softcapping", 30.0, "final_logit_softcapping"),
        ("scale_logits", True, "scale_logits"),
        ("normalize_input_embeds", True, "normalize_input_embeds"),
        ("multi_query_attention", True, "multi_query_attention"),
        ("activation_type", "gelu", "activation_type"),
        ("image_pooling_2d", "attention-v2", "image_pooling_2d"),
        ("image_projector", "linear", "image_projector"),
        ("image_padding_embed", "regress", "image_padding_embed"),
        ("use_cls_feature", True, "use_cls_feature"),
        ("qkv_bias", False, "qkv_bias"),
        ("qkv_bias", ABSENT, "att_proj.bias"),
        ("qkv_bias", 1, "qkv_bias"),
        ("attention_layer_norm", True, "q_norm.weight is missing"),
        ("hidden_size", ABSENT, "hidden_size"),
        ("hidden_size", 66, "hidden_size"),
        ("hidden_size", "64", "hidden_size"),
        ("num_hidden_layers", 3, "blocks.2"),
        ("num_attention_heads", 64, "even"),
        ("num_key_value_heads", 3, "num_key_value_heads"),
        ("intermediate_size", 191, "intermediate_size"),
        ("intermediate_size", 96, "image_projector.w1"),
        ("rope_theta", ABSENT, "rope_theta"),
        ("layer_norm_eps", None, "layer_norm_eps"),
        ("max_position_embeddings", 10, "max_position_embeddings"),
        ("vocab_size", 385, "embedding_size"),
        ("embedding_size", 512, "ff_out.weight"),
        ("vision_backbone", [], "vision_backbone"),
        ("vision_backbone.image_emb_dim", None, "image_emb_dim"),
        ("vision_backbone.image_emb_dim", 64, "image_emb_dim"),
        ("vision_backbone.image_num_heads", 3, "image_num_key_value_heads"),
        ("vision_backbone.image_num_key_value_heads", 2, "image_num_key_value_heads"),
        ("vision_backbone.image_head_dim", 16, "image_head_dim"),
        ("vision_backbone.image_model_type", "siglip", "image_model_type"),
        ("vision_backbone.resize_mode", "metaclip", "resize_mode"),
        ("vision_backbone.image_mlp_activations", "relu", "image_mlp_activations"),
        ("vision_backbone.image_patch_size", 13, "image_patch_size"),
        ("vision_backbone.image_patch_size", 12, "image_num_pos"),
        ("vision_backbone.image_default_input_size", [84, 98], "image_default_input_size"),
        ("vision_backbone.image_default_input_size", [84.0, 84.0], "image_default_input_size"),
        ("vision_backbone.image_num_pos", 577, "image_num_pos"),
        ("vision_backbone.image_num_layers", 8, "vit_layers"),
        ("vision_backbone.image_norm_eps", 0, "image_norm_eps"),
        ("vit_layers", [], "vit_layers"),
        ("vit_layers", [-11], "vit_layers"),
        ("vit_layers", [-2], "pad_embed"),
        ("vit_layers", [True, -2], "vit_layers"),
        ("vit_layers", -2, "vit_layers"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(field: str, value: object, named: str, folder: Path) -> None:
    edit_json(folder / "config.json", field, value)
    assert named in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_image_input_size", [336, 336]),
        ("image_patch_size", 16),
        ("image_token_length_w", 12),
        ("image_mean", [0.5, 0.5, 0.5]),
        ("do_normalize", False),
        ("image_padding_mask", False),
    ],
)
def test_a_preprocessor_of_other_weights_is_refused(field: str, value: object, folder: Path) -> None:
    edit_json(folder / "preprocessor_config.json", field, value)
    message = refusal(folder)
    assert "preprocessor_config.json" in message and field in message


@pytest.mark.parametrize("name", [f"{VIT}patch_embedding.weight", "model.transformer.wte.new_embedding", HEAD])
def test_a_missing_or_misshapen_tensor_is_named(name: str, folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: torch.tensor(1.0)}))
    assert name in refusal(folder)
    rewrite(folder, lambda tensors: tensors.pop(name))
    assert name in refusal(folder)


def test_the_published_file_of_the_mixture_of_experts_is_refused(folder: Path) -> None:
    config = {"model_type": "molmo", "architectures": ["OLMoForCausalLM"], "block_type": "moe", "n_heads": 16}
    (folder / "config.json").write_text(json.dumps(config))
    assert MOLMO.recognises(config)
    assert "MolmoE" in refusal(folder) and "not supported" in refusal(folder)
