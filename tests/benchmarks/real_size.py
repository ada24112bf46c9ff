"""Random checkpoints of real sizes: the layout of a golden fixture with the numbers of the published model.

``python -m tests.benchmarks.real_size MODEL OUT`` writes OUT/checkpoint in shards and, where it has one,
OUT/linvt, a LinVT of the released sizes. The names and shapes of the tensors are those the export asks for, and their
total is checked against the published one; nothing is copied from a published file but sizes. The tokenizers stay the
fixtures' own.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer

import export.load
from export.checkpoint import Checkpoint, TensorFiles
from export.decoder import Decoder
from export.families import Backbone, backbone_from_checkpoint
from export.families.base import FrameRoute
from export.linvt import LinVT, released

GOLDEN = Path(__file__).parents[1] / "golden"
SHARD = 2 * 10**9  # bytes
SPREAD = 0.02  # standard deviation of every weight
Shape = tuple[int, ...]


@dataclass(frozen=True)
class RealSize:
    """One model.

    Attributes:
        fixture: whose files are taken.
        edits: JSON file -> dotted field -> value, or ABSENT.
        parameters: how many the export reads: the published total without what no family uses; 0 where none is known.
        shapes: tensors whose shapes the export looks at before it knows sizes.
        without: folders of the fixture that are not published.
        tokens: the tokenizer is filled up to so many, where an id beyond the fixture's has to be reached.
        cut: what is smaller than published.
        linvt: a LinVT is exported with it.
        dtype: its weights are stored in.
        pickled: they are one file of ``torch.save``.
    """

    fixture: str
    edits: dict[str, dict[str, Any]]
    parameters: int = 0
    shapes: dict[str, Shape] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    tokens: int = 0
    cut: str = ""
    linvt: bool = False
    dtype: torch.dtype = torch.bfloat16
    pickled: bool = False


ABSENT = object()
INTERNVIT = {
    "force_image_size": 448,
    "vision_config.hidden_size": 1024,
    "vision_config.intermediate_size": 4096,
    "vision_config.num_attention_heads": 16,
    "vision_config.num_hidden_layers": 24,
    "vision_config.image_size": 448,
}


def llm(path: str, vocab: int, width: int, mlp_width: int, layers: int, heads: int, heads_kv: int) -> dict[str, int]:
    """The usual fields of an LLM below ``path``."""
    return {
        f"{path}vocab_size": vocab,
        f"{path}hidden_size": width,
        f"{path}intermediate_size": mlp_width,
        f"{path}num_hidden_layers": layers,
        f"{path}num_attention_heads": heads,
        f"{path}num_key_value_heads": heads_kv,
    }


INTERNVL2_1B = RealSize(
    "internvl2-qwen2-a",
    {"config.json": {**INTERNVIT, **llm("llm_config.", 151655, 896, 4864, 24, 14, 2)}},
    parameters=938_158_976,
)
INTERNVL2_2B = RealSize(
    "internvl2-internlm2-a",
    {"config.json": {**INTERNVIT, **llm("llm_config.", 92553, 2048, 8192, 24, 16, 8)}},
    parameters=2_205_754_368,
)
INTERNVL2_4B = RealSize(
    "internvl2-phi3-a",
    {
        "config.json": {
            **INTERNVIT,
            **llm("llm_config.", 32020, 3072, 8192, 32, 32, 32),
            "llm_config.rope_scaling.short_factor": [1 + index / 48 for index in range(48)],
            "llm_config.rope_scaling.long_factor": [1.0 + index for index in range(48)],
        }
    },
    parameters=4_146_855_936,
)
QWEN2VL_2B = RealSize(
    "qwen2vl-a",
    {
        "config.json": {
            **llm("", 151936, 1536, 8960, 28, 12, 2),
            "rope_scaling.mrope_section": [16, 24, 24],
            "vision_config.depth": 32,
            "vision_config.embed_dim": 1280,
            "vision_config.num_heads": 16,
            "vision_config.hidden_size": 1536,
        }
    },
    parameters=2_208_985_600,
)
AQUILA_VL_2B = RealSize(
    "aquila-a",
    {
        "config.json": {
            **llm("", 151936, 1536, 8960, 28, 12, 2),
            "mm_vision_tower": "google/siglip-so400m-patch14-384",
            "mm_hidden_size": 1152,
        }
    },
    shapes={"model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight": (729, 1152)},
    without=("siglip-tiny-patch14",),
)
MOLMO_7B_D = RealSize(
    "molmo-a",
    {
        "config.json": {
            **llm("", 152064, 3584, 2 * 18944, 28, 28, 4),
            "embedding_size": 152064,
            "vision_backbone": ABSENT,
            "vit_layers": ABSENT,
        },
        "preprocessor_config.json": {
            "base_image_input_size": [336, 336],
            "image_token_length_h": 12,
            "image_token_length_w": 12,
            "max_crops": 12,
            "overlap_margins": [4, 4],
        },
    },
    parameters=8_021_025_280 - 12_596_224,  # the last block of the tower
    shapes={"model.transformer.wte.new_embedding": (128, 3584)},
)
XGEN_MM = RealSize(
    "xgenmm-a",
    {
        "config.json": {
            "text_config": {"initial_tokenizer_len": 32012, "model_type": "phi3", "sliding_window": 2047},
            "vision_encoder_config.model_name": ABSENT,
            "vision_tokenizer_config": {"model_type": "xgenmm_vision_tokenizer"},
        },
        "preprocessor_config.json": {"size": [384, 384]},
    },
    parameters=17_437_028_876 // 4 - 15_238_352,  # bytes of float32; the tower's pooling head
    shapes={
        "vlm.vision_tokenizer.latents": (128, 1152),
        "vlm.vision_tokenizer.layers.0.0.to_q.weight": (1536, 1152),
        "vlm.vision_tokenizer.layers.0.1.1.weight": (4608, 1152),
        "vlm.vision_tokenizer.layers.5.1.1.weight": (4608, 1152),
        "vlm.lang_model.model.embed_tokens.weight": (32064, 3072),
        "vlm.lang_model.model.embed_tokens.additional_embedding.weight": (3, 3072),
        "vlm.lang_model.model.layers.0.mlp.gate_up_proj.weight": (16384, 3072),
        **{f"vlm.lang_model.model.layers.{layer}.input_layernorm.weight": (3072,) for layer in range(32)},
    },
    without=("siglip-tiny",),
    tokens=32012,
)
TOWER, PROJECTOR = "vision_config.vision_tower.", "vision_config.mm_projector."
MIPHA_3B = RealSize(
    "mipha-a",
    {
        "config.json": {
            **llm("", 51200, 2560, 10240, 32, 32, 32),
            f"{TOWER}hidden_size": 1152,
            f"{TOWER}image_size": 384,
            f"{TOWER}intermediate_size": 4304,
            f"{TOWER}num_attention_heads": 16,
            f"{TOWER}num_hidden_layers": 27,
            f"{PROJECTOR}hidden_size": 2560,
            f"{PROJECTOR}mm_hidden_size": 1152,
        },
        "preprocessor_config.json": {"size": {"height": 384, "width": 384}},
    },
    parameters=3_217_417_280 - 30_480_160,  # the tower's last layer, final norm and pooling head
)
MOLMO_CUT = {"config.json": {**MOLMO_7B_D.edits["config.json"], "num_hidden_layers": 12}}
MODELS = {
    "internvl2-1b": INTERNVL2_1B,
    "internvl2-1b-float32": replace(INTERNVL2_1B, dtype=torch.float32),
    "internvl2-1b-pickled": replace(INTERNVL2_1B, pickled=True),
    "linvt-internvl2-1b": replace(INTERNVL2_1B, linvt=True),
    "internvl2-2b": INTERNVL2_2B,
    "internvl2-4b": INTERNVL2_4B,
    "qwen2-vl-2b": QWEN2VL_2B,
    "aquila-vl-2b": AQUILA_VL_2B,
    "molmo-7b-d": MOLMO_7B_D,
    "molmo-7b-d-cut": replace(
        MOLMO_7B_D, edits={**MOLMO_7B_D.edits, **MOLMO_CUT}, parameters=0, cut="12 of 28 LLM layers"
    ),
    "xgen-mm-phi3-mini": XGEN_MM,
    "mipha-3b": MIPHA_3B,
}


def main(arguments: list[str]) -> int:
    """Write one; prints the bytes of its weights."""
    name, folder = arguments
    print(write(MODELS[name], Path(folder)))
    return 0


def write(model: RealSize, folder: Path) -> int:
    """Write the checkpoint and, where there is one, its LinVT; returns the bytes of the weights."""
    target = folder / "checkpoint"
    left = shutil.ignore_patterns("*.npz", "*.safetensors", "*.md", *model.without)
    shutil.copytree(GOLDEN / model.fixture, target, ignore=left)
    for file, edits in model.edits.items():
        edit(target / file, edits)
    if model.tokens:
        fill(target / "tokenizer.json", model.tokens)
    width, asked = needed(model, target)
    linvt = write_linvt(width, folder / "linvt") if model.linvt else 0
    return linvt + save(asked, target, dtype=model.dtype, pickled=model.pickled)


def write_linvt(width: int, target: Path) -> int:
    """Write a LinVT as the released code would for an LLM of this width: 8 layers, 4 heads, top_k 1024."""
    with torch.device("meta"):
        parameters = dict(LinVT(released(width)).named_parameters())
    target.mkdir()
    return save({name: tuple(parameter.shape) for name, parameter in parameters.items()}, target)


def save(
    asked: Mapping[str, Shape], target: Path, *, dtype: torch.dtype = torch.bfloat16, pickled: bool = False
) -> int:
    """Write random tensors in shards, or pickled in one file; returns their bytes."""
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    count = size = total = 0
    for name, shape in asked.items():
        tensor = torch.empty(shape, dtype=dtype).normal_(0, SPREAD, generator=generator)
        if len(shape) == 1 and re.search(r"(weight|\.ls\d)$", name):  # of a norm, or a layer scale
            tensor += 1
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
        if size > SHARD and not pickled:
            save_file(shard, target / f"model-{count:05}.safetensors")
            shard, size, count = {}, 0, count + 1
    if pickled:
        torch.save(shard, target / "pytorch_model.bin")
    elif shard:
        save_file(shard, target / f"model-{count:05}.safetensors")
    return total


def edit(path: Path, edits: dict[str, Any]) -> None:
    """Set or remove dotted fields of a JSON file."""
    content = json.loads(path.read_text("utf-8"))
    for dotted, value in edits.items():
        *parents, last = dotted.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        if value is ABSENT:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(content), "utf-8")


def fill(path: Path, tokens: int) -> None:
    """Add tokens that no text holds until the tokenizer has so many."""
    tokenizer = Tokenizer.from_file(str(path))
    first = tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(f"\x00{index}", normalized=False) for index in range(first, tokens)])
    assert tokenizer.get_vocab_size() == tokens
    tokenizer.save(str(path))


class Shapes(TensorFiles):
    """Tensors of which some shapes are known."""

    known: dict[str, Shape]

    def shape(self, name: str) -> Shape:
        """A known shape."""
        return self.known[name]


def needed(model: RealSize, folder: Path) -> tuple[int, dict[str, Shape]]:
    """Width of the model's LLM, and every tensor that an export reads with its shape."""
    tensors = Shapes(dict.fromkeys(model.shapes, folder))
    object.__setattr__(tensors, "known", model.shapes)
    checkpoint = Checkpoint(folder, json.loads((folder / "config.json").read_text("utf-8")), tensors)
    backbone = backbone_from_checkpoint(checkpoint, FrameRoute())
    asked: dict[str, Shape] = {}

    def record(_: TensorFiles, name: str, shape: Shape) -> torch.Tensor:
        asked[name] = shape
        return torch.empty(shape, device="meta")

    with patch.object(export.load, "checked", record):
        read_all(backbone, tensors)
    for name, shape in model.shapes.items():
        assert asked.get(name) == shape, f"{name}: the export reads {asked.get(name)}, the published shape is {shape}"
    total = sum(map(math.prod, asked.values()))
    assert total == (model.parameters or total), f"the export reads {total} parameters, published: {model.parameters}"
    return backbone.llm.config.width, asked


def read_all(backbone: Backbone, tensors: TensorFiles) -> None:
    """Ask for every parameter and for the embedding table."""
    with torch.device("meta"):
        parts = ((backbone.vision(), backbone.vision_names), (Decoder(backbone.llm.config), backbone.llm.names))
    for module, names in parts:
        for name, parameter in module.named_parameters():
            names(name).read(tensors, tuple(parameter.shape))
    backbone.llm.table.read(tensors, (backbone.llm.table_rows, backbone.llm.config.width))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
