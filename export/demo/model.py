"""The demo model: InternViT, pixel shuffle, LinVT and a Qwen2-shaped decoder, all tiny, for training.

The modules are the exporter's own. Here they are joined, and questions of one video share its visual tokens, the
fixed system text is computed once per batch: the same numbers as row by row, with less work.
Does not generate text (``answer``) and does not know file formats (``layout``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from export.connector.pixel_shuffle import PixelShuffleMLP
from export.decoder import Decoder, DecoderConfig, KVCache
from export.linvt import TTA, LinVT, LinVTConfig
from export.linvt.tta import TTALayer
from export.rotary import RotaryConfig
from export.vision.internvit import InternViT, InternViTConfig

__all__ = ["DECODER", "LINVT", "VISION", "DemoModel", "Refined", "Rows", "decoder_config"]

VISION = InternViTConfig(width=128, heads=4, layers=4, mlp_width=384, patch_size=8, image_size=64)
LINVT = LinVTConfig(
    width=160,
    heads=4,
    layers=3,
    top_k=48,
    queries=16,
    axes="paper",
    select_from="refined",
    positions="absolute",
    query_self_attention="full",
    residual="add",
    order="position",
    tokens_per_frame=16,
    max_frames=32,
)
DECODER = DecoderConfig(
    vocab=0,  # known once the tokenizer is trained
    width=160,
    layers=4,
    heads=4,
    heads_kv=2,
    head_dim=40,
    mlp_width=432,
    rotary=RotaryConfig(10000.0, 40),
    context=512,
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Refined(NamedTuple):
    """The SVR's tokens before selection (B, T, N, D), scores (B, T * N) and pooled tokens (B, M, D)."""

    tokens: Tensor
    scores: Tensor
    visual: Tensor


class Rows(NamedTuple):
    """Prompts with answers, R = videos * questions, the questions of a video side by side.

    ``text`` (R, S) holds the question alone and ``text_mask`` (R, 1, 1, S) its real tokens. ``ids`` (R, L) holds
    what follows the fixed prefix, from <img> to the answer's end; ``targets`` (R, L) the next token where it
    belongs to the answer, else -100.
    """

    text: Tensor
    text_mask: Tensor
    ids: Tensor
    targets: Tensor


def decoder_config(vocab: int) -> DecoderConfig:
    """The decoder's sizes for a vocabulary."""
    return replace(DECODER, vocab=vocab)


class LanguageModel(Decoder):
    """The decoder with its embedding table, which is trained with it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model.embed_tokens = nn.Embedding(config.vocab, config.width)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, S) int64 -> (B, S, D)."""
        rows: Tensor = self.model.get_submodule("embed_tokens")(input_ids)
        return rows


class DemoModel(nn.Module):
    """All trained parts; attribute names are those of the published prefixes where they have one."""

    mean: Tensor
    std: Tensor

    def __init__(self, decoder: DecoderConfig) -> None:
        super().__init__()
        self.vision_model = InternViT(VISION)
        self.connector = PixelShuffleMLP(VISION.width, LINVT.width)
        self.linvt = LinVT(LINVT)
        self.language_model = LanguageModel(decoder)
        self.register_buffer("mean", torch.tensor(MEAN) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD) * 255, persistent=False)

    def patches(self, frames: Tensor) -> Tensor:
        """Frames (B, T, H, W, 3) uint8 -> patch features (B * T, patches, E)."""
        features: Tensor = self.vision_model(self.pixels(frames.flatten(0, 1)))
        return features

    def pixels(self, frames: Tensor) -> Tensor:
        """Frames (F, H, W, 3) uint8 -> normalised (F, 3, H, W) f32."""
        normal: Tensor = (frames.float() - self.mean) / self.std
        return normal.permute(0, 3, 1, 2).contiguous()

    def crop_patches(self, frames: Tensor, places: Tensor) -> Tensor:
        """Crops (B, h, w, 3) uint8 whose patches stand at ``places`` (B, P) of a frame -> (B, P, E)."""
        parts = self.vision_model.embeddings
        table = parts.position_embedding[0]
        patches = parts.patch_embedding(self.pixels(frames)).flatten(2).transpose(1, 2) + table[1 + places]
        first = (parts.class_embedding + table[0]).expand(len(frames), -1, -1)
        states = torch.cat((first, patches), dim=1)
        for block in self.vision_model.encoder.layers:
            states = block(states)
        features: Tensor = states[:, 1:]
        return features

    def tokens(self, frames: Tensor) -> Tensor:
        """Frames (B, T, H, W, 3) uint8 -> (B, T, N, D)."""
        clip_tokens: Tensor = self.connector(self.patches(frames)).unflatten(0, frames.shape[:2])
        return clip_tokens

    def refine(self, tokens: Tensor) -> Refined:
        """Frame tokens (B, T, N, D) through the SVR, keeping what an extra loss looks at."""
        svr = self.linvt.svr
        refined = svr.attend(svr.place(tokens))
        scores = svr.score(refined)
        return Refined(refined, scores, svr.pool(refined.flatten(1, 2), svr.select(scores)))

    def forward(self, visual: Tensor, rows: Rows, prefix: Tensor) -> Tensor:
        """Pooled tokens (B, M, D), R rows of their questions and prefix ids (1, P) -> logits (R, L, V)."""
        embed = self.language_model.embed
        queries = self.linvt.query_tokens.expand(rows.ids.shape[0], -1, -1)
        video = aggregate(self.linvt.tta, queries, visual, embed(rows.text), rows.text_mask)
        states = embed(rows.ids)
        states = torch.cat((states[:, :1], video, states[:, 1 + LINVT.queries :]), dim=1)
        return after_prefix(self.language_model, embed(prefix), states)


def aggregate(tta: TTA, query: Tensor, visual: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """``tta`` for R = B * n questions about B videos: queries (R, Q, D), visual (B, M, D) -> (R, Q, D)."""
    shape = query.shape

    def by_video(rows: Tensor) -> Tensor:
        return rows.reshape(visual.shape[0], -1, shape[-1])

    for layer in tta.layers_vt:
        assert isinstance(layer, TTALayer)
        query = layer.norm_self(query + layer.self_attention(query))
        seen = layer.visual_cross_attention(by_video(query), visual)
        query = layer.norm_cross_v(query + seen.reshape(shape))
        query = layer.norm_cross_t(query + layer.text_cross_attention(query, text, text_mask))
    aggregator = tta.layer_linagg.linear_aggregator
    weighed: Tensor = aggregator.weigh(by_video(query), visual, visual)
    rows: Tensor = weighed.reshape(shape)
    return rows


def after_prefix(decoder: Decoder, prefix: Tensor, states: Tensor) -> Tensor:
    """Logits (R, L, V) of rows (R, L, D) that all follow the same prefix (1, P, D), which runs once."""
    rows, length = states.shape[:2]
    start = prefix.shape[1]
    slots = torch.arange(start + length)
    places = slots[:start]
    _, kept = decoder.run(prefix, places[None], (places[:, None] >= places)[None, None])
    room = (0, 0, 0, length)
    padded = [nn.functional.pad(part, room).expand(rows, -1, -1, -1) for part in kept]
    index = torch.full((rows,), start)
    caches = [KVCache(key, value, index) for key, value in zip(padded[::2], padded[1::2], strict=True)]
    mask = (slots <= slots[start:, None])[None, None]  # (1, 1, L, P + L)
    hidden, _ = decoder.run(states, slots[None, start:], mask, caches)
    logits: Tensor = decoder.lm_head(decoder.model.norm(hidden))
    return logits
