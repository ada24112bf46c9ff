"""A checkpoint that is nearly one of the families' is refused in one line that names the tensor or the field."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoints import ABSENT, copied, edit_json, refusal, rewrite
from tests.conftest import GOLDEN

NAMES = [
    *("internvl2-qwen2-a", "internvl2-internlm2-a", "internvl2-phi3-a"),
    *("qwen2vl-a", "aquila-a", "molmo-a", "xgenmm-a", "mipha-a"),
]
WIDTH = "hidden_size"


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """A golden fixture."""
    found: str = request.param
    return found


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return copied(GOLDEN / name, tmp_path / "checkpoint")


def tensors_of(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as reader:
        return sorted(reader.keys())


def used(folder: Path) -> list[str]:
    """Tensors of the last LLM layer, of the tower's first block and of what lies between them."""
    names = tensors_of(folder)
    last = max(
        int(part) for n in names if "vision" not in n and "visual" not in n for part in n.split(".") if part.isdigit()
    )
    llm = [n for n in names if f".{last}." in n and "vis" not in n and "tower" not in n]
    first = [n for n in names if ".0." in n and ("vis" in n or "tower" in n)]
    return [llm[0], llm[-1], first[0], first[-1]]


def test_a_missing_tensor_is_named(folder: Path) -> None:
    for name in used(folder):
        damaged = copied(folder, folder.parent / name)
        rewrite(damaged, lambda tensors, name=name: tensors.pop(name))  # type: ignore[misc]
        assert name in refusal(damaged, "none"), name


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    for name in used(folder):
        damaged = copied(folder, folder.parent / name)
        rewrite(damaged, lambda tensors, name=name: tensors.update({name: torch.zeros(3, 5, 7)}))  # type: ignore[misc]
        message = refusal(damaged, "none")
        assert name in message and "[3, 5, 7]" in message, message


@pytest.mark.parametrize("value", [ABSENT, None, 5, ["x"], "llama", "qwen3_vl", "molmo2"])
def test_an_unknown_family_is_refused_with_the_known_ones(folder: Path, value: object) -> None:
    edit_json(folder / "config.json", "model_type", value)
    edit_json(folder / "config.json", "architectures", ["SomethingElse"])
    message = refusal(folder, "none")
    assert "model_type" in message
    for family in ("internvl2", "qwen2vl", "aquila", "molmo", "xgenmm", "mipha"):
        assert family in message


LAYERS = {
    "internvl2-qwen2-a": ("config.json", "vision_config.num_hidden_layers", 1),
    "qwen2vl-a": ("config.json", "vision_config.depth", 2),
    "aquila-a": ("siglip-tiny-patch14/config.json", "vision_config.num_hidden_layers", 2),
    "molmo-a": ("config.json", "vision_backbone.image_num_layers", 9),
    "xgenmm-a": ("siglip-tiny/config.json", "vision_config.num_hidden_layers", 1),
    "mipha-a": ("config.json", "vision_config.vision_tower.num_hidden_layers", 2),
}


@pytest.mark.parametrize("name", list(LAYERS), indirect=True)
def test_a_config_that_knows_a_part_of_the_tower_only_is_refused(folder: Path, name: str) -> None:
    file, field, fewer = LAYERS[name]
    edit_json(folder / file, field, fewer)
    message = refusal(folder, "none")
    assert f"gives the tower {fewer - (name == 'aquila-a')} layers" in message and "tensor " in message


@pytest.mark.parametrize("name", ["qwen2vl-a", "aquila-a", "molmo-a", "mipha-a"], indirect=True)
def test_a_config_that_knows_a_part_of_the_llm_only_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", "num_hidden_layers", 1)
    assert "gives the LLM 1 layers" in refusal(folder, "none")


def test_a_quantised_checkpoint_is_refused_by_its_field(folder: Path) -> None:
    edit_json(folder / "config.json", "quantization_config", {"quant_method": "awq"})
    assert "quantization_config" in refusal(folder, "none")


def test_without_linvt_weights_the_export_says_what_to_give(folder: Path) -> None:
    message = refusal(folder)
    assert "--linvt WEIGHTS" in message and "--linvt none" in message


def test_linvt_weights_of_another_width_are_refused(folder: Path, tmp_path: Path) -> None:
    from tests.families import random_linvt

    message = refusal(folder, str(random_linvt(tmp_path / "linvt.safetensors", 36)))
    assert "query_tokens" in message and "another LLM" in message


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("aquila-a", "mipha-a")], indirect=True)
def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    """Aquila's and Mipha's are plain: their code adds what the prompt needs, whatever the tokenizer."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((GOLDEN / "mipha-a" / file).read_bytes())
    assert "token" in refusal(folder, "none")
