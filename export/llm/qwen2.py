"""Qwen2 and Qwen2.5: RMS norm, SwiGLU, grouped queries with biases. Facts from transformers' ``modeling_qwen2``.

Products of queries and keys pass float16's 65504. Published perplexity of Qwen2-7B: 7.1378 in float32, NaN in float16,
and 7.1381 in float16 with these products kept in float32 (huggingface/transformers pull request 33317). The 1.5B models
and Qwen2-VL fail alike (QwenLM/Qwen3 issue 826, huggingface/transformers issue 33294).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.decoder import DecoderConfig
from export.fields import MOST_LAYERS, SHORTEST_CONTEXT, divided, one_of, optional, positive, size
from export.llm.base import LLM, Peer, head_size, peer_sizes
from export.load import Names, Whole, prefixed
from export.rotary import RotaryConfig

__all__ = ["OVERFLOWS", "qwen2_llm"]

OVERFLOWS = "Qwen2's attention scores leave its range (huggingface/transformers#33317, QwenLM/Qwen3#910)"


def qwen2_llm(config: Mapping[str, Any], path: str, prefix: str, *, sections: tuple[int, ...] = ()) -> LLM:
    """Read the facts.

    Args:
        config: ``config.json``.
        path: where its fields stand in it, "" or with a dot at the end.
        prefix: of its tensors, "" or with a dot at the end.
        sections: of M-RoPE; see ``RotaryConfig``.
    """
    one_of(config, f"{path}hidden_act", "silu")
    one_of(config, f"{path}use_sliding_window", False)
    divided(config, f"{path}num_attention_heads", f"{path}num_key_value_heads")
    head_dim = head_size(config, path)
    decoder = DecoderConfig(
        vocab=size(config, f"{path}vocab_size"),
        width=size(config, f"{path}hidden_size"),
        layers=size(config, f"{path}num_hidden_layers", most=MOST_LAYERS),
        heads=size(config, f"{path}num_attention_heads"),
        heads_kv=size(config, f"{path}num_key_value_heads"),
        head_dim=head_dim,
        mlp_width=size(config, f"{path}intermediate_size"),
        rotary=RotaryConfig(positive(config, f"{path}rope_theta"), head_dim, sections),
        context=size(config, f"{path}max_position_embeddings", least=SHORTEST_CONTEXT),
        norm_eps=positive(config, f"{path}rms_norm_eps"),
    )
    table = f"{prefix}model.embed_tokens.weight"
    tied = optional(config, f"{path}tie_word_embeddings", False)
    head = (("lm_head\\.weight", lambda found: Whole(table)),) if tied else ()
    names = Names((*head, prefixed("", prefix)))
    same = None if sections else peer(decoder, names, table)
    return LLM(decoder, names, Whole(table), decoder.vocab, same, OVERFLOWS)


def peer(decoder: DecoderConfig, names: Names, table: str) -> Peer:
    """Transformers' own class, whose parameters have the same names and an embedding table besides."""
    config = {
        **peer_sizes(decoder),
        "head_dim": decoder.head_dim,
        "rms_norm_eps": decoder.norm_eps,
    }
    return Peer(
        "Qwen2ForCausalLM", config, Names((("model\\.embed_tokens\\.weight", lambda _: Whole(table)), *names.rules))
    )
