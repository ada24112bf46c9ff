"""Qwen2-VL (2B, 7B and 72B Instruct), for frames of one size that the export chooses.

Facts from transformers 4.49, ``modeling_qwen2_vl`` and ``image_processing_qwen2_vl``, and from the published files:
2-D rotary tower, 2 x 2 patch merger, Qwen2 with positions on three axes, ChatML. Frames are pictures of their own or,
as the family encodes videos, pairs that share a kernel. Qwen2.5-VL is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from export.checkpoint import Checkpoint, TensorFiles
from export.connector.patch_merger import PatchMerger
from export.families.base import CHATML, Backbone, FrameRoute, Layout, PromptFacts, filled
from export.fields import field, one_of, optional, positive, reading, shortened, size
from export.llm.base import LLM, peer_sizes
from export.llm.qwen2 import qwen2_llm
from export.load import Names, Whole, prefixed
from export.peer import Peer, VisionPeer
from export.vision.qwen2vl import PeerVision, Qwen2VLTower, Qwen2VLTowerConfig, tower_config, tower_rules
from export.vision.stage import VisionStage
from runtime.errors import CheckpointError, OptionError
from runtime.preprocess import MAX_SIDE, Preprocess, Resample

__all__ = ["QWEN2VL"]

SYSTEM = "You are a helpful assistant."
DEFAULT_SIDE = 336  # pixels; no published number, 144 tokens a frame
FEWEST_PIXELS, MOST_PIXELS = 56 * 56, 16384 * 28 * 28  # published preprocessor_config.json
MOST_AREA = 2**31  # pixels; a limit above it limits nothing
LONGEST_ASPECT = 200  # of the sides, in the original's smart_resize
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FILTERS: dict[int, Resample] = {3: "bicubic", 2: "bilinear"}  # Pillow's numbers

EACH = "{% for frame in range(frames) %}"
TOKENS = {  # by the field of config.json that holds the id: the published id and spelling
    "vision_start_token_id": (151652, "<|vision_start|>"),
    "vision_end_token_id": (151653, "<|vision_end|>"),
    "vision_token_id": (151654, "<|vision_pad|>"),
    "image_token_id": (151655, "<|image_pad|>"),
    "video_token_id": (151656, "<|video_pad|>"),
}


class Qwen2VL:
    """The family's facts."""

    name = "qwen2vl"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is Qwen2-VL's, or that of its successor, which is refused."""
        return config.get("model_type") in ("qwen2_vl", "qwen2_5_vl")

    def backbone(self, checkpoint: Checkpoint, route: FrameRoute) -> Backbone:
        """Read the facts of one checkpoint."""
        config, tensors = checkpoint.config, checkpoint.tensors
        refuse_relatives(checkpoint)
        preprocess = frame_preprocess(checkpoint, route)
        tower = tower_config(config, preprocess.size, pairs=route.route == "video")
        llm = qwen2vl_llm(config, tensors)
        if (given := size(config, "vision_config.hidden_size")) != llm.config.width:
            raise CheckpointError(
                f"config.json field vision_config.hidden_size is {given}, expected {llm.config.width}, the LLM's "
                "hidden_size; the configuration belongs to other weights"
            )
        newer = any(name.startswith("model.visual.") for name in tensors.files)  # see ``relocated``
        prefix = "model.visual." if newer else "visual."
        peer = whole_peer(config, llm, tower, prefix)
        return Backbone(
            family=self.name,
            tower_blocks=tower.layers,
            tokens_per_frame=math.prod(tower.grid),
            vision=lambda: VisionStage(
                Qwen2VLTower(tower), PatchMerger(tower.width, llm.config.width, merge=tower.merge)
            ),
            vision_names=Names((*tower_rules("tower.", prefix, tower), prefixed("connector.", f"{prefix}merger."))),
            vision_peer=vision_peer(peer, tower) if peer else None,
            llm=replace(llm, peer=peer),
            preprocess=preprocess,
            prompt=prompt_facts(checkpoint, route),
            frame_group=tower.group,
            grid=tower.grid,
        )


def refuse_relatives(checkpoint: Checkpoint) -> None:
    """Refuse what looks like Qwen2-VL Instruct and computes or talks otherwise."""
    config = checkpoint.config
    if config["model_type"] == "qwen2_5_vl":
        raise CheckpointError(
            "config.json: model_type is qwen2_5_vl (Qwen2.5-VL), whose tower has window attention, RMS norm and SwiGLU "
            "and whose video positions follow seconds; supported: qwen2_vl"
        )
    architectures = config.get("architectures")
    if architectures is not None and architectures != ["Qwen2VLForConditionalGeneration"]:
        raise CheckpointError(
            f"config.json: architectures is {shortened(architectures)}; supported: ['Qwen2VLForConditionalGeneration']"
        )
    named = (checkpoint.json(file).get("chat_template") for file in ("chat_template.json", "tokenizer_config.json"))
    if not any(named) and not (checkpoint.folder / "chat_template.jinja").exists():
        raise CheckpointError(
            f"{checkpoint.folder} has no chat template, as a base model that was not taught to answer; give an "
            "Instruct checkpoint or add its chat_template.json"
        )


