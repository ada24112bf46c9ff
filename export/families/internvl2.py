"""InternVL2 with a Qwen2 LLM (published 1B layout), and LinVT-InternVL2 on top of it.

Facts from OpenGVLab/InternVL (August 2024): InternViT-300M, pixel shuffle and MLP, one tile per frame resized without
keeping its aspect, ImageNet mean and std, the Hermes-2 conversation, whose separator has no newline after it. The
InternViT-6B variants and other LLMs are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from export.checkpoint import Checkpoint
from export.connector.pixel_shuffle import PixelShuffleMLP
from export.decoder import DecoderConfig
from export.families.base import Backbone, PromptFacts, divided, field, one_of, optional, positive, shortened, size
from export.load import Names
from export.vision.internvit import InternViT, InternViTConfig
from runtime.errors import CheckpointError
from runtime.preprocess import MAX_SIDE, Preprocess

__all__ = ["INTERNVL2"]

SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MOST_LAYERS = 1024  # of tower or LLM; building a module for a mistyped number would not end
SHORTEST_CONTEXT = 64  # tokens; the template alone takes about as many
SMALLEST_RATIO = 1 / 64  # of patches to tokens along one side

CONVERSATION = """\
<|im_start|>system
{{ system }}<|im_end|>
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{% for part in message.content %}
{% if part.type == "video" %}@VIDEO@{% else %}{{ part.text }}{% endif %}
{% endfor %}
{% endif %}
<|im_end|>
{%- endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""


class Vision(nn.Module):
    """Tower and connector as one stage."""

    def __init__(self, tower: InternViTConfig, width: int, block: int, version: str) -> None:
        super().__init__()
        self.tower = InternViT(tower)
        self.connector = PixelShuffleMLP(tower.width, width, block=block, version=version)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(F, 3, H, W) -> (F, N, D)."""
        tokens: Tensor = self.connector(self.tower(pixel_values))
        return tokens


class InternVL2:
    """The family's facts."""

    name = "internvl2"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is an InternVL chat model's."""
        return config.get("model_type") == "internvl_chat"

    def backbone(self, checkpoint: Checkpoint) -> Backbone:
        """Read the facts of one checkpoint."""
        config = checkpoint.config
        tower = tower_config(config)
        decoder = decoder_config(config)
        block = shuffle_block(config, tower)
        version = one_of(config, "ps_version", "v1", "v2")
        return Backbone(
            family=self.name,
            tokens_per_frame=(tower.grid // block) ** 2,
            vision=lambda: Vision(tower, decoder.width, block, version),
            vision_names=Names((("tower.", "vision_model."), ("connector.", ""))),
            decoder=decoder,
            decoder_names=Names((("", "language_model."),)),
            preprocess=Preprocess(size=(tower.image_size, tower.image_size), mean=IMAGENET_MEAN, std=IMAGENET_STD),
            prompt=PROMPT,
        )


def tower_config(config: Mapping[str, Any]) -> InternViTConfig:
    """InternViT's sizes from ``config.json``."""
    vision = field(config, "vision_config", dict)
    if vision.get("norm_type", "layer_norm") != "layer_norm" or vision.get("qk_normalization"):
        raise CheckpointError(
            "config.json: vision_config is InternViT-6B (RMS norm, normed queries and keys), which is not "
            "supported; InternVL2 1B to 8B use the 300M tower"
        )
    layers = size(config, "vision_config.num_hidden_layers", most=MOST_LAYERS)
    select = optional(config, "select_layer", -1)
    if not -layers <= select <= -1:
        raise CheckpointError(f"config.json field select_layer is {select}, expected {-layers} to -1")
    one_of(config, "vision_config.hidden_act", "gelu")
    one_of(config, "vision_config.num_channels", 3)
    tower = InternViTConfig(
        width=size(config, "vision_config.hidden_size"),
        heads=size(config, "vision_config.num_attention_heads"),
        layers=layers,
        mlp_width=size(config, "vision_config.intermediate_size"),
        patch_size=size(config, "vision_config.patch_size", most=MAX_SIDE),
        image_size=size(config, "vision_config.image_size", most=MAX_SIDE),
        norm_eps=positive(config, "vision_config.layer_norm_eps"),
        qkv_bias=optional(config, "vision_config.qkv_bias", True),
        select_layer=select,
    )
    divided(config, "vision_config.hidden_size", "vision_config.num_attention_heads")
    divided(config, "vision_config.image_size", "vision_config.patch_size")
    forced = optional(config, "force_image_size", tower.image_size)
    if forced != tower.image_size:
        raise CheckpointError(
            f"config.json: force_image_size {forced} differs from vision_config.image_size {tower.image_size}; "
            "published checkpoints have them equal"
        )
    return tower


def shuffle_block(config: Mapping[str, Any], tower: InternViTConfig) -> int:
    """Side of the square of patches that becomes one token, from ``downsample_ratio``."""
    ratio = optional(config, "downsample_ratio", 0.5)
    block = round(1 / ratio) if SMALLEST_RATIO <= ratio <= 1 else 0
    if not block or tower.grid % block:
        raise CheckpointError(
            f"config.json field downsample_ratio is {ratio}, expected 1 / n where n divides the {tower.grid} "
            "patches a side; published checkpoints have 0.5"
        )
    return block


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The LLM's sizes from ``config.json``."""
    check_llm(config)
    divided(config, "llm_config.num_attention_heads", "llm_config.num_key_value_heads")
    return DecoderConfig(
        vocab=size(config, "llm_config.vocab_size"),
        width=size(config, "llm_config.hidden_size"),
        layers=size(config, "llm_config.num_hidden_layers", most=MOST_LAYERS),
        heads=size(config, "llm_config.num_attention_heads"),
        heads_kv=size(config, "llm_config.num_key_value_heads"),
        head_dim=head_size(config),
        mlp_width=size(config, "llm_config.intermediate_size"),
        rope_theta=positive(config, "llm_config.rope_theta"),
        context=size(config, "llm_config.max_position_embeddings", least=SHORTEST_CONTEXT),
        norm_eps=positive(config, "llm_config.rms_norm_eps"),
        tied=optional(config, "llm_config.tie_word_embeddings", False),
    )


def check_llm(config: Mapping[str, Any]) -> None:
    """Refuse by name what is published with other LLMs or would change their arithmetic."""
    llm = field(config, "llm_config", dict)
    if (architectures := llm.get("architectures")) != ["Qwen2ForCausalLM"]:
        raise CheckpointError(
            f"config.json: llm_config.architectures is {shortened(architectures)}; supported: ['Qwen2ForCausalLM']"
        )
    if llm.get("rope_scaling"):
        raise CheckpointError("config.json: llm_config.rope_scaling is set; only plain rotary positions work")
    one_of(config, "template", "Hermes-2")
    one_of(config, "llm_config.hidden_act", "silu")
    one_of(config, "llm_config.use_sliding_window", False)


def head_size(config: Mapping[str, Any]) -> int:
    """Channels of one attention head; rotary positions turn them in pairs."""
    given = optional(config, "llm_config.head_dim", 0)
    found = given or divided(config, "llm_config.hidden_size", "llm_config.num_attention_heads")
    if found % 2 or not 2 <= found <= size(config, "llm_config.hidden_size"):
        raise CheckpointError(f"config.json: llm_config gives heads of {found} channels, expected an even number")
    return found


def conversation(video: str) -> str:
    """The chat template with ``video`` where a message holds the video."""
    return CONVERSATION.replace("@VIDEO@", video)


PROMPT = PromptFacts(
    system=SYSTEM,
    templates={
        "video": conversation("<img>{{ visual_token * tokens }}</img>{{ '\\n' }}"),
        "training": conversation(
            "{% for row in range(tokens) %}Frame{{ loop.index }}: <img>{{ visual_token }}</img>"
            "{{ '' if loop.last else '\\n' }}{% endfor %}"
        ),
        "frames": conversation(
            "{% for frame in range(frames) %}Frame{{ loop.index }}: <img>{{ visual_token * tokens }}</img>"
            "{{ '\\n' }}{% endfor %}"
        ),
    },
    visual_token="<IMG_CONTEXT>",
    end_token="<|im_end|>",
    reserved=("<IMG_CONTEXT>", "<img>", "</img>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"),
)

INTERNVL2 = InternVL2()
