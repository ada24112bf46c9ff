"""InternLM2 and InternLM2.5: Llama under other names. Facts from the ``modeling_internlm2`` of OpenGVLab/InternVL.

``wqkv`` is one tensor, interleaved: for each key head, the query heads that share it, then that key head, then its
value head. Dynamic NTK scaling enlarges the base beyond ``max_position_embeddings`` tokens only, which is our
context, so it is accepted and does nothing.

Float16 holds its range: InternVL2-2B answers on GPUs without bfloat16 (InternLM/lmdeploy issue 2273).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from export.decoder import DecoderConfig
from export.fields import MOST_LAYERS, SHORTEST_CONTEXT, divided, one_of, optional, positive, shortened, size
from export.llm.base import LLM, Peer, head_size, peer_sizes
from export.load import Names, Rearranged, Rule, Whole, prefixed, renamed
from export.rotary import RotaryConfig
from runtime.errors import CheckpointError

__all__ = ["internlm2_llm"]

RENAMED = {  # ours in a layer -> theirs
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def internlm2_llm(config: Mapping[str, Any], path: str, prefix: str) -> LLM:
    """Read the facts.

    Args:
        config: ``config.json``.
        path: where its fields stand in it, "" or with a dot at the end.
        prefix: of its tensors, "" or with a dot at the end.
    """
    one_of(config, f"{path}hidden_act", "silu")
    check_bias(config, path)
    check_scaling(config, path)
    heads = size(config, f"{path}num_attention_heads")
    heads_kv = optional(config, f"{path}num_key_value_heads", heads)
    if heads_kv != heads:
        divided(config, f"{path}num_attention_heads", f"{path}num_key_value_heads")
    head_dim = head_size(config, path)
    decoder = DecoderConfig(
        vocab=size(config, f"{path}vocab_size"),
        width=size(config, f"{path}hidden_size"),
        layers=size(config, f"{path}num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        heads_kv=heads_kv,
        head_dim=head_dim,
        mlp_width=size(config, f"{path}intermediate_size"),
        rotary=RotaryConfig(positive(config, f"{path}rope_theta"), head_dim),
        context=size(config, f"{path}max_position_embeddings", least=SHORTEST_CONTEXT),
        norm_eps=positive(config, f"{path}rms_norm_eps"),
        qkv_bias=False,
    )
    table = f"{prefix}model.tok_embeddings.weight"
    tied = optional(config, f"{path}tie_word_embeddings", False)
    head = table if tied else f"{prefix}output.weight"
    names = Names(
        (
            projections(decoder, prefix),
            *(
                renamed(rf"(model\.layers\.\d+)\.{re.escape(ours)}\.weight", rf"{prefix}\1.{theirs}.weight")
                for ours, theirs in RENAMED.items()
            ),
            ("lm_head\\.weight", lambda found: Whole(head)),
            prefixed("", prefix),
        )
    )
    return LLM(decoder, names, Whole(table), decoder.vocab, peer(decoder, names, table))


def check_bias(config: Mapping[str, Any], path: str) -> None:
    """The published code's default is a bias, so that an absent field says there is one."""
    if optional(config, f"{path}bias", True):
        raise CheckpointError(
            f"config.json field {path}bias is not false; InternLM2 with biases is not supported, "
            "published InternVL2 checkpoints have none"
        )


def check_scaling(config: Mapping[str, Any], path: str) -> None:
    """Refuse what scales positions within the context."""
    where = f"{path}rope_scaling"
    scaling = optional(config, where, dict[str, Any]())
    if scaling and scaling.get("type") != "dynamic":
        raise CheckpointError(
            f"config.json field {where}.type is {shortened(scaling.get('type'))}; supported: 'dynamic'"
        )


def projections(decoder: DecoderConfig, prefix: str) -> Rule:
    """Queries, keys and values out of ``wqkv``, whose rows are (key heads, group + 2, head_dim)."""
    group = decoder.heads // decoder.heads_kv
    stored = ((group + 2) * decoder.heads_kv * decoder.head_dim, decoder.width)
    parts = {"q": slice(group), "k": slice(group, group + 1), "v": slice(group + 1, group + 2)}

    def source(found: re.Match[str]) -> Rearranged:
        def arrange(packed: Tensor) -> Tensor:
            grouped: Tensor = packed.unflatten(0, (decoder.heads_kv, group + 2, decoder.head_dim))
            return grouped[:, parts[found["part"]]].flatten(0, 2)

        return Rearranged(f"{prefix}{found['layer']}.attention.wqkv.weight", stored, arrange)

    return r"(?P<layer>model\.layers\.\d+)\.self_attn\.(?P<part>[qkv])_proj\.weight", source


def peer(decoder: DecoderConfig, names: Names, table: str) -> Peer:
    """Transformers' Llama, which has the parameters of our decoder and an embedding table besides."""
    config = {
        **peer_sizes(decoder),
        "head_dim": decoder.head_dim,
        "rms_norm_eps": decoder.norm_eps,
        "attention_bias": False,
        "mlp_bias": False,
    }
    return Peer(
        "LlamaForCausalLM", config, Names((("model\\.embed_tokens\\.weight", lambda _: Whole(table)), *names.rules))
    )
