"""The SigLIP tower is transformers' own, and its configuration is read strictly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from export.checkpoint import TensorFiles
from export.connector.mlp import MLPConnector, pooled, pooled_side, projector_depth
from export.load import Names, load_module
from export.vision.siglip import SO400M, SigLIP, siglip_config, siglip_names
from runtime.errors import CheckpointError
from tests.llava import largest

SIZES = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "intermediate_size": 40,
    "patch_size": 5,
    "image_size": 28,  # no multiple of the patch
    "layer_norm_eps": 1e-3,
}


def theirs(**changes: object) -> SiglipVisionModel:
    config = SiglipVisionConfig(**(SIZES | changes), attn_implementation="eager", vision_use_head=False)
    model = SiglipVisionModel(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model


def ours(model: SiglipVisionModel, folder: Path, **choices: object) -> SigLIP:
    path = folder / "model.safetensors"
    tensors = {f"tower.{name.removeprefix('vision_model.')}": value for name, value in model.state_dict().items()}
    save_file(tensors, path)
    config = siglip_config(model.config.to_dict(), **choices)  # type: ignore[arg-type]
    return load_module(lambda: SigLIP(config), TensorFiles.scan([path]), Names(siglip_names("", "tower.")))


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu", "quick_gelu"])
def test_the_whole_tower_with_its_last_norm_is_transformers_own(tmp_path: Path, activation: str) -> None:
    model = theirs(hidden_act=activation)
    pixel_values = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = model(pixel_values).last_hidden_state
        found = ours(model, tmp_path, post_norm=True)(pixel_values)
    assert found.shape == (2, 25, 24)
    assert largest(found, expected) < 1e-4


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_an_earlier_layer_is_what_stands_before_the_norm(tmp_path: Path, left_out: int) -> None:
    model = theirs()
    pixel_values = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        states = model(pixel_values, output_hidden_states=True).hidden_states
        tower = ours(model, tmp_path, left_out=left_out)
        assert len(tower.encoder.layers) == 3 - left_out
        assert largest(tower.embeddings(pixel_values), states[0]) < 1e-5
        assert largest(tower(pixel_values), states[3 - left_out]) < 1e-4


def test_rows_and_columns_beyond_the_last_patch_do_not_count(tmp_path: Path) -> None:
    tower, pixel_values = ours(theirs(), tmp_path), torch.randn(1, 3, 28, 28)
    changed = pixel_values.clone()
    changed[:, :, 25:] += 1
    changed[:, :, :, 25:] += 1
    with torch.no_grad():
        assert torch.equal(tower(changed), tower(pixel_values))
        changed[:, :, 24, 24] += 1
        assert not torch.equal(tower(changed), tower(pixel_values))


def test_absent_sizes_are_those_of_so400m() -> None:
    assert siglip_config({}) == SO400M
    assert (SO400M.grid, SO400M.patches) == (27, 729)
    nested = {"vision_config": {"hidden_size": 32, "num_attention_heads": None}}
    found = siglip_config(nested, "vision_config.", left_out=1)
    assert (found.width, found.heads, found.layers) == (32, 16, 26)


@pytest.mark.parametrize("name", [*SIZES, "hidden_act"])
def test_absent_sizes_can_be_refused(name: str) -> None:
    config = SIZES | {"hidden_act": "gelu"}
    siglip_config(config, usual=None)
    with pytest.raises(CheckpointError, match=f"field {name} is None"):
        siglip_config({key: value for key, value in config.items() if key != name}, usual=None)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("hidden_size", "32", "hidden_size is '32', expected int"),
        ("hidden_size", 25, "hidden_size is 25, expected a multiple of num_attention_heads, which is 3"),
        ("num_attention_heads", 0, "num_attention_heads is 0"),
        ("num_hidden_layers", 1, "num_hidden_layers is 1, expected more than 1"),
        ("num_hidden_layers", True, "num_hidden_layers"),
        ("num_hidden_layers", 10**6, "expected 1 to 1024"),
        ("image_size", 4, "image_size is 4, expected at least patch_size, which is 5"),
        ("image_size", 10**5, "expected 1 to 4096"),
        ("layer_norm_eps", 0, "layer_norm_eps is 0"),
        ("hidden_act", "relu", "supported: 'gelu_pytorch_tanh'"),
        ("num_channels", 1, "num_channels is 1; supported: 3"),
    ],
)
def test_a_field_that_does_not_fit_is_refused_by_name(name: str, value: object, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        siglip_config(SIZES | {name: value}, left_out=1)


@pytest.mark.parametrize(("kind", "depth"), [("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)])
def test_a_connector_has_as_many_layers_as_its_type_says(kind: str, depth: int) -> None:
    assert projector_depth({"type": kind}, "type") == depth
    linears = [name for name, _ in MLPConnector(4, 6, depth=depth).named_parameters() if name.endswith("weight")]
    assert linears == [f"{2 * layer}.weight" for layer in range(depth)]


@pytest.mark.parametrize("kind", ["linear", "identity", "pooler", "mlp2x_res2x_gelu", "mlp0x_gelu", "mlp99x_gelu", 2])
def test_another_connector_is_refused_by_name(kind: object) -> None:
    with pytest.raises(CheckpointError, match="field type is"):
        projector_depth({"type": kind}, "type")


def test_pooling_means_squares_of_an_even_grid_and_keeps_the_rest_of_an_odd_one() -> None:
    tokens = torch.randn(2, 36, 5)
    squares = tokens.reshape(2, 3, 2, 3, 2, 5)
    for mode in ("bilinear", "average"):
        torch.testing.assert_close(pooled(tokens, mode), squares.mean((2, 4)).reshape(2, 9, 5))  # type: ignore[arg-type]
    torch.testing.assert_close(pooled(tokens, "max"), squares.amax((2, 4)).reshape(2, 9, 5))
    odd = torch.randn(1, 49, 5)
    assert pooled(odd, "bilinear").shape == (1, 16, 5) and pooled_side(27, "bilinear") == 14
    assert pooled(odd, "average").shape == (1, 9, 5) and pooled_side(27, "average") == 13
