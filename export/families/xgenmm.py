"""BLIP-3, published as xGen-MM v1.5: all of SigLIP, a perceiver, and Phi-3-mini with a decoupled vocabulary.

Facts from ``modeling_xgenmm.py`` and ``image_processing_blip_3.py`` of Salesforce/xgen-mm-phi3-mini-base-r-v1.5; the
conversation from salesforce/LAVIS, branch xgen-mm (``train/conversation.py``, ``train/sft_data_utils.py``), whose
pictures stand before the question, each with a newline. The published config.json holds hardly a size: the tower is
named by its hub id, the LLM is transformers' Phi3Config, the perceiver is the code's own.

Every picture is one view here; the tiles of ``anyres`` are not made. v1, whose visual tokens depend on the question, is
refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from export.checkpoint import Checkpoint, TensorFiles, read_json
from export.connector.perceiver import Perceiver, PerceiverConfig, matrix, perceiver_config
from export.families.base import Backbone, FrameRoute, Layout, PromptFacts, filled
from export.fields import LARGEST, field, one_of, optional, reading, shortened, size
from export.llm.base import LLM
from export.llm.phi3 import phi3_llm
from export.load import Names, Rows, Rule, Stacked, Whole, prefixed
from export.peer import Peer
from export.vision.siglip import SigLIP, SigLIPConfig, siglip_config, siglip_names, siglip_peer
from export.vision.stage import VisionStage
from runtime.errors import CheckpointError
from runtime.preprocess import MAX_SIDE, Preprocess

__all__ = ["XGENMM"]

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SIGLIP = "google/siglip-so400m-patch14-384"
SIGLIP_DEFAULTS = {  # transformers' SiglipVisionConfig; SO400M's own file says where it differs
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
    "patch_size": 16,
    "image_size": 224,
}
PHI3_DEFAULTS = {  # transformers' Phi3Config
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
EXTRA_TOKENS = ("<image>", "<image placeholder>", "<|endofchunk|>")
TOWER, PERCEIVER, LANGUAGE = "vlm.vision_encoder.", "vlm.vision_tokenizer.", "vlm.lang_model."
V1_TENSORS = (f"{TOWER}transformer.", f"{TOWER}conv1.", f"{PERCEIVER}text_projection.")

CONVERSATION = """\
{% if system %}
<|system|>
{{ system }}<|end|>
{% endif %}
{% for message in messages %}
<|{{ message.role }}|>
{% if message.content is string %}{{ message.content }}{% else %}
{% for part in message.content %}
{% if part.type == "video" %}@VIDEO@{% elif part.type == "image" %}@IMAGE@{% else %}{{ part.text }}{% endif %}
{% endfor %}
{% endif %}
<|end|>
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""
LAYOUTS = {
    "video": "{{ visual_token * tokens }}{{ '\\n' }}",
    "frames": "{% for frame in range(frames) %}Image {{ loop.index }}: {{ visual_token * tokens }}{{ '\\n' }}"
    "{% endfor %}",
}
IMAGE = "{{ image_token * image_tokens }}{{ '\\n' }}"
PROMPT = PromptFacts(
    system=SYSTEM,
    layouts={
        name: Layout(filled(CONVERSATION, video=video, image=IMAGE), "<image>") for name, video in LAYOUTS.items()
    },
    image_token="<image>",
    end_token="<|end|>",
    reserved=(*EXTRA_TOKENS, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    extra_tokens=EXTRA_TOKENS,
)


class XGenMM:
    """The family's facts."""

    name = "xgenmm"

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is xGen-MM's; "blip_3" is what v1 was first called."""
        return config.get("model_type") in ("xgenmm", "blip_3")

    def backbone(self, checkpoint: Checkpoint, route: FrameRoute) -> Backbone:
        """Read the facts of one checkpoint."""
        route.refuse_choices(self.name)
        refuse_v1(checkpoint)
        tower = tower_config(checkpoint)
        perceiver = sized_perceiver(checkpoint, tower)
        llm = decoupled_llm(checkpoint)
        check_extra_tokens(checkpoint, llm.table_rows - len(EXTRA_TOKENS))
        return Backbone(
            family=self.name,
            tower_blocks=tower.layers,
            tokens_per_frame=perceiver.latents,
            vision=lambda: VisionStage(SigLIP(tower), Perceiver(perceiver, llm.config.width)),
            vision_names=Names((*siglip_names("tower.", TOWER), prefixed("connector.", PERCEIVER))),
            vision_peer=siglip_peer(tower, TOWER),
            llm=llm,
            preprocess=preprocess(checkpoint, tower),
            prompt=PROMPT,
        )


def refuse_v1(checkpoint: Checkpoint) -> None:
    """Know v1 by its configuration (open_clip's ViT-H) or by its tensors."""
    vision = optional(checkpoint.config, "vision_encoder_config", dict[str, Any]())
    signs = [f"config.json field model_type is {checkpoint.config['model_type']!r}"]
    if checkpoint.config["model_type"] == "xgenmm":
        signs = [
            f"config.json field vision_encoder_config.{name} is {shortened(vision[name])}"
            for name in ("model_name", "force_image_size")
            if name in vision and (name != "model_name" or str(vision[name]).startswith("ViT-"))
        ]
    signs += [f"there is a tensor {name}" for name in checkpoint.tensors.files if name.startswith(V1_TENSORS)]
    if signs:
        raise CheckpointError(
            f"{signs[0]}: this is xGen-MM v1, whose visual tokens depend on the question, which is not supported; "
            "give a v1.5 checkpoint (xgen-mm-phi3-mini-*-r-v1.5)"
        )


def tower_config(checkpoint: Checkpoint) -> SigLIPConfig:
    """SigLIP's sizes: from the folder that is called like the last part of its hub id, else SO400M's."""
    name = optional(checkpoint.config, "vision_encoder_config.model_name", SIGLIP)
    last = PurePosixPath(name).name
    places = (place / last / "config.json" for place in (checkpoint.folder, checkpoint.folder.absolute().parent))
    path = next((path for path in places if last not in ("", "..") and path.is_file()), None)
    if path is not None:
        return tower_from_file(path)
    if name != SIGLIP:
        raise CheckpointError(
            f"config.json field vision_encoder_config.model_name is {shortened(name)}; supported: {SIGLIP!r}, or a "
            "SigLIP whose config.json lies in a folder of that name in the checkpoint's or beside it"
        )
    return SigLIPConfig(post_norm=True)


def tower_from_file(path: Path) -> SigLIPConfig:
    """SigLIP's sizes from a configuration of its own, of both towers or of the vision tower alone."""
    with reading(f"{path.parent.name}/config.json"):
        config = read_json(path)
        if "vision_config" not in config:
            one_of(config, "model_type", "siglip_vision_model")
            return siglip_config({**SIGLIP_DEFAULTS, **config}, post_norm=True)
        one_of(config, "model_type", "siglip")
        vision = field(config, "vision_config", dict)
        return siglip_config({"vision_config": {**SIGLIP_DEFAULTS, **vision}}, "vision_config.", post_norm=True)


def sized_perceiver(checkpoint: Checkpoint, tower: SigLIPConfig) -> PerceiverConfig:
    """The perceiver's sizes as the tensors have them, which config.json may repeat."""
    found = perceiver_config(checkpoint.tensors, PERCEIVER)
    for name, stored in (("num_vis_tokens", found.latents), ("vis_feature_dim", found.width)):
        path = f"vision_tokenizer_config.{name}"
        if optional(checkpoint.config, path, stored) != stored:
            raise CheckpointError(
                f"config.json field {path} is {size(checkpoint.config, path)}, expected {stored}, as tensor "
                f"{PERCEIVER}latents has it; the configuration belongs to other weights"
            )
    if found.width != tower.width:
        raise CheckpointError(
            f"tensor {PERCEIVER}latents has {found.width} columns, expected the tower's width, which is {tower.width}; "
            "the configuration belongs to other weights"
        )
    return found


def decoupled_llm(checkpoint: Checkpoint) -> LLM:
    """Phi-3 whose table and head are the first rows of the original ones and, after them, the added tokens' rows."""
    config = {**checkpoint.config, "text_config": text_config(checkpoint)}
    llm = phi3_llm(config, "text_config.", LANGUAGE)
    stored = llm.config.vocab
    first = size(config, "text_config.initial_tokenizer_len", most=stored)
    table, head = f"{LANGUAGE}model.embed_tokens", f"{LANGUAGE}lm_head"
    added, _ = matrix(checkpoint.tensors, f"{table}.additional_embedding.weight")
    if added != len(EXTRA_TOKENS):
        raise CheckpointError(
            f"tensor {table}.additional_embedding.weight has {added} rows, expected {len(EXTRA_TOKENS)}, one for each "
            f"of {', '.join(EXTRA_TOKENS)}; the checkpoint has other added tokens, which is not supported"
        )

    def cut(base: str, extra: str) -> Stacked:
        return Stacked((Rows(base, 0, stored), Whole(extra)), (first, added))

    whole = cut(f"{table}.weight", f"{table}.additional_embedding.weight")
    rules = ((r"lm_head\.(weight|bias)", lambda found: cut(f"{head}.{found[1]}", f"{head}.additional_fc.{found[1]}")),)
    return replace(
        llm,
        config=replace(llm.config, vocab=first + added, head_bias=True),
        names=Names((*rules, *llm.names.rules)),
        table=whole,
        table_rows=first + added,
        peer=decoupled_peer(llm.peer, first + added, (*rules, (r"model\.embed_tokens\.weight", lambda _: whole))),
    )


def decoupled_peer(phi3: Peer | None, rows: int, rules: tuple[Rule, ...]) -> Peer | None:
    """Transformers' Phi-3 with so many rows in table and head, which ``rules`` fill; the class has no bias there."""
    if phi3 is None:
        return None
    config, names = {**phi3.config, "vocab_size": rows}, Names((*rules, *phi3.names.rules))
    return replace(phi3, config=config, names=names, head_bias=True)


def text_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """``text_config`` with Phi3Config's defaults for what it leaves out, which the tensors must not contradict."""
    config = checkpoint.config
    text = field(config, "text_config", dict)
    one_of(config, "text_config.model_type", "phi3")
    one_of(config, "text_config.tie_word_embeddings", False)
    if text.get("rope_parameters") is not None:
        raise CheckpointError(
            "config.json field text_config.rope_parameters is set, expected rope_theta and rope_scaling; "
            "transformers 5 wrote the file, give the published one"
        )
    for name, found in sizes_of(checkpoint.tensors).items():
        if name not in text and found != PHI3_DEFAULTS[name]:
            raise CheckpointError(
                f"config.json has no field text_config.{name}, which then is Phi-3-mini's {PHI3_DEFAULTS[name]}, but "
                f"the tensors below {LANGUAGE} have {found}; add the field"
            )
    return {**PHI3_DEFAULTS, **text}


def sizes_of(tensors: TensorFiles) -> dict[str, int]:
    """Sizes of the LLM that its tensors tell."""
    vocab, width = matrix(tensors, f"{LANGUAGE}model.embed_tokens.weight")
    mlp_widths, _ = matrix(tensors, f"{LANGUAGE}model.layers.0.mlp.gate_up_proj.weight")
    norms = sum(1 for name in tensors.files if name.startswith(LANGUAGE) and name.endswith(".input_layernorm.weight"))
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp_widths // 2,
        "num_hidden_layers": norms,
    }


