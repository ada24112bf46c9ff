"""InternVL2 with Qwen2, InternLM2 or Phi-3 (published 1B, 2B, 8B, 4B), and LinVT-InternVL2 on top of it.

Facts from OpenGVLab/InternVL (August 2024): InternViT-300M, pixel shuffle and MLP, one tile per frame resized without
keeping its aspect, ImageNet mean and std, conversations whose separator has no newline after it. The InternViT-6B
variants and Llama are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from export.checkpoint import Checkpoint
from export.connector.pixel_shuffle import PixelShuffleMLP
from export.families.base import Backbone, FrameRoute, Layout, PromptFacts, filled
from export.fields import MOST_LAYERS, divided, field, one_of, optional, positive, shortened, size
from export.llm.base import LLM
from export.llm.internlm2 import internlm2_llm
from export.llm.phi3 import phi3_llm
from export.llm.qwen2 import qwen2_llm
from export.load import Names, prefixed
from export.vision.internvit import InternViT, InternViTConfig
from export.vision.stage import VisionStage
from runtime.errors import CheckpointError
from runtime.preprocess import MAX_SIDE, Preprocess

__all__ = ["INTERNVL2"]

SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SMALLEST_RATIO = 1 / 64  # of patches to tokens along one side

VISUAL = "<IMG_CONTEXT>"
CONTROL = (VISUAL, "<img>", "</img>")
SENTENCEPIECE = ("<s>", "</s>")

CONVERSATION = """\
@START-SYSTEM@
{{ system }}@END@
{%- for message in messages -%}
@START-ROLE@
{% if message.content is string %}{{ message.content }}{% else %}
{% for part in message.content %}
{% if part.type == "video" %}@VIDEO@{% elif part.type == "image" %}@IMAGE@{% else %}{{ part.text }}{% endif %}
{% endfor %}
{% endif %}
@END@
{%- endfor -%}
{% if add_generation_prompt %}@START-ASSISTANT@
{% endif %}
"""
IMAGE = "{{ 'Image-' ~ loop.index ~ ': ' if images > 1 else '' }}<img>{{ image_token * image_tokens }}</img>{{ '\\n' }}"
LAYOUTS = {
    "video": "<img>{{ visual_token * tokens }}</img>{{ '\\n' }}",
    "training": "{% for row in range(tokens) %}Frame{{ loop.index }}: <img>{{ visual_token }}</img>"
    "{{ '' if loop.last else '\\n' }}{% endfor %}",
    "frames": "{% for frame in range(frames) %}Frame{{ loop.index }}: <img>{{ visual_token * tokens }}</img>"
    "{{ '\\n' }}{% endfor %}",
}


@dataclass(frozen=True)
class Conversation:
    """One of the published ``conv_templates``.

    Attributes:
        start: begins a turn; its number sign stands for the role.
        end: ends a turn.
        control: further tokens that a question may not contain.
    """

    start: str
    end: str
    control: tuple[str, ...]

    def template(self, video: str) -> str:
        """The chat template with ``video`` where a message holds one."""
        text = CONVERSATION.replace("@START-ROLE@", self.start.replace("#", "{{ message.role }}"))
        for role in ("system", "assistant"):
            text = text.replace(f"@START-{role.upper()}@", self.start.replace("#", role))
        return filled(text.replace("@END@", self.end), video=video, image=IMAGE)

    def facts(self, system: str, *, add_special_tokens: bool) -> PromptFacts:
        """All layouts of this conversation."""
        return PromptFacts(
            system=system,
            layouts={name: Layout(self.template(video), VISUAL) for name, video in LAYOUTS.items()},
            image_token=VISUAL,
            end_token=self.end,
            reserved=(*CONTROL, *self.control, "<|endoftext|>", *(SENTENCEPIECE if add_special_tokens else ())),
            add_special_tokens=add_special_tokens,
        )


CHATML = Conversation("<|im_start|>#", "<|im_end|>", ("<|im_start|>", "<|im_end|>"))
PHI3_CHAT = Conversation("<|#|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"))
CONVERSATIONS = {"Hermes-2": CHATML, "internlm2-chat": CHATML, "phi3-chat": PHI3_CHAT}


class InternVL2:
    """The family's facts."""

    name = "internvl2"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is an InternVL chat model's."""
        return config.get("model_type") == "internvl_chat"

    def backbone(self, checkpoint: Checkpoint, route: FrameRoute) -> Backbone:
        """Read the facts of one checkpoint."""
        route.refuse_choices(self.name)
        config = checkpoint.config
        one_of(config, "pad2square", False)
        tower = tower_config(config)
        spoken = language(config)
        llm = spoken.read(config, "llm_config.", "language_model.")
        if not tower.qkv_bias and (bias := "vision_model.encoder.layers.0.attn.qkv.bias") in checkpoint.tensors.files:
            raise CheckpointError(
                f"config.json field vision_config.qkv_bias is false, but there is a tensor {bias}; the configuration "
                "belongs to other weights"
            )
        block = shuffle_block(config, tower)
        version = one_of(config, "ps_version", "v1", "v2")
        return Backbone(
            family=self.name,
            tower_blocks=tower.layers,
            tokens_per_frame=(tower.grid // block) ** 2,
            vision=lambda: VisionStage(
                InternViT(tower), PixelShuffleMLP(tower.width, llm.config.width, block=block, version=version)
            ),
            vision_names=Names((prefixed("tower.", "vision_model."), prefixed("connector.", ""))),
            llm=llm,
            preprocess=Preprocess(size=(tower.image_size, tower.image_size), mean=IMAGENET_MEAN, std=IMAGENET_STD),
            prompt=prompt_facts(config, spoken),
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


@dataclass(frozen=True)
class Language:
    """How one of ``llm_config.architectures`` is read.

    Attributes:
        read: from ``config.json``, the path of its fields and the prefix of its tensors.
        template: the conversation it is published with.
        leading_token: its tokenizer puts ``<s>`` in front.
    """

    read: Callable[[Mapping[str, Any], str, str], LLM]
    template: str
    leading_token: bool


def plain_qwen2(config: Mapping[str, Any], path: str, prefix: str) -> LLM:
    """Qwen2 without scaled positions."""
    if config["llm_config"].get("rope_scaling"):
        raise CheckpointError("config.json: llm_config.rope_scaling is set; only plain rotary positions work")
    return qwen2_llm(config, path, prefix)


LANGUAGES = {
    "InternLM2ForCausalLM": Language(internlm2_llm, "internlm2-chat", leading_token=True),
    "Phi3ForCausalLM": Language(phi3_llm, "phi3-chat", leading_token=True),
    "Qwen2ForCausalLM": Language(plain_qwen2, "Hermes-2", leading_token=False),
}


def language(config: Mapping[str, Any]) -> Language:
    """The LLM of a checkpoint; the published code looks at the first of ``architectures``."""
    architectures = field(config, "llm_config", dict).get("architectures")
    for name, found in LANGUAGES.items():
        if architectures == [name]:
            return found
    supported = ", ".join(repr([name]) for name in LANGUAGES)
    raise CheckpointError(
        f"config.json: llm_config.architectures is {shortened(architectures)}; supported: {supported}"
    )


def prompt_facts(config: Mapping[str, Any], llm: Language) -> PromptFacts:
    """The conversation of a checkpoint, and its own system text where it has one."""
    template = one_of(config, "template", llm.template, *(name for name in CONVERSATIONS if name != llm.template))
    system = optional(config, "system_message", SYSTEM)
    return CONVERSATIONS[template].facts(system, add_special_tokens=llm.leading_token)


INTERNVL2 = InternVL2()
