"""What a file of facts about an LLM tells, and what several of them read alike from ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from export.decoder import DecoderConfig
from export.fields import divided, optional, size
from export.load import Names, Source
from export.peer import Peer
from runtime.errors import CheckpointError

__all__ = ["LLM", "Peer", "head_size", "key_heads", "peer_sizes"]


@dataclass(frozen=True)
class LLM:
    """An LLM, ready to be loaded.

    Attributes:
        names: from ``Decoder``'s parameters to the checkpoint's.
        table: where the token embedding table comes from.
        table_rows: its rows; at least the vocabulary's.
        peer: the same model in transformers.
        overflows: why its activations leave the range of float16, with the source; then it computes in bfloat16 where
            float16 was asked for. "" where they are known not to, or nothing is known.
    """

    config: DecoderConfig
    names: Names
    table: Source
    table_rows: int
    peer: Peer | None = None
    overflows: str = ""


def head_size(config: Mapping[str, Any], path: str) -> int:
    """Channels of one attention head of the LLM whose fields are below ``path``; rotary positions turn pairs."""
    given = optional(config, f"{path}head_dim", 0)
    found = given or divided(config, f"{path}hidden_size", f"{path}num_attention_heads")
    if found % 2 or not 2 <= found <= size(config, f"{path}hidden_size"):
        where = path.removesuffix(".") or "it"
        raise CheckpointError(f"config.json: {where} gives heads of {found} channels, expected an even number")
    return found


def key_heads(config: Mapping[str, Any], path: str) -> int:
    """Heads of keys and values: as many as of queries where the field is absent."""
    heads = size(config, f"{path}num_attention_heads")
    found = optional(config, f"{path}num_key_value_heads", heads)
    if not 1 <= found <= heads or heads % found:
        raise CheckpointError(
            f"config.json field {path}num_key_value_heads is {found}, expected a divisor of "
            f"{path}num_attention_heads, which is {heads}"
        )
    return found


def peer_sizes(decoder: DecoderConfig) -> dict[str, Any]:
    """The sizes of a decoder under the names that the configurations of transformers' LLMs share."""
    return {
        "vocab_size": decoder.vocab,
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp_width,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.heads_kv,
        "max_position_embeddings": decoder.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": decoder.rotary.theta},
        "tie_word_embeddings": False,
    }