def check_extra_tokens(checkpoint: Checkpoint, first: int) -> None:
    """The ids that the tokenizer is going to give the added tokens must be those of their rows."""
    from export.tokenizer import read_tokenizer  # which itself imports this package

    path = checkpoint.folder / "tokenizer.json"
    if not path.exists():
        return
    tokenizer = read_tokenizer(path)
    tokenizer.add_special_tokens(list(EXTRA_TOKENS))
    for id_, token in enumerate(EXTRA_TOKENS, first):
        if (found := tokenizer.token_to_id(token)) != id_:
            raise CheckpointError(
                f"tokenizer.json gives {token!r} the id {found}, expected {id_}: config.json field "
                f"text_config.initial_tokenizer_len is {first}; tokenizer and weights do not belong together"
            )


def preprocess(checkpoint: Checkpoint, tower: SigLIPConfig) -> Preprocess:
    """What ``preprocessor_config.json`` says; the processor's defaults for the rest."""
    config = checkpoint.json("preprocessor_config.json")
    with reading("preprocessor_config.json"):
        one_of(config, "resize_mode", "squash")
        height, width = numbers(config, "size", 2, 384)
        mean, std = (numbers(config, f"image_{name}", 3, 0.5) for name in ("mean", "std"))
        if not all(side in range(MAX_SIDE + 1) and side // tower.patch_size == tower.grid for side in (height, width)):
            raise CheckpointError(
                f"config.json field size is {shortened(config.get('size'))}, which is {[int(height), int(width)]}, "
                f"expected {[tower.image_size] * 2}, the size that the vision tower has positions for"
            )
        try:
            return Preprocess(
                size=(int(height), int(width)),
                mean=(mean[0], mean[1], mean[2]),
                std=(std[0], std[1], std[2]),
                resample="bilinear"
                if one_of(config, "interpolation_mode", "bicubic", "bilinear") == "bilinear"
                else "bicubic",
            )
        except ValueError as error:
            raise CheckpointError(f"config.json does not fit: {error}; correct the field") from error


def numbers(config: Mapping[str, Any], path: str, count: int, default: float) -> list[float]:
    """A list of ``count`` numbers, or one number that stands for all of them."""
    value = config.get(path)
    listed = value if isinstance(value, list) else [default if value is None else value] * count
    fits = all(isinstance(item, int | float) and not isinstance(item, bool) for item in listed)
    if len(listed) != count or not fits or not all(abs(item) < LARGEST for item in listed):
        raise CheckpointError(f"config.json field {path} is {shortened(value)}, expected {count} numbers")
    return [float(item) for item in listed]


XGENMM = XGenMM()