def qwen2vl_llm(config: Mapping[str, Any], tensors: TensorFiles) -> LLM:
    """Qwen2 with positions on three axes; its fields stand in ``config.json`` itself or, newer, in ``text_config``."""
    path = "" if config.get("text_config") is None else "text_config."
    text = field(config, "text_config", dict) if path else config
    newer = text.get("rope_parameters") and not text.get("rope_scaling")
    rope = f"{path}rope_parameters" if newer else f"{path}rope_scaling"
    sections = field(config, f"{rope}.mrope_section", list)
    for kind in ("type", "rope_type"):
        one_of(config, f"{rope}.{kind}", "mrope", "default")
    one_of(config, f"{rope}.mrope_interleaved", False)
    theta = positive(config, f"{rope}.rope_theta" if newer else f"{path}rope_theta")
    tied = optional(config, "tie_word_embeddings", False) or optional(config, f"{path}tie_word_embeddings", False)
    plain = {**text, "rope_theta": theta, "tie_word_embeddings": tied}
    llm = qwen2_llm({"text_config": plain} if path else plain, path, "", sections=tuple(sections))
    counts = [count for count in sections if type(count) is int and count >= 0]
    if len(counts) != len(sections) or len(counts) != 3 or 2 * sum(counts) != llm.config.head_dim:
        raise CheckpointError(
            f"config.json field {rope}.mrope_section is {shortened(sections)}, expected three numbers whose sum is "
            f"{llm.config.head_dim // 2}, half of a head's channels"
        )
    return relocated(llm, tied) if "model.language_model.embed_tokens.weight" in tensors.files else llm


def relocated(llm: LLM, tied: bool) -> LLM:
    """The same with the tensor names that transformers 4.52 and later use in memory."""
    table = Whole("model.language_model.embed_tokens.weight")
    rules = (prefixed("model.", "model.language_model."), prefixed("lm_head.", "lm_head."))
    head = ((r"lm_head\.weight", lambda _: table),) if tied else ()
    return replace(llm, names=Names((*head, *rules)), table=table)


def whole_peer(config: Mapping[str, Any], llm: LLM, tower: Qwen2VLTowerConfig, prefix: str) -> Peer | None:
    """Transformers' own class with its tower, whose tensors begin with ``prefix``; it knows whole MLP ratios only."""
    if tower.mlp_width % tower.width:
        return None
    decoder = llm.config
    text = {
        **peer_sizes(decoder),
        "rms_norm_eps": decoder.norm_eps,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": decoder.rotary.theta,
            "mrope_section": list(decoder.rotary.sections),
        },
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {
        "depth": tower.layers,
        "embed_dim": tower.width,
        "num_heads": tower.heads,
        "mlp_ratio": tower.mlp_width // tower.width,
        "hidden_size": decoder.width,
        "hidden_act": optional(config, "vision_config.hidden_act", "quick_gelu"),
        "patch_size": tower.patch_size,
        "spatial_merge_size": tower.merge,
        "temporal_patch_size": tower.frames,
        "rope_parameters": {"rope_type": "axial", "rope_theta": tower.theta},
    }
    names = (
        prefixed("model.visual.", prefix),
        (r"model\.language_model\.(.*)", lambda found: llm.names(f"model.{found[1]}")),
        (r"lm_head\.weight", lambda found: llm.names(found[0])),
    )
    return Peer(
        "Qwen2VLForConditionalGeneration",
        {"text_config": text, "vision_config": vision, "tie_word_embeddings": False},
        Names(names),
    )


def vision_peer(peer: Peer, tower: Qwen2VLTowerConfig) -> VisionPeer:
    """Tower and merger of the same class."""
    return VisionPeer(peer, "", lambda model: PeerVision(model.get_submodule("model.visual"), tower))


def frame_preprocess(checkpoint: Checkpoint, route: FrameRoute) -> Preprocess:
    """What the image processor does to a frame, with its size chosen once and for all."""
    sides = ("patch_size", "spatial_merge_size", "temporal_patch_size")
    patch, merge, frames = (size(checkpoint.config, f"vision_config.{side}", most=MAX_SIDE) for side in sides)
    file = "preprocessor_config.json"
    settings: Mapping[str, Any] = checkpoint.json(file)
    if not settings:  # transformers 5 writes all processors into one file
        file = "processor_config.json"
        settings = optional(checkpoint.json(file), "image_processor", {})
    with reading(file):
        for name, value in (("patch_size", patch), ("merge_size", merge), ("temporal_patch_size", frames)):
            one_of(settings, name, value)
        for step in ("do_resize", "do_rescale", "do_normalize"):
            one_of(settings, step, True)
        return Preprocess(
            size=frame_size(settings, route.image_size, patch * merge),
            mean=colour(settings, "image_mean", CLIP_MEAN),
            std=colour(settings, "image_std", CLIP_STD),
            resample=FILTERS[one_of(settings, "resample", *FILTERS)],
            rescale=positive({"rescale_factor": 1 / 255, **settings}, "rescale_factor"),
        )


