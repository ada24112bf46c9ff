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
from export.families.base import Backbone, PromptFacts, field
from export.load import Names
from export.vision.internvit import InternViT, InternViTConfig
from runtime.errors import CheckpointError
from runtime.preprocess import Preprocess

__all__ = ["INTERNVL2"]

SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

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
        block = round(1 / field({"downsample_ratio": 0.5} | dict(config), "downsample_ratio", float))
        version = str(config.get("ps_version", "v1"))
        if tower.grid % block:
            raise CheckpointError(
                f"config.json: {tower.grid} patches a side do not divide into blocks of {block}; "
                "check force_image_size, patch_size and downsample_ratio"
            )
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
    tower = InternViTConfig(
        width=field(config, "vision_config.hidden_size", int),
        heads=field(config, "vision_config.num_attention_heads", int),
        layers=field(config, "vision_config.num_hidden_layers", int),
        mlp_width=field(config, "vision_config.intermediate_size", int),
        patch_size=field(config, "vision_config.patch_size", int),
        image_size=field(config, "vision_config.image_size", int),
        norm_eps=field(config, "vision_config.layer_norm_eps", float),
        qkv_bias=bool(vision.get("qkv_bias", True)),
        select_layer=config.get("select_layer", -1),
    )
    forced = config.get("force_image_size") or tower.image_size
    if forced != tower.image_size:
        raise CheckpointError(
            f"config.json: force_image_size {forced} differs from vision_config.image_size {tower.image_size}; "
            "published checkpoints have them equal"
        )
    return tower


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The LLM's sizes from ``config.json``."""
    architecture = (config.get("llm_config") or {}).get("architectures") or [None]
    if architecture[0] != "Qwen2ForCausalLM":
        raise CheckpointError(
            f"config.json: llm_config.architectures is {architecture[0]!r}; supported: Qwen2ForCausalLM"
        )
    if config["llm_config"].get("rope_scaling"):
        raise CheckpointError("config.json: llm_config.rope_scaling is set; only plain rotary positions work")
    if config.get("template", "Hermes-2") != "Hermes-2":
        raise CheckpointError(f"config.json: template is {config['template']!r}; supported: Hermes-2")
    heads = field(config, "llm_config.num_attention_heads", int)
    width = field(config, "llm_config.hidden_size", int)
    return DecoderConfig(
        vocab=field(config, "llm_config.vocab_size", int),
        width=width,
        layers=field(config, "llm_config.num_hidden_layers", int),
        heads=heads,
        heads_kv=field(config, "llm_config.num_key_value_heads", int),
        head_dim=config["llm_config"].get("head_dim") or width // heads,
        mlp_width=field(config, "llm_config.intermediate_size", int),
        rope_theta=field(config, "llm_config.rope_theta", float),
        context=field(config, "llm_config.max_position_embeddings", int),
        norm_eps=field(config, "llm_config.rms_norm_eps", float),
        tied=bool(config["llm_config"].get("tie_word_embeddings", False)),
    )


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
