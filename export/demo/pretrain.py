"""Losses before and beside the questions: patches for the vision tower, tokens for connector and SVR.

Heads and losses live only here and in the question stage; a checkpoint holds none of them. Does not look at text.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.demo.batches import Clips
from export.demo.crops import Crops
from export.demo.model import LINVT, VISION, Refined

__all__ = ["Heads", "patch_loss", "token_loss"]

FACTS = (10, 5, 5, 2, 2)  # classes: digit, colour, direction, late, gone
BACKGROUND = 0.2  # weight of a patch without a digit


class Heads(nn.Module):
    """Linear read-outs of patch features and of refined tokens, dropped after training."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_digit = nn.Linear(VISION.width, 11)
        self.patch_colour = nn.Linear(VISION.width, 6)
        self.token = nn.Linear(LINVT.width, sum(FACTS))


def patch_loss(heads: Heads, features: Tensor, clips: Clips | Crops) -> tuple[Tensor, dict[str, float]]:
    """Digit and colour of every patch from features (F, patches, E)."""
    total = torch.zeros(())
    hits = {}
    for name, head, labels in (
        ("patch digit", heads.patch_digit, clips.digit),
        ("patch colour", heads.patch_colour, clips.colour),
    ):
        logits = head(features).flatten(0, 1)
        classes = logits.shape[-1]
        target = labels.flatten() % classes  # -1, no digit, is the last class
        weight = torch.ones(classes)
        weight[-1] = BACKGROUND
        total = total + functional.cross_entropy(logits, target, weight)
        shown = labels.flatten() >= 0
        hits[name] = float((logits.argmax(-1) == target)[shown].float().mean())
    return total, hits


def token_loss(heads: Heads, refined: Refined, clips: Clips) -> tuple[Tensor, dict[str, float]]:
    """Significance of every token, and all facts of the tokens that hold part of a digit."""
    score = functional.binary_cross_entropy_with_logits(refined.scores, clips.weight.flatten(1))
    shown = (clips.facts[..., 0] >= 0) & (clips.weight > 0.3)
    logits = heads.token(refined.tokens[shown]).split(FACTS, dim=-1)
    targets = clips.facts[shown].unbind(-1)
    losses = [functional.cross_entropy(given, target) for given, target in zip(logits, targets, strict=True)]
    names = ("digit", "colour", "direction", "late", "gone")
    hits = {
        name: float((given.argmax(-1) == target).float().mean())
        for name, given, target in zip(names, logits, targets, strict=True)
    }
    return score + torch.stack(losses).sum(), hits
