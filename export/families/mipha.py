"""Mipha-3B: SigLIP, an MLP and Phi-2.

Facts from zhuyiche/llava-phi, folder mipha (``mipha_arch.py``, ``mm_utils.py``, ``conversation.py``): a frame is padded
to a square first, one "<image>" holds the tokens of all frames in order. The variants with Phi-1.5, Gemma and Phi-3
and those with a CLIP or DINOv2 tower are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.checkpoint import Checkpoint
from export.connector.mlp import MLPConnector, projector_depth
from export.families.base import Backbone, FrameRoute, Layout, PromptFacts, filled
from export.fields import MOST_LAYERS, field, one_of, optional, positive, shortened, size
from export.llm.phi2 import phi2_llm
from export.load import Names, prefixed
from export.vision.siglip import SigLIP, SigLIPConfig, siglip_config, siglip_names, siglip_peer
from export.vision.stage import VisionStage
from runtime.errors import CheckpointError
from runtime.preprocess import MAX_SIDE, Preprocess, Resample

__all__ = ["MIPHA"]

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TENSORS = "model.vision_tower.vision_model."
TOWER = "vision_config.vision_tower."
PROJECTOR = "vision_config.mm_projector."
FILTERS: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
SIGLIP_SCALE = 0.5  # mean and std of every channel in google/siglip-so400m-patch14-384

CONVERSATION = """\
{{ system }}{{ ' ' }}
{%- for message in messages -%}
{{ 'ASSISTANT: ' if message.role == 'assistant' else 'USER: ' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{% if part.type == "video" %}@VIDEO@{% elif part.type == "image" %}@IMAGE@{% else %}{{ part.text }}{% endif %}
{%- endfor -%}
{%- endif -%}
{{ '<|endoftext|>' if message.role == 'assistant' else ' ' }}
{%- endfor -%}
{{ 'ASSISTANT:' if add_generation_prompt else '' }}"""


class Mipha:
    """The family's facts."""

    name = "mipha"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is one of the Mipha models'."""
        return str(config.get("model_type")).startswith("mipha_")

    def backbone(self, checkpoint: Checkpoint, route: FrameRoute) -> Backbone:
        """Read the facts of one checkpoint."""
        route.refuse_choices(self.name)
        config = checkpoint.config
        refuse_variants(config)
        tower = tower_config(config)
        llm = phi2_llm(config, "", "")
        depth = connector_depth(config, tower.width, llm.config.width)
        return Backbone(
            family=self.name,
            tower_blocks=size(config, f"{TOWER}num_hidden_layers"),
            tokens_per_frame=tower.patches,
            vision=lambda: VisionStage(SigLIP(tower), MLPConnector(tower.width, llm.config.width, depth=depth)),
            vision_names=Names(
                (
                    *siglip_names("tower.", TENSORS),
                    prefixed("connector.", "model.mm_projector."),
                )
            ),
            vision_peer=siglip_peer(tower, TENSORS),
            llm=llm,
            preprocess=preprocess(checkpoint, tower),
            prompt=PROMPT,
        )


def refuse_variants(config: Mapping[str, Any]) -> None:
    """Models of the same code with other parts."""
    if (architectures := config.get("architectures")) != ["MiphaPhiForCausalLM"]:
        raise CheckpointError(
            f"config.json: architectures is {shortened(architectures)}; supported: ['MiphaPhiForCausalLM'], "
            "which is Mipha-3B with Phi-2"
        )
    one_of(config, "model_type", "mipha_phi")
    one_of(config, "mm_use_im_start_end", False)
    name = field(config, f"{TOWER}vision_model_name_or_path", str)
    if "siglip" not in name or "clip" in name.replace("siglip", ""):  # the original asks for "clip" first
        raise CheckpointError(
            f"config.json field {TOWER}vision_model_name_or_path is {shortened(name)}; supported: a SigLIP tower, "
            "such as 'google/siglip-so400m-patch14-384'"
        )


def tower_config(config: Mapping[str, Any]) -> SigLIPConfig:
    """SigLIP's sizes; ``mm_vision_select_layer`` counts the embeddings as layer 0, -1 is the last layer."""
    one_of(config, f"{TOWER}mm_vision_select_feature", "patch", "cls_patch")  # the same where there is no class token
    layers = size(config, f"{TOWER}num_hidden_layers", most=MOST_LAYERS)
    select = optional(config, f"{TOWER}mm_vision_select_layer", -2)
    used = select if select > 0 else layers + 1 + select
    if not 1 <= used <= layers or not select:
        raise CheckpointError(
            f"config.json field {TOWER}mm_vision_select_layer is {select}, expected {-layers} to -1 or 1 to {layers}"
        )
    return siglip_config(config, TOWER, left_out=layers - used, usual=None)


def connector_depth(config: Mapping[str, Any], vision_width: int, width: int) -> int:
    """Layers of the connector, whose own sizes must be those of tower and LLM."""
    for name, expected in (("mm_hidden_size", vision_width), ("hidden_size", width)):
        if (found := size(config, PROJECTOR + name)) != expected:
            raise CheckpointError(
                f"config.json field {PROJECTOR}{name} is {found}, expected {expected}, the width of what it joins"
            )
    return projector_depth(config, f"{PROJECTOR}mm_projector_type")


def preprocess(checkpoint: Checkpoint, tower: SigLIPConfig) -> Preprocess:
    """From ``preprocessor_config.json``, where it is there, and ``image_aspect_ratio``."""
    fit = one_of(checkpoint.config, "image_aspect_ratio", "square", "pad")
    given = checkpoint.json("preprocessor_config.json")
    try:
        size_ = side(given, "height", tower), side(given, "width", tower)
        mean, std = channels(given, "image_mean"), channels(given, "image_std")
        for step in ("do_resize", "do_rescale", "do_normalize"):
            one_of(given, step, True)
        resample = FILTERS[one_of(given, "resample", *reversed(FILTERS))]
        rescale = positive(given, "rescale_factor") if "rescale_factor" in given else 1 / 255
        fill = tuple(int(value * 255) for value in mean) if fit == "pad" else (0, 0, 0)
        return Preprocess(
            size=size_,
            mean=mean,
            std=std,
            resample=resample,
            fit="pad" if fit == "pad" else "stretch",
            fill=(fill[0], fill[1], fill[2]),
            rescale=rescale,
        )
    except CheckpointError as error:
        raise CheckpointError(f"preprocessor_{error}") from error  # the reader's messages begin with config.json
    except ValueError as error:
        raise CheckpointError(f"preprocessor_config.json does not fit: {error}") from error


def side(given: Mapping[str, Any], name: str, tower: SigLIPConfig) -> int:
    """One side of the image in pixels, which must hold the tower's patches."""
    found = size(given, f"size.{name}", most=MAX_SIDE) if "size" in given else tower.image_size
    if found // tower.patch_size != tower.grid:
        raise CheckpointError(
            f"config.json field size.{name} is {found}, expected {tower.grid} patches of {tower.patch_size} pixels, "
            "as config.json's vision_tower has"
        )
    return found


def channels(given: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    """Three numbers, red first."""
    found = optional(given, name, [SIGLIP_SCALE] * 3)
    if len(found) != 3 or not all(type(value) in (float, int) and 0 <= value <= 1 for value in found):
        raise CheckpointError(f"config.json field {name} is {shortened(found)}, expected three numbers of 0 to 1")
    red, green, blue = map(float, found)
    return red, green, blue


IMAGE = "{{ image_token * image_tokens }}{{ '\\n' }}"
LAYOUTS = {
    "video": "{{ visual_token * tokens }}{{ '\\n' }}",
    "frames": "{{ visual_token * (frames * tokens) }}{{ '\\n' }}",
}
PROMPT = PromptFacts(
    system=SYSTEM,
    layouts={
        name: Layout(filled(CONVERSATION, video=video, image=IMAGE), "<image>") for name, video in LAYOUTS.items()
    },
    image_token="<image>",
    end_token="<|endoftext|>",
    reserved=("<image>", "<|endoftext|>"),
    extra_tokens=("<image>",),
)

MIPHA = Mipha()
