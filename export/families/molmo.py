"""Molmo 7B-D and 7B-O: CLIP, attention pooling, an LLM in OLMo's naming.

Facts from allenai/Molmo-7B-D-0924 (``modeling_molmo.py``, ``image_preprocessing_molmo.py`` and
``preprocessing_molmo.py``). A frame is what that code calls the global image: the whole picture letterboxed into the
tower's square, with its true padding mask. The overlapping crops that follow it there are not made. MolmoE (a mixture
of experts) is refused.

No format with LinVT is published: its rows stand between one <im_start> and <im_end>, without column tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.checkpoint import Checkpoint
from export.connector.attention_pooling import AttentionPoolingMLP, PoolingConfig
from export.families.base import Backbone, FrameRoute, Layout, PromptFacts, filled
from export.fields import MOST_LAYERS, field, one_of, optional, positive, shortened, size
from export.llm.olmo import olmo_llm
from export.load import Names, Rearranged, Rule, prefixed, renamed
from export.vision.block import stacked_qkv
from export.vision.clip import CLIP, CLIPConfig
from export.vision.stage import VisionStage
from runtime.errors import CheckpointError
from runtime.preprocess import MAX_SIDE, Preprocess

__all__ = ["MOLMO"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Constants of modeling_molmo.py under the names MolmoE-1B's config.json has for them; a checkpoint may have its own.
VISION: Mapping[str, Any] = {
    "image_default_input_size": [336, 336],
    "image_patch_size": 14,
    "image_emb_dim": 1024,
    "image_num_heads": 16,
    "image_num_layers": 23,
    "image_mlp_dim": 4096,
    "image_mlp_activations": "quick_gelu",
    "image_norm_eps": 1e-5,
}
VIT_LAYERS = [-2, -9]
CONNECTOR: Mapping[str, Any] = {
    "image_padding_embed": "pad_and_partial_pad",
    "image_pooling_2d": "attention-meanq",
    "image_pooling_h": 2,
    "image_pooling_w": 2,
    "image_projector": "mlp",
    "use_cls_feature": False,
}

# The published processor puts pictures first, wherever they were in the talk, and each turn behind a space.
CONVERSATION = """\
@BOS@
{%- for message in messages if message.content is not string %}
{% for part in message.content %}
{% if part.type == "video" %}@VIDEO@{% elif part.type == "image" %}@IMAGE@{% endif %}
{% endfor %}
{% endfor %}
{% for message in messages %}
{{ " User: " if message.role == "user" else " Assistant: " }}
{%- if message.content is string %}{{ message.content }}{% else %}
{% for part in message.content if part.type == "text" %}{{ part.text }}{% endfor %}
{% endif %}
{% endfor %}
{{ " Assistant:" if add_generation_prompt else "" }}"""
VIDEO = "<im_start>{{ visual_token * tokens }}<im_end>"
PICTURE = "<im_start>{{ (@TOKEN@ * @SIDE@ + '<im_col>') * @SIDE@ }}<im_end>"
IMAGE_TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>")


class Molmo:
    """The family's facts."""

    name = "molmo"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is a Molmo's."""
        return config.get("model_type") == "molmo"

    def backbone(self, checkpoint: Checkpoint, route: FrameRoute) -> Backbone:
        """Read the facts of one checkpoint."""
        route.refuse_choices(self.name)
        config = checkpoint.config
        refuse_relatives(config)
        llm = olmo_llm(config, checkpoint.tensors)
        tower = tower_config(config)
        for name, value in CONNECTOR.items():
            one_of(config, name, value)
        connector = PoolingConfig(
            grid=tower.grid,
            features=tower.joined_width,
            pooled=tower.width,
            heads=tower.heads,
            mlp_width=llm.config.mlp_width,
            width=llm.config.width,
        )
        check_preprocessor(checkpoint.json("preprocessor_config.json"), tower, connector)
        return Backbone(
            family=self.name,
            tower_blocks=tower.stored,
            tokens_per_frame=connector.side**2,
            vision=lambda: VisionStage(CLIP(tower), AttentionPoolingMLP(connector)),
            vision_names=vision_names(tower),
            llm=llm,
            preprocess=Preprocess(
                size=(tower.image_size, tower.image_size),
                mean=CLIP_MEAN,
                std=CLIP_STD,
                resample="bilinear",
                fit="letterbox",
                mask_patch=tower.patch_size,
            ),
            prompt=prompt_facts(checkpoint, connector.side),
            merge="add",
        )


