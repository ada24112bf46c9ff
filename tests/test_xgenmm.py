"""BLIP-3 (xGen-MM v1.5): every recorded stage of the original code, and its prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import onnx_ir
import onnxruntime as ort
import pytest
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.export import Dim
from transformers import Phi3Config, Phi3ForCausalLM

from export.checkpoint import Checkpoint
from export.connector.perceiver import Perceiver, PerceiverConfig
from export.decoder import Decoder
from export.families.base import Backbone
from export.families.xgenmm import EXTRA_TOKENS, SYSTEM
from export.llm.base import LLM
from export.load import load_module
from export.stages import Stage
from export.trace import onnx_from_stage
from runtime.preprocess import vision_feeds
from tests.checkpoints import copied, edit_json, rewrite
from tests.conftest import Recorded
from tests.xgenmm import FOLDER, NAME, asking, close, read, render

Load = Callable[[str], Recorded]


@pytest.fixture
def arrays(recorded: Load) -> Recorded:
    return recorded(NAME)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return read(FOLDER)


@pytest.fixture(scope="module")
def vision(backbone: Backbone) -> Any:
    return load_module(backbone.vision, Checkpoint.open(FOLDER).tensors, backbone.vision_names)


@pytest.fixture(scope="module")
def decoder(backbone: Backbone) -> Decoder:
    return load_module(lambda: Decoder(backbone.llm.config), Checkpoint.open(FOLDER).tensors, backbone.llm.names)


@pytest.fixture(scope="module")
def table(backbone: Backbone) -> torch.Tensor:
    llm = backbone.llm
    return llm.table.read(Checkpoint.open(FOLDER).tensors, (llm.table_rows, llm.config.width))


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


# --- the original code's numbers


def test_the_fixture_s_frames_become_the_recorded_pixels(backbone: Backbone, arrays: Recorded) -> None:
    feeds = vision_feeds(list(arrays["frames_u8"].astype(np.uint8)), backbone.preprocess)
    assert list(feeds) == ["pixel_values"]
    close("pixel_values", torch.from_numpy(feeds["pixel_values"]), arrays["pixel_values"])


@torch.no_grad()
def test_vision_reproduces_every_recorded_stage(vision: Any, arrays: Recorded) -> None:
    pixel_values = torch.tensor(arrays["pixel_values"])
    tower, perceiver = vision.tower, vision.connector
    embedded = tower.embeddings(pixel_values)
    close("vision_embeddings", embedded, arrays["vision_embeddings"])
    close("vision_layer0", tower.encoder.layers[0](embedded), arrays["vision_layer0"])
    features = tower(pixel_values)
    close("vision_features", features, arrays["vision_features"])
    latents = perceiver.latents.expand(len(features), -1, -1)
    close("perceiver_attn0", perceiver.layers[0][0](features, latents), arrays["perceiver_attn0"])
    close("perceiver_last", perceiver.resample(features), arrays["perceiver_last"])
    close("visual_tokens", vision(pixel_values), arrays["visual_tokens"])


@torch.no_grad()
def test_the_decoder_reproduces_every_recorded_stage(decoder: Decoder, arrays: Recorded) -> None:
    embeds = torch.tensor(arrays["inputs_embeds"])
    positions, mask = torch.arange(embeds.shape[1])[None], causal(embeds.shape[1])
    states, angles = embeds, decoder.angles(positions)
    *before, last = decoder.model.layers
    for index, layer in enumerate(before):
        states = layer(states, angles, mask, None)[0]
        if index == 0:
            close("hidden_first", states, arrays["hidden_first"])
    close("hidden_last_prenorm_input", states, arrays["hidden_last_prenorm_input"])
    normed = decoder.model.norm(last(states, angles, mask, None)[0])
    close("hidden_final_norm", normed, arrays["hidden_final_norm"])
    close("logits", decoder(embeds, positions), arrays["logits"])


def embeds_of(route: str, arrays: Recorded, backbone: Backbone, table: torch.Tensor) -> torch.Tensor:
    """What the LLM reads: rows of the table, with visual ones where they belong."""
    name = {"": "expanded_ids"}.get(route, f"{route}input_ids")
    ids = torch.tensor(arrays[name])
    if route == "linvt.":
        start, vectors = int(arrays["linvt.span_start"]), torch.tensor(arrays["linvt.vectors"])
        embedded = table[ids]
        return torch.cat((embedded[:, :start], vectors, embedded[:, start + 1 :]), dim=1)
    embedded = table[ids].clone()
    first = backbone.llm.table_rows - len(EXTRA_TOKENS)
    places = (ids[0] == first) | (ids[0] == first + 1)  # <image>, and <image placeholder> in the base model's prompt
    embedded[0, places] = torch.tensor(arrays["visual_tokens"]).flatten(0, 1)[: int(places.sum())]
    return embedded


@torch.no_grad()
@pytest.mark.parametrize("route", ["", "base.", "linvt.", "text."])
def test_every_recorded_route_gives_its_logits(
    route: str, backbone: Backbone, decoder: Decoder, table: torch.Tensor, arrays: Recorded
) -> None:
    embeds = embeds_of(route, arrays, backbone, table)
    if f"{route}inputs_embeds" in arrays:
        close(f"{route}inputs_embeds", embeds, arrays[f"{route}inputs_embeds"])
    expected = arrays[f"{route}logits"]
    logits = decoder(embeds, torch.arange(embeds.shape[1])[None])
    close(f"{route}logits", logits[:, -expected.shape[1] :], expected)


@torch.no_grad()
@pytest.mark.parametrize("route", ["", "base.", "linvt."])
def test_greedy_decoding_gives_the_recorded_ids(
    route: str, backbone: Backbone, decoder: Decoder, table: torch.Tensor, arrays: Recorded
) -> None:
    embeds, found = embeds_of(route, arrays, backbone, table), []
    for _ in arrays[f"{route}greedy_ids"]:
        found.append(int(decoder(embeds, torch.arange(embeds.shape[1])[None])[0, -1].argmax()))
        embeds = torch.cat((embeds, table[None, found[-1:]]), dim=1)
    assert found == arrays[f"{route}greedy_ids"].tolist()


# --- the modules


@torch.no_grad()
def test_the_perceiver_is_the_original_s_formula(random: np.random.Generator) -> None:
    head_dim, latents, patches, layers, out = (int(value) for value in random.integers(1, 6, 5))
    width, mlp_width = (int(value) for value in random.integers(3, 20, 2))
    config = PerceiverConfig(latents, width, 16 * head_dim, mlp_width, layers)
    perceiver = Perceiver(config, out)
    for parameter in perceiver.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    weights = dict(perceiver.named_parameters())

    def norm(name: str, states: torch.Tensor) -> torch.Tensor:
        spread = (states - states.mean(-1, keepdim=True)) / (states.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    features = torch.randn(3, patches, width)
    for frame, tokens in zip(features, perceiver(features), strict=True):
        states = weights["latents"]
        for layer in range(layers):
            name = f"layers.{layer}"
            query = norm(f"{name}.0.norm_latents", states)
            seen = torch.cat((norm(f"{name}.0.norm_media", frame), query))
            heads = []
            for head in range(16):
                rows = slice(head * head_dim, (head + 1) * head_dim)
                keys, values = weights[f"{name}.0.to_kv.weight"].chunk(2)
                scores = (query @ weights[f"{name}.0.to_q.weight"][rows].T) @ (seen @ keys[rows].T).T
                heads.append((scores / math.sqrt(head_dim)).softmax(-1) @ (seen @ values[rows].T))
            states = states + torch.cat(heads, dim=-1) @ weights[f"{name}.0.to_out.weight"].T
            inner = norm(f"{name}.1.0", states) @ weights[f"{name}.1.1.weight"].T
            gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            states = states + gelu @ weights[f"{name}.1.3.weight"].T
        expected = norm("norm", states) @ weights["projection.weight"].T + weights["projection.bias"]
        close("tokens", tokens, expected.numpy())


@torch.no_grad()
def test_the_vision_stage_traces_to_one_attention_node_a_layer_with_free_frames(
    backbone: Backbone, vision: Any, random: np.random.Generator
) -> None:
    example = torch.randn(5, 3, *backbone.preprocess.size)
    stage = Stage("vision", vision, (example,), ("pixel_values",), ("tokens",), ({0: Dim("frames", min=1, max=64)},))
    model = onnx_from_stage(stage)
    nodes = [node.op_type for node in model.graph]
    assert nodes.count("Attention") == len(vision.tower.encoder.layers) + len(vision.connector.layers)
    model.opset_imports[""] = 23
    session = ort.InferenceSession(onnx_ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    frames = random.standard_normal((int(random.integers(1, 4)), *example.shape[1:])).astype(np.float32)
    (tokens,) = session.run(None, {"pixel_values": frames})
    close("tokens", vision(torch.from_numpy(frames)), tokens)


def with_head_bias(llm: LLM) -> Phi3ForCausalLM:
    """Transformers' Phi-3 of the same sizes, whose head gets the bias that only xGen-MM has."""
    config = llm.config
    theirs = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=config.vocab,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads_kv,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rotary.theta},
            sliding_window=config.window + 1,  # which transformers 5 counts with the row itself
            pad_token_id=None,
            attn_implementation="eager",
        )
    )
    theirs.lm_head = nn.Linear(config.width, config.vocab)
    return theirs.eval()


