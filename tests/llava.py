"""What the tests of the LLaVA-like families share: a loaded backbone, its prompts and its greedy answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from export.decoder import Decoder, KVCache
from export.families.base import Backbone, Family, FrameRoute
from export.load import load_module
from runtime.template import compiled, rendered

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's backbone with its parts filled."""

    backbone: Backbone
    vision: nn.Module
    decoder: Decoder
    table: Tensor
    tokenizer: Tokenizer

    def text(self, layout: str, messages: Messages, *, ask: bool = True, **counts: int) -> str:
        """The prompt as text."""
        facts, variables = self.backbone.prompt, {"frames": 0, "tokens": 0, "images": 0, "image_tokens": 0} | counts
        return rendered(
            compiled(facts.layouts[layout].template),
            messages=messages,
            add_generation_prompt=ask,
            system=facts.system,
            visual_token=facts.layouts[layout].visual_token,
            image_token=facts.image_token,
            **variables,
        )

    def ids(self, text: str) -> NDArray[np.int64]:
        """The prompt as ids."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def token(self, name: str) -> int:
        """A token's id."""
        return int(self.tokenizer.token_to_id(name))

    def embeds(self, ids: NDArray[np.int64], visual: NDArray[np.float32] | Tensor) -> Tensor:
        """(S,) ids and (rows, D) -> (1, S, D), rows in the places of the visual tokens."""
        facts = self.backbone.prompt
        rows = {self.token(name): row for name, row in facts.prompt_rows.items()}
        places = ids == self.token(facts.image_token)
        known = [rows.get(int(id_), 0 if place else int(id_)) for id_, place in zip(ids, places, strict=True)]
        embeds = self.table[known].clone()
        embeds[torch.tensor(places)] = torch.as_tensor(visual)
        return embeds[None]


def loaded(family: Family, folder: Path, route: FrameRoute | None = None) -> Loaded:
    """Everything of a checkpoint."""
    checkpoint = Checkpoint.open(folder)
    backbone = family.backbone(checkpoint, route or FrameRoute())
    llm = backbone.llm
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in backbone.prompt.extra_tokens])
    return Loaded(
        backbone,
        load_module(backbone.vision, checkpoint.tensors, backbone.vision_names),
        load_module(lambda: Decoder(llm.config), checkpoint.tensors, llm.names),
        llm.table.read(checkpoint.tensors, (llm.table_rows, llm.config.width)),
        tokenizer,
    )


def video(text: str) -> Messages:
    """A question about a video."""
    return [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}]


def greedy(decoder: Decoder, embeds: Tensor, table: Tensor, count: int) -> tuple[list[int], Tensor]:
    """Embeddings (1, S, D) -> ``count`` ids and their logits (count, V), one row at a time over a cache."""
    config, at = decoder.config, embeds.shape[1]
    shape = (1, config.heads_kv, at + count, config.head_dim)
    past = [torch.randn(shape) for _ in range(2 * config.layers)]  # what stands there before must not matter
    ids, rows, write = [], [], 0
    for _ in range(count):
        index = torch.tensor([write])
        caches = [KVCache(key, value, index) for key, value in zip(past[::2], past[1::2], strict=True)]
        positions = torch.arange(write, write + embeds.shape[1])[None]
        logits, past = decoder.step(embeds, positions, caches)
        write += embeds.shape[1]
        ids.append(int(logits.argmax()))
        rows.append(logits[0])
        embeds = table[None, ids[-1:]]
    return ids, torch.stack(rows)


def peer_of(checkpoint: Checkpoint, backbone: Backbone) -> nn.Module:
    """The same LLM as transformers' own class, filled from the checkpoint."""
    peer = backbone.llm.peer
    assert peer is not None
    kind = getattr(transformers, peer.name)
    model = kind(kind.config_class(**peer.config, attn_implementation="eager")).eval()
    for name, parameter in model.named_parameters():
        parameter.data = peer.names(name).read(checkpoint.tensors, tuple(parameter.shape))
    return model  # type: ignore[no-any-return]


def largest(found: Tensor, expected: NDArray[Any] | Tensor) -> float:
    """Largest absolute difference, printed."""
    expected = np.asarray(expected).reshape(found.shape)
    difference = float(np.abs(found.detach().numpy() - expected).max())
    print(f"largest difference {difference:.2e}")
    return difference
