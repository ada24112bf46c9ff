"""The golden fixtures of all families: how each is exported and asked, and what was recorded of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import save_file

from export.linvt import LinVT, LinVTConfig
from export.linvt.layout import linvt_keys
from tests.conftest import Recorded


@dataclass(frozen=True)
class Fixture:
    """One recorded route of one fixture.

    Attributes:
        options: of the export.
        question: where the fixture has it inside its prompt only.
        prefix: of the route's arrays.
    """

    name: str
    question: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.prefix}".strip()

    def asked(self, arrays: Recorded) -> str:
        """The question alone."""
        return self.question or str(arrays["question"]).splitlines()[-1]

    def of(self, arrays: Recorded, name: str) -> np.ndarray[Any, Any]:
        """A recorded array without its batch axis."""
        array = arrays[f"{self.prefix}{name}"]
        return array[0] if name in ("logits", "input_ids", "inputs_embeds") and array.shape[0] == 1 else array


NEXT = "What is happening in this video? Describe what happens next."
FRAMES = "What is happening in this video? Describe the frames."
FIXED = {"image_size": (56, 84)}
FIXTURES = [
    Fixture("internvl2-qwen2-a"),
    Fixture("internvl2-internlm2-a"),
    Fixture("internvl2-phi3-a"),
    Fixture("qwen2vl-a", FRAMES, FIXED),
    Fixture("qwen2vl-a", FRAMES, {**FIXED, "route": "video"}, "video."),
    Fixture("aquila-a", NEXT),
    Fixture("molmo-a", "Describe what happens in the video."),
    Fixture("xgenmm-a", NEXT),
    Fixture("mipha-a", "What happens in this video?"),
]
ROUTED = [  # fixtures with a recorded LinVT route
    Fixture("qwen2vl-a", FRAMES, FIXED, "linvt."),
    Fixture("aquila-a", NEXT, {}, "linvt."),
    Fixture("xgenmm-a", NEXT, {}, "linvt."),
]


def random_linvt(path: Path, width: int, *, queries: int = 8, seed: int = 0) -> Path:
    """A small LinVT of random weights in the released layout, with its choices in the file's metadata."""
    config = LinVTConfig(width, heads=4, layers=2, top_k=10, queries=queries)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5
        for name, tensor in LinVT(config).state_dict().items()
    }
    choices = {key: msgspec.json.encode(value).decode() for key, value in linvt_keys(config).items()}
    save_file(tensors, path, metadata=choices)
    return path