@torch.no_grad()
def test_the_llm_is_the_phi3_of_transformers_with_the_head_put_together(
    tmp_path: Path, random: np.random.Generator
) -> None:
    folder = copied(FOLDER, tmp_path / "checkpoint")
    window = int(random.integers(3, 30))
    edit_json(folder / "config.json", "text_config.sliding_window", window)

    def redraw(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("vlm.lang_model.")]:
            fresh = torch.randn_like(tensors[name]) * 0.2
            tensors[name] = fresh + 1 if "norm" in name else fresh

    rewrite(folder, redraw)
    checkpoint = Checkpoint.open(folder)
    llm = read(folder).llm
    ours = load_module(lambda: Decoder(llm.config), checkpoint.tensors, llm.names)
    theirs = with_head_bias(llm)
    stored = {name: checkpoint.tensors.tensor(name) for name in checkpoint.tensors.files}
    prefix, first = "vlm.lang_model.", 362
    state = {
        name: stored[prefix + name] for name in theirs.state_dict() if prefix + name in stored and "lm_head" not in name
    }
    for leaf in ("weight", "bias"):
        parts = (stored[f"{prefix}lm_head.{leaf}"][:first], stored[f"{prefix}lm_head.additional_fc.{leaf}"])
        state[f"lm_head.{leaf}"] = torch.cat(parts)
    embedding = f"{prefix}model.embed_tokens"
    parts = (stored[f"{embedding}.weight"][:first], stored[f"{embedding}.additional_embedding.weight"])
    state["model.embed_tokens.weight"] = torch.cat(parts)
    theirs.load_state_dict(state)
    assert torch.equal(
        llm.table.read(checkpoint.tensors, (llm.table_rows, llm.config.width)), state["model.embed_tokens.weight"]
    )
    ids, positions = torch.randint(llm.config.vocab, (1, 47)), torch.arange(47)[None]
    expected = theirs(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
    close("logits", ours(state["model.embed_tokens.weight"][ids], positions), expected.numpy())


# --- prompts


@pytest.fixture(scope="module")
def tokenizer(backbone: Backbone) -> Tokenizer:
    made = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    made.add_special_tokens(list(backbone.prompt.extra_tokens))
    return made


def text_of(arrays: Recorded, name: str) -> str:
    return bytes(arrays[name].astype(np.uint8)).decode()


QUESTION = "What is happening in this video? Describe what happens next."


def test_frames_are_numbered_pictures(backbone: Backbone, tokenizer: Tokenizer, arrays: Recorded) -> None:
    frames, tokens = arrays["visual_tokens"].shape[:2]
    one = render(backbone, "frames", asking(QUESTION, "video"), frames=frames, tokens=1)
    assert one == text_of(arrays, "prompt_text")
    assert tokenizer.encode(one).ids == arrays["input_ids"][0].tolist()
    every = render(backbone, "frames", asking(QUESTION, "video"), frames=frames, tokens=tokens)
    assert tokenizer.encode(every).ids == arrays["expanded_ids"][0].tolist()


def test_linvt_s_rows_stand_where_one_picture_s_would(
    backbone: Backbone, tokenizer: Tokenizer, arrays: Recorded
) -> None:
    one = render(backbone, "video", asking(QUESTION, "video"), frames=3, tokens=1, system="")
    assert one == text_of(arrays, "linvt.prompt_text")
    assert tokenizer.encode(one).ids == arrays["linvt.input_ids"][0].tolist()
    rows = arrays["linvt.vectors"].shape[1]
    ids = tokenizer.encode(render(backbone, "video", asking(QUESTION, "video"), tokens=rows, system="")).ids
    start, short = int(arrays["linvt.span_start"]), arrays["linvt.input_ids"][0].tolist()
    assert ids == short[:start] + [short[start]] * rows + short[start + 1 :]
    whole = render(backbone, "video", asking(QUESTION, "video"), tokens=rows)
    assert whole.startswith(f"<|system|>\n{SYSTEM}<|end|>\n<|user|>\n<image>")


def test_text_alone_is_the_recorded_prompt(backbone: Backbone, tokenizer: Tokenizer, arrays: Recorded) -> None:
    messages = [{"role": "user", "content": "How many people are there?"}]
    for layout in backbone.prompt.layouts:
        text = render(backbone, layout, messages, system=None)
        assert text == text_of(arrays, "text.prompt_text")
        assert tokenizer.encode(text).ids == arrays["text.input_ids"][0].tolist()


@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("layout", ["video", "frames"])
def test_pictures_stand_before_the_question_a_line_each(backbone: Backbone, layout: str, images: int) -> None:
    """As LAVIS' sft_data_utils puts them: "<image>\\n" for each, then the words."""
    text = render(backbone, layout, asking("Who?", *["image"] * images), images=images, image_tokens=2, system="")
    assert text == "<|user|>\n" + "<image><image>\n" * images + "Who?<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize("system", [SYSTEM, ""])
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_conversation_goes_on_as_the_published_template_does(backbone: Backbone, system: str, goes_on: bool) -> None:
    published = json.loads((FOLDER / "tokenizer_config.json").read_text())["chat_template"]
    turns = [
        ("user", "<image>\nWho?"),
        ("assistant", "A cat."),
        ("user", "Where?"),
        ("assistant", "There."),
        ("user", "?"),
    ]
    messages = [{"role": role, "content": text} for role, text in turns]
    theirs = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(published)
    first = [{"role": "system", "content": system}] if system else []
    expected = theirs.render(messages=first + messages, add_generation_prompt=goes_on, eos_token="")
    parts = [*asking("Who?", "video"), *messages[1:]]
    assert render(backbone, "video", parts, tokens=1, system=system, add_generation_prompt=goes_on) == expected


def test_every_control_token_is_one_id_and_the_added_ones_are_the_last_rows(
    backbone: Backbone, tokenizer: Tokenizer
) -> None:
    assert all(len(tokenizer.encode(token).ids) == 1 for token in backbone.prompt.reserved)
    first = backbone.llm.table_rows - len(EXTRA_TOKENS)
    assert [tokenizer.token_to_id(token) for token in backbone.prompt.extra_tokens] == [first, first + 1, first + 2]
    assert backbone.prompt.end_token == "<|end|>" and not backbone.prompt.add_special_tokens
