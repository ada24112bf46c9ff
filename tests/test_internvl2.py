"""InternVL2 with InternLM2 and Phi-3 is the original code, number for number and token for token."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from export.checkpoint import Checkpoint, TensorFiles
from export.connector.pixel_shuffle import pixel_shuffle
from export.decoder import Decoder, KVCache
from export.families import backbone_from_checkpoint
from export.families.base import Backbone
from export.llm.base import LLM
from export.llm.internlm2 import internlm2_llm
from export.llm.phi3 import phi3_llm
from export.load import load_module
from export.peer import PeerDecoder, peer_model
from export.tokenizer import token_id, tokenizer_from_checkpoint
from runtime.errors import CheckpointError
from runtime.preprocess import pixel_values_from_frames
from runtime.template import compiled, rendered
from tests.checkpoints import ABSENT, copied, edit_json, refusal
from tests.conftest import GOLDEN, Recorded

Load = Callable[[str], Recorded]

INTERNLM2, PHI3, QWEN2 = "internvl2-internlm2-a", "internvl2-phi3-a", "internvl2-qwen2-a"
LIMIT = 1e-4


def backbone_of(folder: Path) -> Backbone:
    return backbone_from_checkpoint(Checkpoint.open(folder))


def loaded(name: str) -> tuple[nn.Module, Decoder]:
    checkpoint = Checkpoint.open(GOLDEN / name)
    backbone = backbone_from_checkpoint(checkpoint)
    vision = load_module(backbone.vision, checkpoint.tensors, backbone.vision_names)
    return vision, load_module(lambda: Decoder(backbone.llm.config), checkpoint.tensors, backbone.llm.names)


def close(what: str, found: Tensor, expected: Any) -> None:
    expected = torch.as_tensor(expected)
    assert found.shape == expected.shape, what
    difference = float((found - expected).abs().max())
    print(f"{what}: {difference:.1e}")
    assert difference < LIMIT, what


# --- the recorded stages


@pytest.mark.parametrize("name", [INTERNLM2, PHI3])
def test_vision_reproduces_every_recorded_stage(name: str, recorded: Load) -> None:
    arrays, (vision, _) = recorded(name), loaded(name)
    frames = list(arrays["frames_u8"])
    pixel_values = torch.from_numpy(pixel_values_from_frames(frames, backbone_of(GOLDEN / name).preprocess))
    close("pixels", pixel_values, arrays["pixel_values"])
    with torch.no_grad():
        embedded = vision.tower.embeddings(pixel_values)
        close("embeddings", embedded, arrays["vision_embeddings"])
        close("first block", vision.tower.encoder.layers[0](embedded), arrays["vision_layer0"])
        close("class token", vision.tower.encoder(embedded)[:, 0], arrays["vision_cls"])
        features = vision.tower(pixel_values)
        close("features", features, arrays["vision_features"])
        close("shuffled", pixel_shuffle(features, 2), arrays["pixel_shuffled"])
        close("tokens", vision(pixel_values), arrays["visual_tokens"])


@pytest.mark.parametrize("name", [INTERNLM2, PHI3])
def test_the_llm_reproduces_every_recorded_stage(name: str, recorded: Load) -> None:
    arrays, (_, decoder) = recorded(name), loaded(name)
    embeds = torch.tensor(arrays["inputs_embeds"])
    positions = torch.arange(embeds.shape[1])[None]
    mask = torch.ones(embeds.shape[1], embeds.shape[1], dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        first, _, _ = decoder.model.layers[0](embeds, decoder.angles(positions), mask, None)
        close("first layer", first, arrays["llm_layer0_out"])
        last, _ = decoder.run(embeds, positions, mask)
        close("last layer", last, arrays["llm_last_layer_out"])
        close("final norm", decoder.model.norm(last), arrays["llm_final_norm"])
        close("logits", decoder(embeds, positions), arrays["logits"])


@pytest.mark.parametrize("name", [INTERNLM2, PHI3])
def test_prompt_table_and_greedy_answer_are_the_recorded_ones(name: str, recorded: Load) -> None:
    arrays, (vision, decoder) = recorded(name), loaded(name)
    checkpoint = Checkpoint.open(GOLDEN / name)
    backbone = backbone_from_checkpoint(checkpoint)
    table = backbone.llm.table.read(checkpoint.tensors, (backbone.llm.table_rows, decoder.config.width))
    ids = torch.tensor(arrays["input_ids"])
    embeds = table[ids]
    visual = token_id(tokenizer_from_checkpoint(checkpoint, backbone.prompt), "<IMG_CONTEXT>")
    with torch.no_grad():
        embeds[ids == visual] = vision(torch.tensor(arrays["pixel_values"])).flatten(0, 1)
        close("rows", embeds, arrays["inputs_embeds"])
        found: list[int] = []
        for _ in arrays["greedy_ids"]:
            logits = decoder(embeds, torch.arange(embeds.shape[1])[None])
            found.append(int(logits[0, -1].argmax()))
            embeds = torch.cat((embeds, table[None, found[-1:]]), dim=1)
    assert found == arrays["greedy_ids"].tolist()


# --- the prompt


def render(backbone: Backbone, layout: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    chosen = backbone.prompt.layouts[layout]
    given = {
        "system": backbone.prompt.system,
        "visual_token": chosen.visual_token,
        "image_token": backbone.prompt.image_token,
        "add_generation_prompt": True,
        **dict.fromkeys(("frames", "tokens", "images", "image_tokens"), 0),
    }
    return rendered(compiled(chosen.template), messages=messages, **(given | variables))


def asking(question: str, *kinds: str) -> list[dict[str, Any]]:
    parts = [*({"type": kind} for kind in kinds), {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


@pytest.mark.parametrize("name", [INTERNLM2, PHI3, QWEN2])
def test_the_prompt_is_the_recorded_one(name: str, recorded: Load) -> None:
    arrays, checkpoint = recorded(name), Checkpoint.open(GOLDEN / name)
    backbone = backbone_from_checkpoint(checkpoint)
    frames = len(arrays["frames_u8"])
    question = str(arrays["question"]).split("<image>\n")[-1]
    text = render(backbone, "frames", asking(question, "video"), frames=frames, tokens=backbone.tokens_per_frame)
    assert text == str(arrays["prompt_text"])
    tokenizer = tokenizer_from_checkpoint(checkpoint, backbone.prompt)
    ids = tokenizer.encode(text, add_special_tokens=backbone.prompt.add_special_tokens).ids
    assert ids == arrays["input_ids"][0].tolist()
    assert token_id(tokenizer, backbone.prompt.end_token) == int(arrays["chat_eos_token_id"])


TURNS = {  # what the original conversation makes of a system text, two questions and an answer
    "internlm2-chat": "<|im_start|>system\nS<|im_end|><|im_start|>user\n{first}<|im_end|>"
    "<|im_start|>assistant\nYes. <|im_end|><|im_start|>user\nwhy?<|im_end|><|im_start|>assistant\n",
    "phi3-chat": "<|system|>\nS<|end|><|user|>\n{first}<|end|><|assistant|>\nYes. <|end|><|user|>\nwhy?<|end|>"
    "<|assistant|>\n",
}
TURNS["Hermes-2"] = TURNS["internlm2-chat"]


@pytest.mark.parametrize(
    ("kinds", "layout", "variables", "first"),
    [
        (("video",), "video", {"tokens": 3}, "<img>VVV</img>\nwhat?"),
        (("video",), "training", {"tokens": 2}, "Frame1: <img>V</img>\nFrame2: <img>V</img>what?"),
        (("image",), "frames", {"images": 1, "image_tokens": 2}, "<img>VV</img>\nwhat?"),
        (
            ("image", "image"),
            "video",
            {"images": 2, "image_tokens": 1},
            "Image-1: <img>V</img>\nImage-2: <img>V</img>\nwhat?",
        ),
        ((), "frames", {}, "what?"),
    ],
)
@pytest.mark.parametrize("name", [INTERNLM2, PHI3, QWEN2])
def test_turns_follow_the_published_conversation(
    name: str, kinds: tuple[str, ...], layout: str, variables: dict[str, Any], first: str
) -> None:
    backbone = backbone_of(GOLDEN / name)
    turns = [{"role": "assistant", "content": "Yes. "}, {"role": "user", "content": "why?"}]
    text = render(backbone, layout, [*asking("what?", *kinds), *turns], system="S", **variables)
    template = json.loads((GOLDEN / name / "config.json").read_text())["template"]
    assert text == TURNS[template].format(first=first.replace("V", "<IMG_CONTEXT>"))


def test_template_and_system_text_are_the_checkpoint_s(tmp_path: Path) -> None:
    folder = copied(GOLDEN / INTERNLM2, tmp_path / "checkpoint")
    edit_json(folder / "config.json", "system_message", "Be short.")
    assert backbone_of(folder).prompt.system == "Be short."
    edit_json(folder / "config.json", "template", ABSENT)
    assert backbone_of(folder).prompt.end_token == "<|im_end|>"
    edit_json(folder / "config.json", "template", "phi3-chat")
    assert backbone_of(folder).prompt.end_token == "<|end|>"
    assert "the tokenizer has no token '<|assistant|>'" in refusal(folder, "none")


# --- variants of the LLMs

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "bias": False,
}
LONGROPE = {"type": "su", "short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.5, 2.0, 4.0, 9.0]}


def published(kind: str, config: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """Random tensors under the names that an LLM is published with."""
    width, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    rows = (heads + 2 * (config["num_key_value_heads"] or heads)) * (width // heads)
    layer = {
        "internlm2": {
            "attention.wqkv": (rows, width),
            "attention.wo": (width, width),
            "feed_forward.w1": (mlp, width),
            "feed_forward.w3": (mlp, width),
            "feed_forward.w2": (width, mlp),
            "attention_norm": (width,),
            "ffn_norm": (width,),
        },
        "phi3": {
            "self_attn.qkv_proj": (rows, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_up_proj": (2 * mlp, width),
            "mlp.down_proj": (width, mlp),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        },
    }[kind]
    table, head = {"internlm2": ("tok_embeddings", "output"), "phi3": ("embed_tokens", "lm_head")}[kind]
    shapes: dict[str, tuple[int, ...]] = {
        f"model.{table}": (config["vocab_size"], width),
        f"{head}": (config["vocab_size"], width),
        "model.norm": (width,),
    }
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return {
        f"llm.{name}.weight": torch.randn(shape, generator=generator) * (0.2 if len(shape) > 1 else 1.0)
        for name, shape in shapes.items()
    }


def variant(kind: str, folder: Path, seed: int, **changes: Any) -> tuple[LLM, TensorFiles]:
    """A random LLM of the published layout, its facts and its tensors."""
    config = {"text": SIZES | changes}
    tensors = published(kind, config["text"], torch.Generator().manual_seed(seed))
    save_file(tensors, folder / "model.safetensors")
    read = {"internlm2": internlm2_llm, "phi3": phi3_llm}[kind]
    return read(config, "text.", "llm."), TensorFiles.scan([folder / "model.safetensors"])


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "internlm2": ("internlm2", {}),
    "internlm2, one key head": ("internlm2", {"num_key_value_heads": 1}),
    "internlm2, no grouping": ("internlm2", {"num_key_value_heads": None}),
    "internlm2, tied": ("internlm2", {"tie_word_embeddings": True}),
    "internlm2, dynamic NTK": ("internlm2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "phi3": ("phi3", {}),
    "phi3, no grouping": ("phi3", {"num_key_value_heads": None}),
    "phi3, tied": ("phi3", {"tie_word_embeddings": True}),
    "phi3, window": ("phi3", {"sliding_window": 9}),
    "phi3, longrope, short": ("phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 128}),
    "phi3, longrope, long": ("phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 32}),
    "phi3, longrope, default": ("phi3", {"rope_scaling": LONGROPE, "max_position_embeddings": 16384}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_llm_is_its_peer_in_transformers(name: str, tmp_path: Path, seed: int) -> None:
    kind, changes = VARIANTS[name]
    llm, tensors = variant(kind, tmp_path, seed, **changes)
    assert llm.peer
    decoder = load_module(lambda: Decoder(llm.config), tensors, llm.names)
    theirs = PeerDecoder(peer_model(llm.peer, tensors))
    table = llm.table.read(tensors, (llm.table_rows, llm.config.width))
    embeds, positions = table[torch.randint(61, (2, 50))], torch.arange(50).expand(2, 50)
    with torch.no_grad():
        close(name, decoder(embeds, positions), theirs(embeds, positions))


def test_a_row_of_phi3_sees_its_window_and_itself() -> None:
    """Masked in transformers 4.41 where a key lies window + 1 rows back or more."""
    llm = phi3_llm(SIZES | {"sliding_window": 3}, "", "")
    rows = torch.arange(8)
    seen = Decoder(llm.config).seen(rows, rows[:, None])
    assert torch.equal(seen, torch.ones(8, 8, dtype=torch.bool).tril().triu(-3))
    assert phi3_llm(SIZES | {"sliding_window": 256}, "", "").config.window == 0


def test_phi3_s_cached_keys_keep_their_short_factors(tmp_path: Path, seed: int) -> None:
    """A step that reaches the original context turns its own rows by the long factors, as the original does."""
    changes = {"rope_scaling": LONGROPE, "original_max_position_embeddings": 40}
    llm, tensors = variant("phi3", tmp_path, seed, num_hidden_layers=1, **changes)
    decoder = load_module(lambda: Decoder(llm.config), tensors, llm.names)
    embeds, positions = torch.randn(1, 48, 48), torch.arange(48)[None]
    past = [torch.zeros(1, 2, 64, 8) for _ in range(2)]
    short, long = decoder.angles(positions[:, :39]), decoder.angles(positions[:, 39:])
    angles = tuple(torch.cat(parts, 1) for parts in zip(short, long, strict=True))
    layer, mask = decoder.model.layers[0], torch.ones(48, 48, dtype=torch.bool).tril()
    with torch.no_grad():
        for start, end in ((0, 39), (39, 48)):
            caches = [KVCache(past[0], past[1], torch.tensor([start]))]
            logits, past = decoder.step(embeds[:, start:end], positions[:, start:end], caches)
        states, _, _ = layer(embeds, angles, mask, None)
        close("logits", logits, decoder.lm_head(decoder.model.norm(states))[:, -1])
        assert (decoder(embeds, positions)[:, -1] - logits).abs().max() > LIMIT


# --- what is refused


@pytest.mark.parametrize(
    ("name", "field", "value", "named"),
    [
        (INTERNLM2, "llm_config.bias", True, "llm_config.bias is not false"),
        (INTERNLM2, "llm_config.bias", ABSENT, "llm_config.bias is not false"),
        (INTERNLM2, "llm_config.rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling.type is 'linear'"),
        (INTERNLM2, "llm_config.rope_scaling", {"factor": 2.0}, "rope_scaling.type is None"),
        (INTERNLM2, "llm_config.rope_scaling", "dynamic", "llm_config.rope_scaling"),
        (INTERNLM2, "llm_config.num_key_value_heads", 3, "multiple of llm_config.num_key_value_heads, which is 3"),
        (INTERNLM2, "llm_config.num_key_value_heads", 4, "tensor language_model.model.layers.0.attention.wqkv.weight"),
        (INTERNLM2, "llm_config.num_key_value_heads", 0, "llm_config.num_key_value_heads"),
        (INTERNLM2, "llm_config.hidden_act", "gelu", "supported: 'silu'"),
        (INTERNLM2, "llm_config.rms_norm_eps", ABSENT, "llm_config.rms_norm_eps"),
        (INTERNLM2, "llm_config.rope_theta", None, "llm_config.rope_theta"),
        (INTERNLM2, "llm_config.architectures", ["LlamaForCausalLM"], "supported: ['InternLM2ForCausalLM'], ['Phi3"),
        (INTERNLM2, "llm_config.architectures", "Phi3ForCausalLM", "llm_config.architectures is 'Phi3ForCausalLM'"),
        (INTERNLM2, "template", "internvl_zh", "supported: 'internlm2-chat', 'Hermes-2', 'phi3-chat'"),
        (INTERNLM2, "system_message", 5, "system_message"),
        (INTERNLM2, "pad2square", True, "pad2square"),
        (PHI3, "llm_config.rope_scaling.type", "yarn", "rope_scaling.type is 'yarn'; supported: 'su', 'longrope'"),
        (PHI3, "llm_config.rope_scaling.long_factor", [1.0] * 7, "rope_scaling.long_factor is 7 values"),
        (PHI3, "llm_config.rope_scaling.short_factor", ABSENT, "rope_scaling.short_factor"),
        (PHI3, "llm_config.rope_scaling.short_factor", [1.0] * 7 + [0], "above 0"),
        (PHI3, "llm_config.rope_scaling.short_factor", [1.0] * 7 + ["2"], "above 0"),
        (PHI3, "llm_config.rope_scaling.short_mscale", 1.2, "rope_scaling.short_mscale is set"),
        (PHI3, "llm_config.original_max_position_embeddings", 1, "original_max_position_embeddings is 1"),
        (PHI3, "llm_config.original_max_position_embeddings", "4096", "original_max_position_embeddings"),
        (PHI3, "llm_config.sliding_window", 0, "llm_config.sliding_window"),
        (PHI3, "llm_config.sliding_window", "all", "llm_config.sliding_window"),
        (PHI3, "llm_config.partial_rotary_factor", 0.75, "partial_rotary_factor is 0.75; supported: 1.0"),
        (PHI3, "llm_config.attention_bias", True, "attention_bias is True; supported: False"),
        (PHI3, "llm_config.intermediate_size", 64, "layers.0.mlp.gate_up_proj.weight has shape [256, 64]"),
        (PHI3, "llm_config.num_key_value_heads", 2, "layers.0.self_attn.qkv_proj.weight has shape [192, 64]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, field: str, value: object, named: str, tmp_path: Path) -> None:
    folder = copied(GOLDEN / name, tmp_path / "checkpoint")
    edit_json(folder / "config.json", field, value)
    assert named in refusal(folder, "none")


def test_factors_may_be_called_longrope_and_stand_alone() -> None:
    given = SIZES | {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64}
    newer = copy.deepcopy(given)
    newer["rope_scaling"] = {**LONGROPE, "rope_type": "longrope", "original_max_position_embeddings": 64}
    del newer["rope_scaling"]["type"], newer["original_max_position_embeddings"]
    assert phi3_llm(newer, "", "").config == phi3_llm(given, "", "").config
    assert phi3_llm(given, "", "").config.rotary.magnitude == pytest.approx(np.sqrt(1 + np.log(4) / np.log(64)))
    short = phi3_llm(given | {"max_position_embeddings": 64}, "", "").config.rotary
    assert dataclasses.replace(short, magnitude=0) == dataclasses.replace(
        phi3_llm(given, "", "").config.rotary, magnitude=0
    )
    assert short.magnitude == 1


def test_a_message_about_a_field_is_one_line() -> None:
    with pytest.raises(CheckpointError) as caught:
        phi3_llm(SIZES | {"rope_scaling": LONGROPE | {"long_factor": [1.0] * 500}}, "", "")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
