"""The LLM of Molmo: OLMo's tensor names around Qwen2's arithmetic (7B-D) or OLMo-1024's (7B-O).

Facts from ``modeling_molmo.py`` of allenai/Molmo-7B-D-0924 and, for 7B-O, from allenai/molmo (``olmo/model.py``,
``launch_scripts/utils.py``). The mixture of experts (MolmoE) is not covered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from export.checkpoint import TensorFiles
from export.decoder import DecoderConfig
from export.fields import MOST_LAYERS, SHORTEST_CONTEXT, divided, one_of, optional, positive, shortened, size
from export.llm.base import LLM, Peer, head_size, key_heads, peer_sizes
from export.llm.qwen2 import OVERFLOWS
from export.load import Names, Rows, Stacked, Whole, renamed
from export.rotary import RotaryConfig
from runtime.errors import CheckpointError

__all__ = ["olmo_llm"]

PREFIX = "model.transformer."
TABLE = f"{PREFIX}wte.embedding"
NEW_ROWS = f"{PREFIX}wte.new_embedding"
HEAD = f"{PREFIX}ff_out.weight"

# Choices of OLMo's code that Molmo's own makes for good; a configuration that names them must agree.
FIXED: Mapping[str, str | bool] = {
    "activation_type": "swiglu",
    "alibi": False,
    "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "block_type": "sequential",
    "include_bias": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "multi_query_attention": False,
    "normalize_input_embeds": False,
    "rope": True,
    "rope_impl": "llama",
    "scale_logits": False,
}
UNSET = ("attn_logit_softcapping", "clip_qkv", "final_logit_softcapping", "rope_scaling")

# (norms behind the parts, normed queries and keys, biases of them) -> the class in transformers
PEERS = {
    (False, False, True): "Qwen2ForCausalLM",
    (False, False, False): "LlamaForCausalLM",
    (True, True, False): "Olmo2ForCausalLM",
}


def olmo_llm(config: Mapping[str, Any], tensors: TensorFiles) -> LLM:
    """Read the facts from ``config.json`` and, for rows that it does not count, from the tensors' shapes."""
    for name, value in FIXED.items():
        one_of(config, name, value)
    for name in UNSET:
        if config.get(name) is not None:
            raise CheckpointError(f"config.json field {name} is {shortened(config[name])}; supported: null")
    decoder = decoder_config(config, tensors)
    names = decoder_names(config, tensors, decoder)
    new_rows = extra_rows(config, tensors)
    table = Stacked((Whole(TABLE), Whole(NEW_ROWS)), (decoder.vocab, new_rows))
    overflows = OVERFLOWS if decoder.qkv_bias else ""  # the LLM of 7B-D and 72B is Qwen2; of OLMo's nothing is known
    return LLM(decoder, names, table, decoder.vocab + new_rows, peer(decoder, names), overflows)


