"""InternViT, connector and decoder in PyTorch are the original code's, number for number."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from export.checkpoint import Checkpoint
from export.connector.pixel_shuffle import pixel_shuffle
from export.decoder import Decoder, DecoderConfig, KVCache
from export.families import backbone_from_checkpoint
from export.load import load_module
from export.rotary import RotaryConfig
from export.vision.internvit import InternViT, InternViTConfig
from tests.conftest import GOLDEN, Recorded

Load = Callable[[str], Recorded]

NAMES = ["internvl2-qwen2-a", "linvt-internvl2-a"]


def largest(found: torch.Tensor, expected: np.ndarray) -> float:  # type: ignore[type-arg]
    difference = float(np.abs(found.detach().numpy() - expected).max())
    print(f"largest difference {difference:.2e}")
    return difference


def vision_of(name: str) -> torch.nn.Module:
    checkpoint = Checkpoint.open(GOLDEN / name)
    backbone = backbone_from_checkpoint(checkpoint)
    return load_module(backbone.vision, checkpoint.tensors, backbone.vision_names)


def decoder_of(name: str) -> Decoder:
    checkpoint = Checkpoint.open(GOLDEN / name)
    backbone = backbone_from_checkpoint(checkpoint)
    return load_module(lambda: Decoder(backbone.llm.config), checkpoint.tensors, backbone.llm.names)


@pytest.mark.parametrize("name", NAMES)
def test_vision_reproduces_every_recorded_stage(name: str, recorded: Load) -> None:
    arrays, vision = recorded(name), vision_of(name)
    pixel_values = torch.tensor(arrays["pixel_values"])
    with torch.no_grad():
        tower = vision.tower
        embedded = tower.embeddings(pixel_values)
        assert largest(embedded, arrays["vision_embeddings"]) < 1e-4
        assert largest(tower.encoder.layers[0](embedded), arrays["vision_layer0"]) < 1e-4
        classes = tower.encoder(embedded)[:, 0]
        assert largest(classes, arrays["vision_cls"]) < 1e-4
        features = tower(pixel_values)
        assert largest(features, arrays["vision_features"]) < 1e-4
        assert largest(pixel_shuffle(features, 2), arrays["pixel_shuffled"]) < 1e-4
        assert largest(vision(pixel_values), arrays["visual_tokens"]) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_decoder_reproduces_every_recorded_stage(name: str, recorded: Load) -> None:
    arrays, decoder = recorded(name), decoder_of(name)
    embeds = torch.tensor(arrays["inputs_embeds"])
    positions = torch.arange(embeds.shape[1])[None]
    with torch.no_grad():
        mask = torch.ones(embeds.shape[1], embeds.shape[1], dtype=torch.bool).tril()[None, None]
        first, _, _ = decoder.model.layers[0](embeds, decoder.angles(positions), mask, None)
        assert largest(first, arrays["llm_layer0_out"]) < 1e-4
        last, _ = decoder.run(embeds, positions, mask)
        assert largest(last, arrays["llm_last_layer_out"]) < 1e-4
        assert largest(decoder.model.norm(last), arrays["llm_final_norm"]) < 1e-4
        assert largest(decoder(embeds, positions), arrays["logits"]) < 1e-4


@pytest.mark.parametrize(("heads", "heads_kv"), [(4, 2), (6, 1), (3, 3)])
def test_decoder_is_the_qwen2_of_transformers(heads: int, heads_kv: int) -> None:
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=heads * 8,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=heads_kv,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    theirs = Qwen2ForCausalLM(config).eval()
    ours = Decoder(DecoderConfig(97, heads * 8, 3, heads, heads_kv, 8, 40, RotaryConfig(5000.0, 8), 64)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        state = theirs.state_dict()
        del state["model.embed_tokens.weight"]
        ours.load_state_dict(state)
        embeds, positions = torch.randn(1, 23, heads * 8), torch.arange(23)[None]
        expected = theirs(inputs_embeds=embeds, position_ids=positions).logits
        assert largest(ours(embeds, positions), expected.numpy()) < 1e-4


def test_a_step_over_the_cache_is_the_whole_sequence(recorded: Load) -> None:
    arrays, decoder = recorded("linvt-internvl2-a"), decoder_of("linvt-internvl2-a")
    embeds = torch.tensor(arrays["inputs_embeds"])
    config = decoder.config
    shape = (1, config.heads_kv, 160, config.head_dim)
    past = [torch.randn(shape) for _ in range(2 * config.layers)]  # what stands there before must not matter
    at = 0
    with torch.no_grad():
        for rows in (100, 1, 1, 30, 14):
            positions = torch.arange(at, at + rows)[None]
            index = torch.tensor([at])
            caches = [KVCache(key, value, index) for key, value in zip(past[::2], past[1::2], strict=True)]
            logits, past = decoder.step(embeds[:, at : at + rows], positions, caches)
            at += rows
            assert largest(logits, arrays["logits"][:, at - 1]) < 1e-4


def test_padded_rows_do_not_count() -> None:
    decoder = Decoder(DecoderConfig(31, 16, 2, 2, 1, 8, 24, RotaryConfig(1e4, 8), 64)).eval()
    embeds, positions = torch.randn(2, 9, 16), torch.arange(9).expand(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    with torch.no_grad():
        padded = decoder(embeds, positions, mask)
        alone = decoder(embeds[1:, :6], positions[1:, :6])
    torch.testing.assert_close(padded[1:, :6], alone, atol=1e-5, rtol=1e-5)


def test_an_earlier_layer_can_be_selected_and_later_blocks_do_not_exist() -> None:
    config = {"width": 8, "heads": 2, "layers": 3, "mlp_width": 16, "patch_size": 4, "image_size": 16}
    whole, part = InternViT(InternViTConfig(**config)), InternViT(InternViTConfig(**config, select_layer=-2))
    part.load_state_dict({name: whole.state_dict()[name] for name in part.state_dict()})
    pixel_values = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        states = whole.embeddings(pixel_values)
        for block in whole.encoder.layers[:2]:
            states = block(states)
        torch.testing.assert_close(part(pixel_values), states[:, 1:])


def test_positions_stretch_to_another_grid() -> None:
    tower = InternViT(InternViTConfig(width=8, heads=2, layers=1, mlp_width=16, patch_size=4, image_size=16)).eval()
    with torch.no_grad():
        assert tower(torch.randn(1, 3, 24, 24)).shape == (1, 36, 8)
        torch.testing.assert_close(tower.embeddings.positions(4, 4), tower.embeddings.position_embedding)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_pixel_shuffle_joins_blocks_row_by_row(version: str) -> None:
    grid = torch.arange(16.0)[None, :, None]  # a 4 x 4 grid of one channel
    joined = pixel_shuffle(grid, 2, version)[0]
    expected = torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]], dtype=torch.float32)
    assert torch.equal(joined, expected if version == "v2" else expected[[0, 2, 1, 3]])
