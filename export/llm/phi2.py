"""Phi-2: attention and MLP side by side on one layer norm, biases everywhere, part of every head turned.

Facts from transformers' ``modeling_phi``, in the naming it has had since 4.37 (query, key and value apart). Microsoft's
own naming and the fused ``query_key_value`` of 4.36 are not covered.

Products of queries and keys leave float16's range: transformers' code multiplies them in float32 for it (pull request
28163), and scaling them first is not enough (ml-explore/mlx-examples pull request 574).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.decoder import DecoderConfig
from export.fields import MOST_LAYERS, SHORTEST_CONTEXT, one_of, optional, positive, size
from export.llm.base import LLM, Peer, head_size, key_heads, peer_sizes
from export.load import Names, Rule, Whole, prefixed, renamed
from export.rotary import RotaryConfig
from runtime.errors import CheckpointError

__all__ = ["phi2_llm"]

OVERFLOWS = "Phi-2's attention scores leave its range (huggingface/transformers#28163, mlc-ai/mlc-llm#1870)"


def phi2_llm(config: Mapping[str, Any], path: str, prefix: str) -> LLM:
    """Read the facts.

    Args:
        config: ``config.json``.
        path: where its fields stand in it, "" or with a dot at the end.
        prefix: of its tensors, "" or with a dot at the end.
    """
    one_of(config, f"{path}hidden_act", "gelu_new", "gelu_pytorch_tanh")  # two names of the tanh form
    one_of(config, f"{path}qk_layernorm", False)
    if optional(config, f"{path}rope_scaling", {}):
        raise CheckpointError(f"config.json: {path}rope_scaling is set; only plain rotary positions work")
    heads, head_dim = size(config, f"{path}num_attention_heads"), head_size(config, path)
    decoder = DecoderConfig(
        vocab=size(config, f"{path}vocab_size"),
        width=size(config, f"{path}hidden_size"),
        layers=size(config, f"{path}num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        heads_kv=key_heads(config, path),
        head_dim=head_dim,
        mlp_width=size(config, f"{path}intermediate_size"),
        rotary=RotaryConfig(positive(config, f"{path}rope_theta"), turned(config, path, head_dim)),
        context=size(config, f"{path}max_position_embeddings", least=SHORTEST_CONTEXT),
        norm_eps=positive(config, f"{path}layer_norm_eps"),
        norm="layer",
        mlp="gelu",
        block="parallel",
        bias=True,
        head_bias=True,
    )
    table = f"{prefix}model.embed_tokens.weight"
    tied = optional(config, f"{path}tie_word_embeddings", False)
    head: tuple[Rule, ...] = (("lm_head\\.weight", lambda _: Whole(table)),) if tied else ()
    names = Names(
        (
            *head,
            renamed(r"(model\.layers\.\d+\.self_attn)\.o_proj\.(\w+)", prefix + r"\1.dense.\2"),
            prefixed("model.norm.", f"{prefix}model.final_layernorm."),
            prefixed("", prefix),
        )
    )
    factor = positive(config, f"{path}partial_rotary_factor")
    same = peer(decoder, factor, Names((*head, prefixed("", prefix))))
    return LLM(decoder, names, Whole(table), decoder.vocab, same, OVERFLOWS)


def turned(config: Mapping[str, Any], path: str, head_dim: int) -> int:
    """Channels of a head that rotary positions turn."""
    factor = positive(config, f"{path}partial_rotary_factor")
    dims = int(factor * head_dim)
    if factor > 1 or dims % 2 or not dims:
        raise CheckpointError(
            f"config.json field {path}partial_rotary_factor is {factor}, expected a share of {head_dim} channels "
            "that makes an even number of them"
        )
    return dims


def peer(decoder: DecoderConfig, factor: float, names: Names) -> Peer:
    """Transformers' own class, whose parameters have the published names."""
    config = {
        **peer_sizes(decoder),
        "layer_norm_eps": decoder.norm_eps,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": decoder.rotary.theta,
            "partial_rotary_factor": factor,
        },
    }
    return Peer("PhiForCausalLM", config, names)
