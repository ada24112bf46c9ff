"""The families of backbones, one file each."""

from __future__ import annotations

from export.checkpoint import Checkpoint
from export.families.base import Backbone, Family, shortened
from export.families.internvl2 import INTERNVL2
from runtime.errors import CheckpointError

__all__ = ["FAMILIES", "Backbone", "backbone_from_checkpoint"]

FAMILIES: tuple[Family, ...] = (INTERNVL2,)


def backbone_from_checkpoint(checkpoint: Checkpoint) -> Backbone:
    """Find the family that recognises ``config.json`` and read its facts.

    Raises:
        CheckpointError: no family does; the message lists the known ones.
    """
    for family in FAMILIES:
        if family.recognises(checkpoint.config):
            return family.backbone(checkpoint)
    found = checkpoint.config.get("model_type")
    raise CheckpointError(
        f"{checkpoint.folder}: config.json is of the unknown family {shortened(found)} (model_type); "
        f"known: {', '.join(family.name for family in FAMILIES)}"
    )