def refuse_relatives(config: Mapping[str, Any]) -> None:
    """MolmoE has the same model_type and other names for everything."""
    architectures = config.get("architectures")
    if architectures == ["OLMoForCausalLM"] or "d_model" in config or "moe_num_experts" in config:
        raise CheckpointError(
            "config.json is MolmoE's (architectures OLMoForCausalLM, d_model, moe_num_experts), whose mixture of "
            "experts is not supported; use Molmo-7B-D or Molmo-7B-O"
        )
    if architectures != ["MolmoForCausalLM"]:
        raise CheckpointError(
            f"config.json field architectures is {shortened(architectures)}; supported: ['MolmoForCausalLM']"
        )


def tower_config(config: Mapping[str, Any]) -> CLIPConfig:
    """The tower's sizes: the published constants or those in ``vision_backbone``."""
    given: dict[str, Any] = {"vision_backbone": {**VISION, **optional(config, "vision_backbone", {})}}
    path = "vision_backbone.image_"
    one_of(given, f"{path}model_type", "openai")
    one_of(given, "vision_backbone.resize_mode", "default")
    width, heads = size(given, f"{path}emb_dim"), size(given, f"{path}num_heads")
    one_of(given, f"{path}num_key_value_heads", heads)
    if heads * optional(given, f"{path}head_dim", width // heads) != width:
        raise CheckpointError(
            f"config.json: {path}num_heads {heads} with {path}head_dim "
            f"{shortened(given['vision_backbone'].get('image_head_dim'))} do not make {path}emb_dim {width}"
        )
    stored = size(given, f"{path}num_layers", most=MOST_LAYERS)
    tower = CLIPConfig(
        width=width,
        heads=heads,
        mlp_width=size(given, f"{path}mlp_dim"),
        patch_size=size(given, f"{path}patch_size", most=MAX_SIDE),
        image_size=square_side(given, f"{path}default_input_size"),
        layers=used_layers(config, stored),
        stored=stored,
        norm_eps=positive(given, f"{path}norm_eps"),
        activation=one_of(given, f"{path}mlp_activations", "quick_gelu", "gelu", "gelu_tanh"),
    )
    if tower.image_size % tower.patch_size:
        raise CheckpointError(
            f"config.json: {path}patch_size {tower.patch_size} does not divide {path}default_input_size "
            f"{tower.image_size}"
        )
    one_of(given, f"{path}num_pos", tower.grid**2 + 1)  # another number would have to be resized
    return tower


def square_side(config: Mapping[str, Any], path: str) -> int:
    """The side of a size [side, side]; the position table is square."""
    value = field(config, path, list)
    if len(value) != 2 or value[0] != value[1] or type(value[0]) is not int or not 1 <= value[0] <= MAX_SIDE:
        raise CheckpointError(
            f"config.json field {path} is {shortened(value)}, expected [side, side] of at most {MAX_SIDE} pixels"
        )
    return int(value[0])


def used_layers(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Blocks that ``vit_layers`` names, counted from 0."""
    value = optional(config, "vit_layers", VIT_LAYERS)
    if not value or not all(type(layer) is int and -layers <= layer < layers for layer in value):
        raise CheckpointError(
            f"config.json field vit_layers is {shortened(value)}, expected a list of blocks from {-layers} to "
            f"{layers - 1}; published checkpoints have {VIT_LAYERS}"
        )
    return tuple(layer % layers for layer in value)


def check_preprocessor(found: Mapping[str, Any], tower: CLIPConfig, connector: PoolingConfig) -> None:
    """What ``preprocessor_config.json`` says has to agree.

    Sizes belong to the weights. The published code reads neither mean nor std nor whether to normalise from this
    file, so other values there would mean something else to every reader.
    """
    expected = {
        "base_image_input_size": [tower.image_size, tower.image_size],
        "image_patch_size": tower.patch_size,
        "image_token_length_h": connector.side,
        "image_token_length_w": connector.side,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "image_padding_mask": True,
        "do_normalize": True,
    }
    for name, value in expected.items():
        stated = found.get(name)
        if stated is not None and stated != value:
            raise CheckpointError(
                f"preprocessor_config.json field {name} is {shortened(stated)}, expected {value} as the weights "
                "and the published code have it; correct the field or remove it"
            )


def vision_names(tower: CLIPConfig) -> Names:
    """From the stage's names to those below ``model.vision_backbone``; a patch is stored as (row, column, colour)."""
    vit, patch = "model.vision_backbone.image_vit.", tower.patch_size
    block = rf"{vit}transformer.resblocks.\1."
    return Names(
        (
            stacked_qkv(r"tower\.blocks", f"{block}attention", "wq", "wk", "wv"),
            renamed(r"tower\.blocks\.(\d+)\.attn\.proj\.(.*)", rf"{block}attention.wo.\2"),
            renamed(r"tower\.blocks\.(\d+)\.mlp\.fc(\d)\.(.*)", rf"{block}feed_forward.w\2.\3"),
            renamed(r"tower\.blocks\.(\d+)\.norm1\.(.*)", rf"{block}attention_norm.\2"),
            renamed(r"tower\.blocks\.(\d+)\.norm2\.(.*)", rf"{block}ffn_norm.\2"),
            patch_rule(f"{vit}patch_embedding.weight", tower.width, patch),
            prefixed("tower.embeddings.", vit),
            prefixed("connector.", "model.vision_backbone."),
        )
    )


def patch_rule(name: str, width: int, patch: int) -> Rule:
    """The linear map of patch vectors as a convolution (E, 3, patch, patch)."""
    source = Rearranged(
        name, (width, 3 * patch**2), lambda stored: stored.unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2)
    )
    return r"tower\.embeddings\.patch_embedding\.weight", lambda _: source


def prompt_facts(checkpoint: Checkpoint, side: int) -> PromptFacts:
    """The templates with this checkpoint's first token and grid in them."""
    end = special_token(checkpoint, "eos_token")
    first = special_token(checkpoint, "bos_token") or end
    if not end:
        raise CheckpointError("tokenizer_config.json has no eos_token, which ends an answer and begins a prompt")
    conversation = CONVERSATION.replace("@BOS@", first)
    picture = PICTURE.replace("@SIDE@", str(side))
    frame = picture.replace("@TOKEN@", "visual_token")
    frames = f"{{% for frame in range(frames) %}}{frame}{{% endfor %}}"
    image = picture.replace("@TOKEN@", "image_token")
    return PromptFacts(
        system=None,
        layouts={
            name: Layout(filled(conversation, video=video, image=image), "<im_patch>")
            for name, video in (("video", VIDEO), ("frames", frames))
        },
        image_token="<im_patch>",
        end_token=end,
        reserved=tuple(dict.fromkeys((*IMAGE_TOKENS, first, end))),
    )


def special_token(checkpoint: Checkpoint, role: str) -> str:
    """How the tokenizer's files spell a special token; empty where they have none."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        found = checkpoint.json(file).get(role)
        spelled = found.get("content") if isinstance(found, dict) else found
        if isinstance(spelled, str) and spelled:
            return spelled
    return ""


MOLMO = Molmo()
