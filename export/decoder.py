"""One decoder-only LLM that covers the backbones by configuration.

Tensor names are those of transformers' Qwen2 and Llama; a family whose checkpoint names or packs them otherwise
converts while loading. ``forward`` is the plain causal form over a whole sequence and serves as the reference;
``step`` is the same arithmetic over a preallocated KV cache, the form that is exported.

Holds neither sampling nor token ids: embeddings in, logits out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.linvt.attend import merge_heads, split_heads
from export.ops import attention, rms_norm, rotary, scatter_rows

__all__ = ["Decoder", "DecoderConfig", "KVCache"]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and choices of the LLM.

    Attributes:
        context: the longest sequence, in tokens, the positions were trained for.
        qkv_bias: query, key and value projections have biases (Qwen2).
        tied: the output head is the embedding table.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    heads_kv: int
    head_dim: int
    mlp_width: int
    rope_theta: float
    context: int
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    tied: bool = False


class KVCache(NamedTuple):
    """Keys and values of one layer, each (B, heads_kv, P, head_dim), and where the new rows go (B,)."""

    key: Tensor
    value: Tensor
    write_index: Tensor


class RMSNorm(nn.Module):
    """RMS norm with a learned scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return rms_norm(states, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.heads_kv = config.heads, config.heads_kv
        query_width, kv_width = config.heads * config.head_dim, config.heads_kv * config.head_dim
        self.q_proj = nn.Linear(config.width, query_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_width, config.width, bias=False)

    def forward(
        self, states: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) -> (B, S, D) and the keys and values that were looked at."""
        query = rotary(split_heads(self.q_proj(states), self.heads), *angles)
        key = rotary(split_heads(self.k_proj(states), self.heads_kv), *angles)
        value = split_heads(self.v_proj(states), self.heads_kv)
        if cache is not None:
            key = scatter_rows(cache.key, key, cache.write_index)
            value = scatter_rows(cache.value, value, cache.write_index)
        attended = merge_heads(attention(query, key, value, mask))
        return self.o_proj(attended), key, value


class SwiGLU(nn.Module):
    """Gated MLP."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        projected: Tensor = self.down_proj(functional.silu(self.gate_proj(states)) * self.up_proj(states))
        return projected


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self, states: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) -> (B, S, D), keys, values."""
        attended, key, value = self.self_attn(self.input_layernorm(states), angles, mask, cache)
        states = states + attended
        return states + self.mlp(self.post_attention_layernorm(states)), key, value


class Transformer(nn.Module):
    """Embedding table, layers and final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)


class Decoder(nn.Module):
    """Embeddings in, logits out."""

    inverse_frequencies: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        self.lm_head = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        exponents = torch.arange(0, config.head_dim, 2, device="cpu", dtype=torch.float32) / config.head_dim
        self.register_buffer("inverse_frequencies", config.rope_theta**-exponents, persistent=False)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, S) int64 -> (B, S, D)."""
        rows: Tensor = self.model.embed_tokens(input_ids)
        return rows

    def angles(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B, S) int64 -> cosines and sines, each (B, S, head_dim / 2)."""
        angles = position_ids[..., None].to(torch.float32) * self.inverse_frequencies
        return angles.cos(), angles.sin()

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """A whole sequence (B, S, D) at positions (B, S) -> logits (B, S, V).

        ``key_mask`` (B, S) bool is False on padded rows.
        """
        rows = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        mask = (rows[:, None] >= rows)[None, None]  # (1, 1, S, S)
        if key_mask is not None:
            mask = mask & key_mask[:, None, None]
        logits: Tensor = self.lm_head(self.model.norm(self.run(inputs_embeds, position_ids, mask)[0]))
        return logits

    def step(self, inputs_embeds: Tensor, position_ids: Tensor, caches: list[KVCache]) -> tuple[Tensor, list[Tensor]]:
        """New rows (B, S, D) after what the caches hold -> logits of the last row (B, V), keys and values.

        Row s goes to cache slot ``write_index + s`` and sees the slots up to its own. The second result
        alternates key and value of every layer, each (B, heads_kv, P, head_dim).
        """
        device = inputs_embeds.device
        slots = torch.arange(caches[0].key.shape[2], device=device)
        rows = caches[0].write_index[:, None] + torch.arange(inputs_embeds.shape[1], device=device)  # (B, S)
        mask = (slots <= rows[..., None])[:, None]  # (B, 1, S, P)
        states, present = self.run(inputs_embeds, position_ids, mask, caches)
        return self.lm_head(self.model.norm(states[:, -1:]))[:, 0], present

    def run(
        self, states: Tensor, position_ids: Tensor, mask: Tensor, caches: list[KVCache] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers: (B, S, D) before the final norm, and keys and values of every layer."""
        angles = self.angles(position_ids)
        present: list[Tensor] = []
        for index, layer in enumerate(self.model.layers):
            states, key, value = layer(states, angles, mask, caches[index] if caches else None)
            present += [key, value]
        return states, present