def decoder_config(config: Mapping[str, Any], tensors: TensorFiles) -> DecoderConfig:
    """Sizes and choices; ``intermediate_size`` is that of gate and up together."""
    heads = size(config, "num_attention_heads")
    heads_kv = key_heads(config, "")
    if size(config, "intermediate_size", least=2) % 2:
        raise CheckpointError(
            f"config.json field intermediate_size is {config['intermediate_size']}, expected an even number: "
            "gate and up together"
        )
    vocab = size(config, "vocab_size")
    head_dim = head_size(config, "")
    divided(config, "hidden_size", "num_attention_heads")
    return DecoderConfig(
        vocab=size(config, "embedding_size", least=vocab) if config.get("embedding_size") is not None else vocab,
        width=size(config, "hidden_size"),
        layers=size(config, "num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        heads_kv=heads_kv,
        head_dim=head_dim,
        mlp_width=size(config, "intermediate_size") // 2,
        rotary=RotaryConfig(positive(config, "rope_theta"), head_dim),
        context=size(config, "max_position_embeddings", least=SHORTEST_CONTEXT),
        norm_eps=positive(config, "layer_norm_eps"),
        block="norm_after" if optional(config, "norm_after", False) else "sequential",
        qkv_bias=choice(config, "qkv_bias", tensors, "att_proj.bias"),
        qk_norm=choice(config, "attention_layer_norm", tensors, "q_norm.weight"),
    )


def choice(config: Mapping[str, Any], name: str, tensors: TensorFiles, leaf: str) -> bool:
    """A choice that is off where ``config.json`` is silent; then its tensors must be absent too."""
    chosen = optional(config, name, False)
    tensor = f"{PREFIX}blocks.0.{leaf}"
    if not chosen and tensor in tensors.files:
        raise CheckpointError(
            f"config.json field {name} is {shortened(config.get(name))}, but there is a tensor {tensor}; "
            "the configuration belongs to other weights"
        )
    return chosen


def extra_rows(config: Mapping[str, Any], tensors: TensorFiles) -> int:
    """Rows of the second embedding table, which holds the image tokens."""
    shape = tensors.shape(NEW_ROWS)
    found = shape[0] if shape else 0
    stated = optional(config, "additional_vocab_size", found)
    if stated != found:
        raise CheckpointError(
            f"tensor {NEW_ROWS} has shape {list(shape)}, expected {stated} rows from additional_vocab_size of "
            "config.json; the configuration belongs to other weights"
        )
    return found


def decoder_names(config: Mapping[str, Any], tensors: TensorFiles, decoder: DecoderConfig) -> Names:
    """From ``Decoder``'s names; packed rows are query, key, value and up, gate.

    The published code has a head of its own whatever the configuration says about tying, so a tied head is one
    that is not there.
    """
    tied = optional(config, "weight_tying", False) or optional(config, "tie_word_embeddings", False)
    head = TABLE if tied and HEAD not in tensors.files else HEAD
    query, kv, mlp = decoder.heads * decoder.head_dim, decoder.heads_kv * decoder.head_dim, decoder.mlp_width
    starts = {"q": 0, "k": query, "v": query + kv, "up": 0, "gate": mlp}

    def packed(found: re.Match[str]) -> Rows:
        part, total = ("att_proj", query + 2 * kv) if found["part"] in "qkv" else ("ff_proj", 2 * mlp)
        return Rows(f"{PREFIX}blocks.{found[1]}.{part}.{found['leaf']}", starts[found["part"]], total)

    layer, block = r"model\.layers\.(\d+)\.", rf"{PREFIX}blocks.\1."
    return Names(
        (
            (r"lm_head\.weight", lambda _: Whole(head)),
            renamed(r"model\.norm\.weight", f"{PREFIX}ln_f.weight"),
            (layer + r"(?:self_attn|mlp)\.(?P<part>q|k|v|up|gate)_proj\.(?P<leaf>weight|bias)", packed),
            renamed(layer + r"self_attn\.o_proj\.weight", block + "attn_out.weight"),
            renamed(layer + r"self_attn\.(q|k)_norm\.weight", block + r"\2_norm.weight"),
            renamed(layer + r"mlp\.down_proj\.weight", block + "ff_out.weight"),
            renamed(layer + r"input_layernorm\.weight", block + "attn_norm.weight"),
            renamed(layer + r"post_attention_layernorm\.weight", block + "ff_norm.weight"),
        )
    )


def peer(decoder: DecoderConfig, names: Names) -> Peer | None:
    """Transformers' class of the same arithmetic; Olmo2 calls the norms after where they stand, behind their parts."""
    after = decoder.block == "norm_after"
    kind = PEERS.get((after, decoder.qk_norm, decoder.qkv_bias))
    if kind is None:
        return None
    config = {
        **peer_sizes(decoder),
        "rms_norm_eps": decoder.norm_eps,
    }
    layer, block = r"model\.layers\.(\d+)\.", rf"{PREFIX}blocks.\1."
    behind = (
        renamed(layer + r"post_attention_layernorm\.weight", block + "attn_norm.weight"),
        renamed(layer + r"post_feedforward_layernorm\.weight", block + "ff_norm.weight"),
    )
    table = (r"model\.embed_tokens\.weight", lambda _: Whole(TABLE))
    return Peer(kind, config, Names((table, *(behind if after else ()), *names.rules)))
