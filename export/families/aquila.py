"""Aquila-VL-2B and its like: LLaVA-OneVision with a SigLIP tower, an MLP and Qwen2 or Qwen2.5.

Facts from LLaVA-VL/LLaVA-NeXT (``llava_arch.py``, ``siglip_encoder.py``, ``mm_utils.py``, ``conversation.py``). There
the tower's last layer is deleted and what is left runs without a final norm, whatever ``mm_vision_select_layer`` says;
``rope_scaling`` is set to none. Tiles ("anyres") are never used: a picture is its base view, a frame an image of one
view. CLIP towers, other projectors and resamplers are refused by name.

Route "video" pools every frame's tokens behind the connector as LLaVA-OneVision does for videos. The vision stage is
one for everything, so that pictures beside such a video are pooled as well; the original leaves those as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from msgspec import structs
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from export.connector.mlp import MLPConnector, Pool, pooled, pooled_side, projector_depth
from export.families.base import CHATML, Backbone, FrameRoute, Layout, PromptFacts, filled
from export.fields import field, one_of, optional, shortened, size
from export.llm.base import LLM
from export.llm.qwen2 import qwen2_llm
from export.load import Names, Rearranged, Stacked, prefixed
from export.vision.siglip import SigLIP, SigLIPConfig, siglip_config, siglip_names, siglip_peer
from export.vision.stage import VisionStage
from runtime.errors import CheckpointError
from runtime.preprocess import Preprocess

__all__ = ["AQUILA"]

TOWER = "model.vision_tower.vision_tower.vision_model."
HALF = (0.5, 0.5, 0.5)  # SigLipImageProcessor's mean and std
GREY = (127, 127, 127)  # int(0.5 * 255), what "pad" surrounds a picture with
FOLDER = re.compile("[A-Za-z0-9_.-]{0,80}siglip[A-Za-z0-9_.-]{0,80}")
MERGES = ("flat", "spatial", "spatial_unpad")  # the first is the original's default
IMAGE, NEWLINE = "<image>", "<image_newline>"


class PooledVision(VisionStage):
    """Tower, connector and the pooling of the route "video"."""

    def __init__(self, tower: nn.Module, connector: nn.Module, pool: Pool) -> None:
        super().__init__(tower, connector)
        self.pool: Pool = pool

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        """(F, 3, H, W) -> (F, N, D)."""
        return pooled(super().forward(pixel_values, pixel_mask), self.pool)


def vision_stage(tower: SigLIPConfig, connector: nn.Module, pool: Pool | None) -> VisionStage:
    """The stage of a route."""
    return PooledVision(SigLIP(tower), connector, pool) if pool else VisionStage(SigLIP(tower), connector)


class Aquila:
    """The family's facts."""

    name = "aquila"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is written by LLaVA's code; its ``model_type`` varies."""
        architectures = config.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else ""
        return str(first).startswith("Llava") or config.get("model_type") == "llava_qwen"

    def backbone(self, checkpoint: Checkpoint, route: FrameRoute) -> Backbone:
        """Read the facts of one checkpoint."""
        replace(route, route="images").refuse_choices(self.name)
        config = checkpoint.config
        refuse_variants(config)
        tower = tower_config(checkpoint)
        pool = pool_mode(config) if route.route == "video" else None
        side = pooled_side(tower.grid, pool) if pool else tower.grid
        newline = has_newline(checkpoint)
        llm = qwen2_llm(config, "", "")
        depth = projector_depth(config, "mm_projector_type")
        return Backbone(
            family=self.name,
            tokens_per_frame=side**2,
            vision=lambda: vision_stage(tower, MLPConnector(tower.width, llm.config.width, depth=depth), pool),
            vision_names=Names((*siglip_names("tower.", TOWER), prefixed("connector.", "model.mm_projector."))),
            vision_peer=siglip_peer(tower, TOWER),
            llm=with_newline(llm) if newline else llm,
            preprocess=preprocess(config, tower, route),
            pooled=pool is not None,
            tower_blocks=tower.layers,  # the last one of SigLIP is deleted before saving
            prompt=prompt(frames_layout(config, route, side), llm.table_rows if newline else None),
        )


def refuse_variants(config: Mapping[str, Any]) -> None:
    """Models of the same code with other parts."""
    if (architectures := config.get("architectures")) != ["LlavaQwenForCausalLM"]:
        raise CheckpointError(
            f"config.json: architectures is {shortened(architectures)}; supported: ['LlavaQwenForCausalLM']"
        )
    name = field(config, "mm_vision_tower", str)
    if "siglip" not in name or name.startswith(("openai", "laion")) or "ShareGPT4V" in name:
        raise CheckpointError(
            f"config.json field mm_vision_tower is {shortened(name)}; supported: a SigLIP tower, "
            "such as 'google/siglip-so400m-patch14-384'"
        )
    if (resampler := config.get("mm_resampler_type")) is not None:
        raise CheckpointError(f"config.json field mm_resampler_type is {shortened(resampler)}; supported: none")
    one_of(config, "mm_use_im_start_end", False)


