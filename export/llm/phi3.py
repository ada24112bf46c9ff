"""Phi-3: Llama's block with fused projections, and longrope. Facts from the ``modeling_phi3`` of OpenGVLab/InternVL and
of transformers 4.41.

Query, key and value are one tensor there, in that order and each whole; so are gate and up. A row sees
``sliding_window`` rows before its own, as with flash attention in both and in 4.41's ``modeling_attn_mask_utils``
(i - j <= window). The eager masks of transformers 4.37 and 5 see one fewer. InternVL2's window is longer than its
context.

Longrope is called "su" in older files. Cosine and sine are longer by the same factor whether the short or the long list
holds. The yarn form that InternVL's file also has was never published with weights and is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from export.decoder import DecoderConfig
from export.fields import (
    MOST_LAYERS,
    SHORTEST_CONTEXT,
    divided,
    field,
    one_of,
    optional,
    positive,
    shortened,
    size,
)
from export.llm.base import LLM, Peer, head_size, peer_sizes
from export.load import Names, Rows, Rule, Whole, prefixed
from export.rotary import RotaryConfig
from runtime.errors import CheckpointError

__all__ = ["phi3_llm"]

LONGROPE = ("su", "longrope")
LONGROPE_FIELDS = frozenset({"type", "rope_type", "short_factor", "long_factor", "original_max_position_embeddings"})
SHORT_CONTEXT = 4096  # the published code's default of original_max_position_embeddings


def phi3_llm(config: Mapping[str, Any], path: str, prefix: str) -> LLM:
    """Read the facts.

    Args:
        config: ``config.json``, or the part of it that is complete.
        path: where its fields stand in it, "" or with a dot at the end.
        prefix: of its tensors, "" or with a dot at the end.
    """
    one_of(config, f"{path}hidden_act", "silu")
    one_of(config, f"{path}attention_bias", False)
    one_of(config, f"{path}mlp_bias", False)
    one_of(config, f"{path}partial_rotary_factor", 1.0)
    heads = size(config, f"{path}num_attention_heads")
    if optional(config, f"{path}num_key_value_heads", heads) != heads:
        divided(config, f"{path}num_attention_heads", f"{path}num_key_value_heads")
    head_dim = head_size(config, path)
    decoder = DecoderConfig(
        vocab=size(config, f"{path}vocab_size"),
        width=size(config, f"{path}hidden_size"),
        layers=size(config, f"{path}num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        heads_kv=optional(config, f"{path}num_key_value_heads", heads),
        head_dim=head_dim,
        mlp_width=size(config, f"{path}intermediate_size"),
        rotary=rotary_config(config, path, head_dim),
        context=size(config, f"{path}max_position_embeddings", least=SHORTEST_CONTEXT),
        norm_eps=positive(config, f"{path}rms_norm_eps"),
        qkv_bias=False,
        window=window(config, path),
    )
    table = f"{prefix}model.embed_tokens.weight"
    tied = optional(config, f"{path}tie_word_embeddings", False)
    head: tuple[Rule, ...] = (("lm_head\\.weight", lambda found: Whole(table)),) if tied else ()
    stored = (*head, prefixed("", prefix))
    names = Names((*fused(decoder, prefix), *stored))
    return LLM(decoder, names, Whole(table), decoder.vocab, Peer("Phi3ForCausalLM", peer(decoder), Names(stored)))


def window(config: Mapping[str, Any], path: str) -> int:
    """Rows before its own that a row sees; 0 where that is all the context has."""
    context = size(config, f"{path}max_position_embeddings")
    if optional(config, f"{path}sliding_window", context) >= context:
        return 0
    return size(config, f"{path}sliding_window")


def rotary_config(config: Mapping[str, Any], path: str, head_dim: int) -> RotaryConfig:
    """Plain rotary positions, or longrope."""
    theta = positive(config, f"{path}rope_theta")
    where = f"{path}rope_scaling"
    scaling = optional(config, where, dict[str, Any]())
    if not scaling:
        return RotaryConfig(theta, head_dim)
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in LONGROPE:
        raise CheckpointError(
            f"config.json field {where}.type is {shortened(kind)}; supported: {', '.join(map(repr, LONGROPE))}"
        )
    if unknown := sorted(scaling.keys() - LONGROPE_FIELDS):
        raise CheckpointError(
            f"config.json field {where}.{unknown[0]} is set; Phi-3's longrope is published with "
            "short_factor and long_factor alone"
        )
    short = SHORT_CONTEXT
    for place in (f"{path}original_max_position_embeddings", f"{where}.original_max_position_embeddings"):
        if optional(config, place, 0):
            short = size(config, place)
    if short < 2:
        raise CheckpointError(
            f"config.json field {path}original_max_position_embeddings is {short}, expected 2 or more tokens"
        )
    scale = size(config, f"{path}max_position_embeddings") / short
    return RotaryConfig(
        theta,
        head_dim,
        short_factors=factors(config, f"{where}.short_factor", head_dim // 2),
        long_factors=factors(config, f"{where}.long_factor", head_dim // 2),
        short_context=short,
        magnitude=math.sqrt(1 + math.log(scale) / math.log(short)) if scale > 1 else 1.0,
    )


def factors(config: Mapping[str, Any], path: str, count: int) -> tuple[float, ...]:
    """One divisor for each of ``count`` angles."""
    listed = field(config, path, list)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in listed)
    if len(listed) != count or not numbers or not all(0 < value < math.inf for value in listed):
        raise CheckpointError(
            f"config.json field {path} is {len(listed)} values {shortened(listed)}, "
            f"expected {count} numbers above 0, one for each pair of a head's channels"
        )
    return tuple(map(float, listed))


def fused(decoder: DecoderConfig, prefix: str) -> tuple[Rule, ...]:
    """The parts of ``qkv_proj`` and ``gate_up_proj``."""
    queries, keys = decoder.heads * decoder.head_dim, decoder.heads_kv * decoder.head_dim
    starts = {"q": 0, "k": queries, "v": queries + keys, "gate": 0, "up": decoder.mlp_width}

    def rows(packed: str, total: int, found: re.Match[str]) -> Rows:
        return Rows(f"{prefix}{found['where']}.{packed}.weight", starts[found["part"]], total)

    return (
        (
            r"(?P<where>model\.layers\.\d+\.self_attn)\.(?P<part>[qkv])_proj\.weight",
            lambda found: rows("qkv_proj", queries + 2 * keys, found),
        ),
        (
            r"(?P<where>model\.layers\.\d+\.mlp)\.(?P<part>gate|up)_proj\.weight",
            lambda found: rows("gate_up_proj", 2 * decoder.mlp_width, found),
        ),
    )


def peer(decoder: DecoderConfig) -> dict[str, Any]:
    """Arguments of transformers' ``Phi3Config``, whose parameters are named as published."""
    rotary = decoder.rotary
    positions: dict[str, Any] = {"rope_type": "default", "rope_theta": rotary.theta}
    if rotary.long_factors:
        positions |= {
            "rope_type": "longrope",
            "short_factor": list(rotary.short_factors),
            "long_factor": list(rotary.long_factors),
            "factor": decoder.context / rotary.short_context,
        }
    return {
        **peer_sizes(decoder),
        "head_dim": decoder.head_dim,
        "rms_norm_eps": decoder.norm_eps,
        "original_max_position_embeddings": rotary.short_context or decoder.context,
        "rope_parameters": positions,
        "sliding_window": decoder.window + 1 if decoder.window else None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
