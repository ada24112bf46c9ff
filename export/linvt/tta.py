"""TTA: a few queries read the pooled visual tokens and the question, then average visual tokens.

The last step weighs the *unprojected* visual tokens: every channel group of the result is a convex combination
of tokens that left the SVR. Its ``wv`` and ``dense`` exist in released checkpoints, and are not part of the
formula.
"""

from __future__ import annotations

from torch import Tensor, nn

from export.linvt.attend import CrossAttention, LoneAttention, PackedAttention
from runtime.linvt import LinVTConfig

__all__ = ["TTA"]


class TTALayer(nn.Module):
    """Self attention of the queries, then cross attention to the visual tokens and to the text; post-norm."""

    def __init__(self, config: LinVTConfig) -> None:
        super().__init__()
        kind = PackedAttention if config.query_self_attention == "full" else LoneAttention
        self.self_attention = kind(config.width, config.heads)
        self.visual_cross_attention = CrossAttention(config.width, config.heads)
        self.text_cross_attention = CrossAttention(config.width, config.heads)
        self.norm_self = nn.LayerNorm(config.width, config.norm_eps)
        self.norm_cross_v = nn.LayerNorm(config.width, config.norm_eps)
        self.norm_cross_t = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, query: Tensor, visual: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        """(B, Q, D), (B, M, D), (B, S, D) -> (B, Q, D)."""
        query = self.norm_self(query + self.self_attention(query))
        query = self.norm_cross_v(query + self.visual_cross_attention(query, visual))
        normed: Tensor = self.norm_cross_t(query + self.text_cross_attention(query, text, text_mask))
        return normed


class LinearAggregation(nn.Module):
    """The last attention, whose values are the visual tokens themselves."""

    def __init__(self, config: LinVTConfig) -> None:
        super().__init__()
        self.linear_aggregator = CrossAttention(config.width, config.heads)

    def forward(self, query: Tensor, visual: Tensor) -> Tensor:
        """(B, Q, D), (B, M, D) -> (B, Q, D)."""
        return self.linear_aggregator.weigh(query, visual, visual)


class TTA(nn.Module):
    """Text-conditioned token aggregation, under the released names."""

    def __init__(self, config: LinVTConfig) -> None:
        super().__init__()
        self.layers_vt = nn.ModuleList(TTALayer(config) for _ in range(config.layers))
        self.layer_linagg = LinearAggregation(config)

    def forward(self, query: Tensor, visual: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Queries (B, Q, D), pooled tokens (B, M, D), question rows (B, S, D) -> (B, Q, D).

        ``text_mask`` (B, 1, 1, S) bool is False on padded question rows.
        """
        for layer in self.layers_vt:
            query = layer(query, visual, text, text_mask)
        aggregated: Tensor = self.layer_linagg(query, visual)
        return aggregated
