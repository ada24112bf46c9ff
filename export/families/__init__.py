"""The families of backbones, one file each."""

from __future__ import annotations

import torch

from export.checkpoint import Checkpoint
from export.families.aquila import AQUILA
from export.families.base import Backbone, Family, FrameRoute
from export.families.internvl2 import INTERNVL2
from export.families.mipha import MIPHA
from export.families.molmo import MOLMO
from export.families.qwen2vl import QWEN2VL
from export.families.xgenmm import XGENMM
from export.fields import shortened
from runtime.errors import CheckpointError

__all__ = ["FAMILIES", "Backbone", "backbone_from_checkpoint"]

FAMILIES: tuple[Family, ...] = (INTERNVL2, QWEN2VL, AQUILA, MOLMO, XGENMM, MIPHA)


def backbone_from_checkpoint(checkpoint: Checkpoint, route: FrameRoute | None = None) -> Backbone:
    """Find the family that recognises ``config.json`` and read its facts.

    Raises:
        CheckpointError: no family does; the message lists the known ones.
        OptionError: the family has no choice of ``route``.
    """
    if quantised := checkpoint.config.get("quantization_config"):
        raise CheckpointError(
            f"{checkpoint.folder}: config.json has quantization_config {shortened(quantised)}; quantised checkpoints "
            "cannot be exported, give the original one"
        )
    for family in FAMILIES:
        if family.recognises(checkpoint.config):
            backbone = family.backbone(checkpoint, route or FrameRoute())
            refuse_more_layers(checkpoint, backbone)
            return backbone
    found = checkpoint.config.get("model_type")
    raise CheckpointError(
        f"{checkpoint.folder}: config.json is of the unknown family {shortened(found)} (model_type); "
        f"known: {', '.join(family.name for family in FAMILIES)}"
    )


def refuse_more_layers(checkpoint: Checkpoint, backbone: Backbone) -> None:
    """An LLM or a tower of which config.json names a part only would answer, and answer wrongly."""
    llm, blocks = backbone.llm, backbone.tower_blocks
    with torch.device("meta"):
        parameters = [name for name, _ in backbone.vision().named_parameters()]
    first = next(name for name in parameters if name.endswith(".0.norm1.weight"))
    (block, *_) = backbone.vision_names(first).names
    (layer, *_) = llm.names(f"model.layers.{llm.config.layers}.input_layernorm.weight").names
    for part, count, name in (
        ("LLM", llm.config.layers, layer),
        ("tower", blocks, block.replace(".0.", f".{blocks}.")),
    ):
        if name in checkpoint.tensors.files:
            raise CheckpointError(
                f"tensor {name} is of a layer that config.json, which gives the {part} {count} layers, does not know; "
                "the configuration belongs to other weights"
            )
