"""Reading the BLIP-3 checkpoint as the export does, and rendering its prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.checkpoint import Checkpoint
from export.families.base import Backbone, FrameRoute
from export.families.xgenmm import XGENMM
from runtime.template import compiled, rendered
from tests.conftest import GOLDEN

NAME = "xgenmm-a"
FOLDER = GOLDEN / NAME
LIMIT = 1e-4


def read(folder: Path) -> Backbone:
    return XGENMM.backbone(Checkpoint.open(folder), FrameRoute())


def close(what: str, found: torch.Tensor, expected: NDArray[Any]) -> None:
    assert tuple(found.shape) == expected.shape, what
    difference = float(np.abs(found.detach().numpy() - expected).max())
    print(f"{what}: {difference:.1e}")
    assert difference < LIMIT, what


def render(backbone: Backbone, layout: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    chosen = backbone.prompt.layouts[layout]
    given = {
        "system": backbone.prompt.system,
        "visual_token": chosen.visual_token,
        "image_token": backbone.prompt.image_token,
        "add_generation_prompt": True,
        **dict.fromkeys(("frames", "tokens", "images", "image_tokens"), 0),
    }
    return rendered(compiled(chosen.template), messages=messages, **(given | variables))


def asking(question: str, *kinds: str) -> list[dict[str, Any]]:
    parts = [*({"type": kind} for kind in kinds), {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]
