"""The PyTorch side of a comparison: a checkpoint's modules, called stage by stage.

Takes transformers' own classes where they are the same models, else this project's modules in their plain forward
forms: no ONNX operator, no static KV cache. Slow and obvious on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from export.convert import choose_linvt, load_decoder, load_linvt, load_table, load_vision
from export.families import Backbone, backbone_from_checkpoint
from export.families.base import FrameRoute
from export.linvt import LinVT, LinVTConfig
from export.peer import Peer, PeerDecoder, peer_model, vision_with_peer
from runtime.errors import CheckpointError, OptionError
from runtime.manifest import Manifest
from runtime.positions import next_positions

__all__ = ["Reference", "Refined"]

Floats = NDArray[np.float32]

OURS = "this project's"
SAME = "give the checkpoint (and --linvt) it was exported from"


@dataclass(frozen=True)
class Refined:
    """SVR's result: visual (1, M, D), indices (1, k), scores (1, T * N)."""

    visual: Floats
    indices: NDArray[np.int64]
    scores: Floats


@dataclass(frozen=True)
class Reference:
    """A checkpoint in PyTorch, float32, on the CPU.

    Attributes:
        table: token embeddings (rows, D) in their stored dtype.
        made_of: whose code each stage is, for the report.
    """

    backbone: Backbone
    vision_module: nn.Module
    linvt: LinVT | None
    decoder: nn.Module
    table: Tensor
    fingerprint: str
    made_of: dict[str, str]

    @classmethod
    def open(cls, source: str, linvt: str | None, manifest: Manifest) -> Reference:
        """Load every part once; ``linvt`` as for the export, whose other choices stand in the bundle's manifest.

        Raises:
            CheckpointError: as for the export, and where the bundle is of a model of another kind or size, which no
                comparison of values could be made with.
        """
        checkpoint = Checkpoint.open(source)
        backbone = chosen_backbone(checkpoint, manifest)
        weights = choose_linvt(linvt, checkpoint, backbone)
        check_same_model(backbone, weights.config if weights else None, manifest)
        decoder, model = decoder_of(checkpoint, backbone)
        vision, vision_code = vision_of(checkpoint, backbone, model)
        return cls(
            backbone,
            vision,
            load_linvt(weights) if weights else None,
            decoder,
            load_table(checkpoint, backbone),
            checkpoint.fingerprint(),
            {
                "vision": vision_code,
                **({"linvt": f"{OURS} modules"} if weights else {}),
                "decode": theirs(backbone.llm.peer) if backbone.llm.peer else f"{OURS} modules",
            },
        )

    @torch.no_grad()
    def vision(self, feeds: Mapping[str, Floats]) -> Floats:
        """The vision stage's inputs -> (1, T, N, D), one group of frames at a time."""
        group = self.backbone.frame_group
        inputs = [torch.from_numpy(value) for value in feeds.values()]
        starts = range(0, len(inputs[0]), group)
        tokens = [self.vision_module(*(value[start : start + group] for value in inputs)) for start in starts]
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

    def embed(self, ids: NDArray[np.int64]) -> Floats:
        """(S,) -> (S, D)."""
        return array(self.table[torch.from_numpy(ids)].float())

    @torch.no_grad()
    def logits(self, embeds: Floats, position_ids: NDArray[np.int64]) -> Floats:
        """A whole sequence (S, D) at positions (axes, S) -> logits of its last row (V,)."""
        positions = torch.from_numpy(position_ids)  # (1, S) is a batch of one
        placed = positions if len(positions) == 1 else positions[:, None]  # (3, 1, S)
        return array(self.decoder(torch.from_numpy(embeds)[None], placed)[0, -1])

    def greedy(self, embeds: Floats, position_ids: NDArray[np.int64], count: int) -> tuple[list[int], list[Floats]]:
        """``count`` greedy tokens and the logits (V,) each was taken from, without a KV cache."""
        ids: list[int] = []
        steps: list[Floats] = []
        for _ in range(count):
            steps.append(self.logits(embeds, position_ids))
            ids.append(int(steps[-1].argmax()))
            embeds = np.concatenate([embeds, self.embed(np.array(ids[-1:]))])
            position_ids = np.concatenate([position_ids, next_positions(position_ids)], axis=1)
        return ids, steps


def array(tensor: Tensor) -> Floats:
    """A float32 copy that torch does not own."""
    return tensor.numpy().astype(np.float32)


def chosen_backbone(checkpoint: Checkpoint, manifest: Manifest) -> Backbone:
    """The backbone with the choices of the export, as far as its family leaves any."""
    route, size = manifest.route, manifest.preprocess.size
    try:
        backbone = backbone_from_checkpoint(checkpoint, FrameRoute(route=route))
        if backbone.preprocess.size == size:
            return backbone
        return backbone_from_checkpoint(checkpoint, FrameRoute(size, route))
    except OptionError as error:
        raise CheckpointError(
            f"the bundle is of another model: its frames are {size[0]}x{size[1]} by the route {route}, which the "
            f"checkpoint does not take; {SAME}"
        ) from error


def check_same_model(backbone: Backbone, linvt: LinVTConfig | None, manifest: Manifest) -> None:
    """Refuse a bundle of other sizes, before anything is loaded."""
    decoder = backbone.llm.config
    ours = {
        "family": backbone.family,
        "linvt": linvt,
        "tokens a frame": backbone.tokens_per_frame,
        "preprocessing": backbone.preprocess,
        "vocabulary": decoder.vocab,
        "width": decoder.width,
        "layers": decoder.layers,
        "heads_kv": decoder.heads_kv,
        "head_dim": decoder.head_dim,
    }
    bundles = (
        *(manifest.family, manifest.linvt, manifest.frames.tokens, manifest.preprocess),
        next(spec.shape[-1] for spec in manifest.stages["decode"].outputs if spec.name == "logits"),
        *(manifest.width, manifest.layers, manifest.heads_kv, manifest.head_dim),
    )
    for (name, own), other in zip(ours.items(), bundles, strict=True):
        if own != other:
            raise CheckpointError(
                f"the bundle is of another model: its {name} is {other}, the checkpoint's {own}; {SAME}"
            )


def decoder_of(checkpoint: Checkpoint, backbone: Backbone) -> tuple[nn.Module, nn.Module | None]:
    """The LLM, and transformers' class behind it where there is one."""
    if not (peer := backbone.llm.peer):
        return load_decoder(checkpoint, backbone), None
    model = peer_model(peer, checkpoint.tensors)
    return PeerDecoder(model), model


def vision_of(checkpoint: Checkpoint, backbone: Backbone, llm: nn.Module | None) -> tuple[nn.Module, str]:
    """The vision stage and whose code it is; ``llm`` is taken for it where one class is both."""
    if not (peer := backbone.vision_peer):
        return load_vision(checkpoint, backbone), f"{OURS} modules"
    tensors = checkpoint.tensors
    model = llm if llm and peer.peer is backbone.llm.peer else peer_model(peer.peer, tensors)
    vision = vision_with_peer(peer, model, backbone.vision, tensors, backbone.vision_names)
    own = [name for name, _ in vision.named_children() if name != peer.part] if peer.part else []
    return vision, " and ".join([theirs(peer.peer), *(f"{OURS} {name}" for name in own)])


def theirs(peer: Peer) -> str:
    """A class of transformers by its name."""
    return f"transformers' {peer.name}" + (" with a bias in its head" if peer.head_bias else "")