def colour(settings: Mapping[str, Any], name: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    """A number for each of red, green and blue."""
    given = optional(settings, name, list(default))
    if len(given) != 3 or not all(type(value) in (int, float) for value in given):
        raise CheckpointError(f"config.json field {name} is {shortened(given)}, expected three numbers")
    return given[0], given[1], given[2]


def frame_size(settings: Mapping[str, Any], asked: tuple[int, int] | None, factor: int) -> tuple[int, int]:
    """The (height, width) that was ``asked`` for; without it the published rule's answer to a square."""
    within = size_limits(settings)
    height, width = asked or (DEFAULT_SIDE, DEFAULT_SIDE)
    if not 1 <= min(height, width) <= max(height, width) <= min(MAX_SIDE, LONGEST_ASPECT * min(height, width)):
        raise OptionError(
            f"--image-size {height}x{width}: expected sides of 1 to {MAX_SIDE} pixels, neither more than "
            f"{LONGEST_ASPECT} times the other"
        )
    fitting = fitted(height, width, factor, within)
    if asked and fitting != asked:
        raise OptionError(
            f"--image-size {height}x{width}: expected multiples of {factor} pixels, the side of a token, and "
            f"{within[0]} to {within[1]} pixels in all; the nearest height x width is {fitting[0]}x{fitting[1]}"
        )
    return fitting


def size_limits(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Fewest and most pixels of a frame, in each of the places where versions of the processor wrote them."""
    limits = []
    for name, edge, published in (
        ("min_pixels", "shortest_edge", FEWEST_PIXELS),
        ("max_pixels", "longest_edge", MOST_PIXELS),
    ):
        given = [place for place in (name, f"size.{edge}", f"size.{name}") if optional(settings, place, 0)]
        limits.append(size(settings, given[0], most=MOST_AREA) if given else published)
    if limits[0] > limits[1]:
        raise CheckpointError(f"config.json: min_pixels is {limits[0]}, expected at most max_pixels, {limits[1]}")
    return limits[0], limits[1]


def fitted(height: int, width: int, factor: int, within: tuple[int, int]) -> tuple[int, int]:
    """The original's ``smart_resize``: multiples of ``factor``, few and many enough pixels, about the same aspect."""
    fewest, most = within
    sides = (height, width)
    rows, columns = (max(1, round(side / factor)) for side in sides)
    if rows * columns * factor**2 > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (max(1, math.floor(side / shrink / factor)) for side in sides)
    elif rows * columns * factor**2 < fewest:
        grow = math.sqrt(fewest / (height * width))
        rows, columns = (math.ceil(side * grow / factor) for side in sides)
    return rows * factor, columns * factor


def prompt_facts(checkpoint: Checkpoint, route: FrameRoute) -> PromptFacts:
    """ChatML; visual spans are spelled as the checkpoint's tokenizer spells the ids of ``config.json``."""
    spelled = spellings(checkpoint)
    start, end = spelled["vision_start_token_id"], spelled["vision_end_token_id"]
    image, video = spelled["image_token_id"], spelled["video_token_id"]
    picture = f"{start}{{{{ image_token * image_tokens }}}}{end}"
    span = f"{start}{{{{ visual_token * tokens }}}}{end}"
    pairs = f"{start}{{{{ visual_token * (frames * tokens) }}}}{end}"
    frames, token = (pairs, video) if route.route == "video" else (f"{EACH}{span}{{% endfor %}}", image)
    return PromptFacts(
        system=SYSTEM,
        layouts={
            "video": Layout(filled(CHATML, video=span, image=picture), video),
            "frames": Layout(filled(CHATML, video=frames, image=picture), token),
        },
        image_token=image,
        end_token="<|im_end|>",
        reserved=(*spelled.values(), "<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    )


def spellings(checkpoint: Checkpoint) -> dict[str, str]:
    """The tokens of ``TOKENS`` by the same fields; as published where no file lists the tokenizer's own."""
    added = added_tokens(checkpoint)
    spelled = {}
    for name, (published, usual) in TOKENS.items():
        id_ = optional(checkpoint.config, name, published)
        if added and id_ not in added and name != "vision_token_id":  # in no prompt
            raise CheckpointError(
                f"config.json field {name} is {id_}, which is none of the tokenizer's {len(added)} added tokens; "
                f"published checkpoints have {usual} there"
            )
        spelled[name] = added.get(id_, usual)
    return spelled


def added_tokens(checkpoint: Checkpoint) -> dict[int, str]:
    """Spellings of the tokens beside the vocabulary proper, by id."""
    found: dict[int, str] = {}
    with reading("tokenizer_config.json"):
        decoder: dict[str, Any] = optional(checkpoint.json("tokenizer_config.json"), "added_tokens_decoder", {})
        for id_, entry in decoder.items():
            found[int(id_)] = field(entry, "content", str)
    with reading("tokenizer.json"):
        for entry in optional(checkpoint.json("tokenizer.json"), "added_tokens", []):
            found[field(entry, "id", int)] = field(entry, "content", str)
    return found


QWEN2VL = Qwen2VL()
