"""The PyTorch side of a comparison: a checkpoint's modules, called stage by stage.

Uses the modules' plain forward forms: no ONNX operator, no static KV cache. Slow and obvious on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from export.convert import choose_linvt, load_decoder, load_linvt
from export.decoder import Decoder
from export.families import Backbone, backbone_from_checkpoint
from export.linvt import LinVT
from export.load import load_module
from runtime.errors import CheckpointError
from runtime.manifest import Manifest

__all__ = ["Reference", "Refined"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Refined:
    """SVR's result: visual (1, M, D), indices (1, k), scores (1, T * N)."""

    visual: Floats
    indices: NDArray[np.int64]
    scores: Floats


@dataclass(frozen=True)
class Reference:
    """A checkpoint in PyTorch, float32, on the CPU."""

    backbone: Backbone
    vision_module: nn.Module
    linvt: LinVT | None
    decoder: Decoder
    fingerprint: str

    @classmethod
    def open(cls, source: str, linvt: str | None) -> Reference:
        """Load every part; ``linvt`` as for the export.

        Raises:
            CheckpointError: as for the export.
        """
        checkpoint = Checkpoint.open(source)
        backbone = backbone_from_checkpoint(checkpoint)
        weights = choose_linvt(linvt, checkpoint, backbone)
        return cls(
            backbone,
            load_module(backbone.vision, checkpoint.tensors, backbone.vision_names),
            load_linvt(weights) if weights else None,
            load_decoder(checkpoint, backbone),
            checkpoint.fingerprint(),
        )

    def check_same_model(self, manifest: Manifest) -> None:
        """Refuse a bundle of other sizes, which no comparison of values could be made with."""
        decoder = self.backbone.decoder
        ours = {
            "family": self.backbone.family,
            "linvt": self.linvt.config if self.linvt else None,
            "tokens a frame": self.backbone.tokens_per_frame,
            "preprocessing": self.backbone.preprocess,
            "vocabulary": decoder.vocab,
            "width": decoder.width,
            "layers": decoder.layers,
            "heads_kv": decoder.heads_kv,
            "head_dim": decoder.head_dim,
        }
        theirs = (
            *(manifest.family, manifest.linvt, manifest.frames.tokens, manifest.preprocess),
            next(spec.shape[-1] for spec in manifest.stages["decode"].outputs if spec.name == "logits"),
            *(manifest.width, manifest.layers, manifest.heads_kv, manifest.head_dim),
        )
        for (name, own), other in zip(ours.items(), theirs, strict=True):
            if own != other:
                raise CheckpointError(
                    f"the bundle is of another model: its {name} is {other}, the checkpoint's {own}; "
                    "give the checkpoint (and --linvt) it was exported from"
                )

    @torch.no_grad()
    def vision(self, pixel_values: Floats) -> Floats:
        """(T, 3, H, W) -> (1, T, N, D), frame by frame."""
        tokens = [self.vision_module(torch.from_numpy(frame[None])) for frame in pixel_values]
        return array(torch.cat(tokens)[None])

    @torch.no_grad()
    def refine(self, tokens: Floats) -> Refined:
        """(1, T, N, D) -> the selection."""
        assert self.linvt
        selection = self.linvt.svr(torch.from_numpy(tokens))
        return Refined(array(selection.visual), selection.indices.numpy(), array(selection.scores))

    @torch.no_grad()
    def pool_at(self, tokens: Floats, indices: NDArray[np.int64]) -> Floats:
        """What SVR's pooling gives for a selection that somebody else made: (1, M, D)."""
        assert self.linvt
        svr = self.linvt.svr
        placed = svr.place(torch.from_numpy(tokens))
        chosen = svr.attend(placed) if svr.config.select_from == "refined" else placed
        return array(svr.pool(chosen.flatten(1, 2), torch.from_numpy(indices)))

    @torch.no_grad()
    def aggregate(self, visual: Floats, text: Floats) -> Floats:
        """(1, M, D), (1, S, D) -> (1, Q, D)."""
        assert self.linvt
        return array(self.linvt.aggregate(torch.from_numpy(visual), torch.from_numpy(text)))

    @torch.no_grad()
    def embed(self, ids: NDArray[np.int64]) -> Floats:
        """(S,) -> (S, D)."""
        return array(self.decoder.embed(torch.from_numpy(ids)))

    @torch.no_grad()
    def logits(self, embeds: Floats) -> Floats:
        """A whole sequence (S, D) -> logits of its last row (V,)."""
        rows = torch.from_numpy(embeds)[None]
        return array(self.decoder(rows, torch.arange(rows.shape[1])[None])[0, -1])

    def greedy(self, embeds: Floats, count: int) -> tuple[list[int], list[Floats]]:
        """``count`` greedy tokens and the logits (V,) each was taken from, without a KV cache."""
        ids: list[int] = []
        steps: list[Floats] = []
        for _ in range(count):
            steps.append(self.logits(embeds))
            ids.append(int(steps[-1].argmax()))
            embeds = np.concatenate([embeds, self.embed(np.array(ids[-1:]))])
        return ids, steps


def array(tensor: Tensor) -> Floats:
    """A float32 copy that torch does not own."""
    return tensor.numpy().astype(np.float32)
