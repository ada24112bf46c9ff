"""The classes of transformers that are the same models, as the reference of a comparison.

They are built from the same ``config.json`` and filled from the same published tensors; the arithmetic is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from export.checkpoint import TensorFiles
from export.load import Names, filled

__all__ = ["Peer", "PeerDecoder", "VisionPeer", "peer_model", "vision_with_peer"]


@dataclass(frozen=True)
class Peer:
    """The class in transformers that is the same model.

    Attributes:
        name: e.g. "Qwen2ForCausalLM".
        config: arguments of its configuration.
        names: from its parameters to the checkpoint's.
        head_bias: its output head is given a bias, which the class does not have.
    """

    name: str
    config: Mapping[str, Any]
    names: Names
    head_bias: bool = False


@dataclass(frozen=True)
class VisionPeer:
    """The class in transformers that is the vision stage, or a part of it.

    Attributes:
        peer: the LLM's own where one class is both.
        part: submodule of this project's stage that it stands for; "" for the whole stage.
        adapted: gives the filled class the signature of that part.
    """

    peer: Peer
    part: str
    adapted: Callable[[nn.Module], nn.Module]


def peer_model(peer: Peer, tensors: TensorFiles) -> nn.Module:
    """The class that ``peer`` names, filled, in float32 and with plain attention."""
    import transformers
    from transformers.initialization import no_init_weights

    kind: Any = getattr(transformers, peer.name)
    config = kind.config_class(**peer.config, attn_implementation="eager")
    with no_init_weights():  # on the CPU rather than "meta": its buffers hold constants
        model: nn.Module = kind(config)
        if peer.head_bias:
            model.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
    return filled(model.float(), tensors, peer.names)


def vision_with_peer(
    peer: VisionPeer, model: nn.Module, build: Callable[[], nn.Module], tensors: TensorFiles, names: Names
) -> nn.Module:
    """The vision stage with the filled class ``model`` in it.

    ``build`` makes this project's stage, whose other parts are filled by ``names``; nothing is read for the part that
    ``model`` stands for.
    """
    if not peer.part:
        return peer.adapted(model)
    with torch.device("meta"):
        stage = build()
    stage.set_submodule(peer.part, nn.Identity())
    filled(stage, tensors, names)
    stage.set_submodule(peer.part, peer.adapted(model))
    return stage


class PeerDecoder(nn.Module):
    """A causal LLM of transformers in the form of ``Decoder.forward``; its embedding table is let go."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.set_input_embeddings(nn.Identity())
        self.model = model

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        """A whole sequence (B, S, D) at positions (B, S), or (3, B, S) for M-RoPE -> logits (B, S, V)."""
        mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.int64)
        found = self.model(inputs_embeds=inputs_embeds, position_ids=position_ids, attention_mask=mask, use_cache=False)
        logits: Tensor = found.logits
        return logits