def tower_config(checkpoint: Checkpoint) -> SigLIPConfig:
    """SigLIP's sizes without its last layer, which the original deletes.

    A folder beside the weights that is called like the tower has them in its ``config.json``; otherwise they are those
    that the original holds for SO400M/14-384.
    """
    name = field(checkpoint.config, "mm_vision_tower", str)
    folder = name.rstrip("/").rpartition("/")[2]
    given = checkpoint.json(f"{folder}/config.json") if FOLDER.fullmatch(folder) else {}
    try:
        kind = one_of(given, "model_type", "siglip_vision_model", "siglip")
        tower = siglip_config(given, "vision_config." if kind == "siglip" else "", left_out=1)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}/{error}") from error
    table = f"{TOWER}embeddings.position_embedding.weight"
    if (found := checkpoint.tensors.shape(table)) != (tower.patches, tower.width):
        where = f"{folder}/config.json" if given else "google/siglip-so400m-patch14-384"
        raise CheckpointError(
            f"config.json: mm_vision_tower is {shortened(name)}, of {tower.patches} patches and width {tower.width} "
            f"as in {where}, and tensor {table} has shape {list(found)}; put the tower's own config.json into "
            f"the folder {shortened(folder)} beside the weights"
        )
    if (hidden := size(checkpoint.config, "mm_hidden_size")) != tower.width:
        raise CheckpointError(f"config.json field mm_hidden_size is {hidden}, expected the tower's width {tower.width}")
    return tower


def has_newline(checkpoint: Checkpoint) -> bool:
    """Whether ``model.image_newline`` ends every picture: only where tiles would have been put together unpadded."""
    merge = one_of(checkpoint.config, "mm_patch_merge_type", *MERGES)
    if merge != "spatial_unpad" and "model.image_newline" in checkpoint.tensors.files:
        raise CheckpointError(
            f"config.json field mm_patch_merge_type is {merge!r}, expected 'spatial_unpad' where there is a tensor "
            "model.image_newline"
        )
    return merge == "spatial_unpad"


def with_newline(llm: LLM) -> LLM:
    """The LLM with the newline as one more row of its embedding table."""
    newline = Rearranged("model.image_newline", (llm.config.width,), lambda row: row[None])
    table = Stacked((llm.table, newline), (llm.table_rows, 1))
    return replace(llm, table=table, table_rows=llm.table_rows + 1)


def preprocess(config: Mapping[str, Any], tower: SigLIPConfig, route: FrameRoute) -> Preprocess:
    """The original stretches every single view, but pads pictures to a square where it was trained so."""
    aspect = optional(config, "image_aspect_ratio", "square")
    if aspect not in ("square", "pad") and not aspect.startswith("anyres"):
        raise CheckpointError(
            f"config.json field image_aspect_ratio is {shortened(aspect)}; supported: 'square', 'pad', 'anyres...'"
        )
    spec = Preprocess(size=(tower.image_size, tower.image_size), mean=HALF, std=HALF)
    padded = aspect == "pad" and route.route == "images"
    return structs.replace(spec, fit="pad", fill=GREY) if padded else spec


def pool_mode(config: Mapping[str, Any]) -> Pool:
    """How a video's tokens are pooled; the original fails where the field is absent."""
    field(config, "mm_spatial_pool_mode", str)
    one_of(config, "add_faster_video", False)
    modes: tuple[Pool, ...] = ("bilinear", "average", "max")
    return one_of(config, "mm_spatial_pool_mode", *modes)


FRAMES = "{% for frame in range(frames) %}{{ visual_token * tokens }}@NEWLINE@{{ '\\n' }}{% endfor %}"
VIDEOS = {  # by mm_newline_position, with @SIDE@ tokens in a row of a frame
    "one_token": "{{ visual_token * (frames * tokens) }}@NEWLINE@",
    "frame": "{% for frame in range(frames) %}{{ visual_token * tokens }}@NEWLINE@{% endfor %}",
    "grid": "{% for row in range(frames * @SIDE@) %}{{ visual_token * @SIDE@ }}@NEWLINE@{% endfor %}",
    "no_token": "{{ visual_token * (frames * tokens) }}",
}


def frames_layout(config: Mapping[str, Any], route: FrameRoute, side: int) -> str:
    """What a video without LinVT becomes in the prompt."""
    if route.route == "images":
        return FRAMES
    position = one_of(config, "mm_newline_position", *VIDEOS)
    merge = one_of(config, "mm_patch_merge_type", *MERGES)
    if merge == "flat":
        position = "no_token"
    if merge == "spatial" and position in ("frame", "grid"):
        raise CheckpointError(
            f"config.json field mm_newline_position is {position!r}, expected 'one_token' or 'no_token' where "
            "mm_patch_merge_type is 'spatial': such a checkpoint has no newline"
        )
    return VIDEOS[position].replace("@SIDE@", str(side)) + "{{ '\\n' }}"


def prompt(frames: str, newline_row: int | None) -> PromptFacts:
    """The prompt's facts; LinVT's rows stand without a newline."""
    newline = "" if newline_row is None else NEWLINE
    image = "{{ image_token * image_tokens }}@NEWLINE@{{ '\\n' }}"
    layouts = {"video": "{{ visual_token * tokens }}{{ '\\n' }}", "frames": frames}
    extra = (IMAGE, *([newline] if newline else []))
    return PromptFacts(
        system="You are a helpful assistant.",
        layouts={
            name: Layout(filled(CHATML, video=video, image=image).replace("@NEWLINE@", newline), IMAGE)
            for name, video in layouts.items()
        },
        image_token=IMAGE,
        end_token="<|im_end|>",
        reserved=(*extra, "<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        extra_tokens=extra,
        prompt_rows={} if newline_row is None else {NEWLINE: newline_row},
    )


AQUILA = Aquila()
