"""One decoder-only LLM that covers the backbones by configuration.

Tensor names are those of transformers' Qwen2 and Llama; an LLM that is stored otherwise says so in its ``Names``.
``forward`` is the plain causal form over a whole sequence and serves as the reference; ``step`` is the same arithmetic
over a preallocated KV cache, the form that is exported.

Holds neither sampling nor token ids nor the embedding table: embeddings in, logits out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.ops import attention, merge_heads, rms_norm, rotary, scatter_rows, split_heads
from export.rotary import Angles, RotaryConfig

__all__ = ["Decoder", "DecoderConfig", "KVCache"]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and choices of the LLM.

    Attributes:
        vocab: V, number of logits; the embedding table may have more rows.
        context: the longest sequence, in tokens, the positions were trained for.
        norm: "rms" (Llama's) or "layer" (with bias, Phi-2's).
        mlp: "swiglu", or "gelu" for two layers with the tanh form of GELU (Phi-2).
        block: "sequential"; "parallel" feeds attention and MLP from one norm (Phi-2); "norm_after" norms their outputs
            and not their inputs (OLMo).
        qkv_bias: query, key and value projections have biases.
        bias: all other projections of a layer have biases.
        head_bias: the output head has one.
        qk_norm: queries and keys are normed over their whole width before the heads are split.
        window: a row sees so many rows before it and itself; 0 for all.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    heads_kv: int
    head_dim: int
    mlp_width: int
    rotary: RotaryConfig
    context: int
    norm_eps: float = 1e-6
    norm: Literal["rms", "layer"] = "rms"
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    block: Literal["sequential", "parallel", "norm_after"] = "sequential"
    qkv_bias: bool = True
    bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    window: int = 0


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


NORMS: dict[str, type[RMSNorm] | type[nn.LayerNorm]] = {"rms": RMSNorm, "layer": nn.LayerNorm}


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.heads_kv = config.heads, config.heads_kv
        query_width, kv_width = config.heads * config.head_dim, config.heads_kv * config.head_dim
        self.q_proj = nn.Linear(config.width, query_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_width, config.width, bias=config.bias)
        self.q_norm = RMSNorm(query_width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(kv_width, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, states: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) -> (B, S, D) and the keys and values that were looked at."""
        query = rotary(split_heads(self.q_norm(self.q_proj(states)), self.heads), *angles)
        key = rotary(split_heads(self.k_norm(self.k_proj(states)), self.heads_kv), *angles)
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
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=config.bias)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=config.bias)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=config.bias)

    def forward(self, states: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        projected: Tensor = self.down_proj(functional.silu(self.gate_proj(states)) * self.up_proj(states))
        return projected


class GELUMLP(nn.Module):
    """Two layers with the tanh form of GELU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width, bias=config.bias)
        self.fc2 = nn.Linear(config.mlp_width, config.width, bias=config.bias)

    def forward(self, states: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        projected: Tensor = self.fc2(functional.gelu(self.fc1(states), approximate="tanh"))
        return projected


MLPS: dict[str, type[SwiGLU] | type[GELUMLP]] = {"swiglu": SwiGLU, "gelu": GELUMLP}


class DecoderLayer(nn.Module):
    """Pre-norm attention, then pre-norm MLP."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        norm = NORMS[config.norm]
        self.self_attn = SelfAttention(config)
        self.mlp = MLPS[config.mlp](config)
        self.input_layernorm = norm(config.width, config.norm_eps)
        self.post_attention_layernorm = norm(config.width, config.norm_eps)

    def forward(
        self, states: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) -> (B, S, D), keys, values."""
        attended, key, value = self.self_attn(self.input_layernorm(states), angles, mask, cache)
        states = states + attended
        return states + self.mlp(self.post_attention_layernorm(states)), key, value


class ParallelLayer(nn.Module):
    """Attention and MLP side by side on one norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = MLPS[config.mlp](config)
        self.input_layernorm = NORMS[config.norm](config.width, config.norm_eps)

    def forward(
        self, states: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) -> (B, S, D), keys, values."""
        normed = self.input_layernorm(states)
        attended, key, value = self.self_attn(normed, angles, mask, cache)
        return attended + self.mlp(normed) + states, key, value


class NormAfterLayer(DecoderLayer):
    """The same parts as ``DecoderLayer``, with each norm behind its part."""

    def forward(
        self, states: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) -> (B, S, D), keys, values."""
        attended, key, value = self.self_attn(states, angles, mask, cache)
        states = states + self.input_layernorm(attended)
        return states + self.post_attention_layernorm(self.mlp(states)), key, value


LAYERS: dict[str, type[DecoderLayer] | type[ParallelLayer]] = {
    "sequential": DecoderLayer,
    "parallel": ParallelLayer,
    "norm_after": NormAfterLayer,
}


class Transformer(nn.Module):
    """Layers and final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LAYERS[config.block](config) for _ in range(config.layers))
        self.norm = NORMS[config.norm](config.width, config.norm_eps)


class Decoder(nn.Module):
    """Embeddings in, logits out."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        self.lm_head = nn.Linear(config.width, config.vocab, bias=config.head_bias)
        self.angles = Angles(config.rotary)

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """A whole sequence (B, S, D) at positions (B, S), or (3, B, S) for M-RoPE -> logits (B, S, V).

        ``key_mask`` (B, S) bool is False on padded rows.
        """
        rows = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        mask = self.seen(rows, rows[:, None])[None, None]  # (1, 1, S, S)
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
        mask = self.seen(slots, rows[..., None])[:, None]  # (B, 1, S, P)
        states, present = self.run(inputs_embeds, position_ids, mask, caches)
        return self.lm_head(self.model.norm(states[:, -1:]))[:, 0], present

    def seen(self, slots: Tensor, rows: Tensor) -> Tensor:
        """Which ``slots`` each of ``rows`` may look at, as bool of their common shape."""
        mask = slots <= rows
        return mask & (slots >= rows - self.config.window) if self.config.window else mask

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
