"""Molmo's frames, tower, connector, prompt and LLM are the original code's, number for number."""

from __future__ import annotations

import json
from collections.abc import Callable
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

from export.checkpoint import Checkpoint
from export.connector.attention_pooling import windows
from export.decoder import Decoder, KVCache
from export.families.base import Backbone, FrameRoute
from export.families.molmo import MOLMO
from export.load import load_module
from export.stages import Stage
from export.trace import onnx_from_stage
from runtime.errors import OptionError
from runtime.preprocess import vision_feeds
from runtime.template import compiled, rendered
from tests.conftest import GOLDEN, Recorded

FOLDER = GOLDEN / "molmo-a"


def largest(found: torch.Tensor, expected: np.ndarray, name: str = "") -> float:  # type: ignore[type-arg]
    difference = float(np.abs(found.detach().numpy() - expected).max())
    print(f"{name} largest difference {difference:.2e}")
    return difference


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(FOLDER)


@pytest.fixture(scope="module")
def backbone(checkpoint: Checkpoint) -> Backbone:
    assert MOLMO.recognises(checkpoint.config)
    return MOLMO.backbone(checkpoint, FrameRoute())


@pytest.fixture(scope="module")
def arrays(recorded: Callable[[str], Recorded]) -> Recorded:
    return recorded("molmo-a")


@pytest.fixture(scope="module")
def crops() -> Recorded:
    with np.load(FOLDER / "expected_multicrop.npz") as loaded:
        return {name: loaded[name] for name in loaded.files}


@pytest.fixture(scope="module")
def vision(checkpoint: Checkpoint, backbone: Backbone) -> nn.Module:
    return load_module(backbone.vision, checkpoint.tensors, backbone.vision_names)


@pytest.fixture(scope="module")
def decoder(checkpoint: Checkpoint, backbone: Backbone) -> Decoder:
    return load_module(lambda: Decoder(backbone.llm.config), checkpoint.tensors, backbone.llm.names)


@pytest.fixture(scope="module")
def table(checkpoint: Checkpoint, backbone: Backbone) -> torch.Tensor:
    return backbone.llm.table.read(checkpoint.tensors, (backbone.llm.table_rows, backbone.llm.config.width))


def pixels(vectors: np.ndarray, patch: int = 14) -> torch.Tensor:  # type: ignore[type-arg]
    """Patch vectors (F, P, patch * patch * 3) of a square -> (F, 3, H, W)."""
    side = round(vectors.shape[1] ** 0.5)
    grid = torch.tensor(vectors).unflatten(2, (patch, patch, 3)).unflatten(1, (side, side))
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3).contiguous()


def merged(ids: torch.Tensor, table: torch.Tensor, places: Any, tokens: Any) -> torch.Tensor:
    """Embeddings (S, D) with visual tokens added where ``places`` says; negative places take none."""
    embeds, taken = table[ids].clone(), torch.as_tensor(places).flatten()
    embeds[taken[taken >= 0]] += torch.as_tensor(tokens).flatten(0, 1)[taken >= 0]
    return embeds


def test_frames_become_the_original_codes_inputs(backbone: Backbone, arrays: Recorded) -> None:
    feeds = vision_feeds(list(arrays["frames_u8"]), backbone.preprocess)
    expected = pixels(arrays["pixel_values"])
    assert largest(torch.tensor(feeds["pixel_values"]), expected.numpy(), "pixel_values") < 2e-6
    np.testing.assert_array_equal(feeds["pixel_mask"], arrays["image_masks"])
    assert 0 in feeds["pixel_mask"] and 1 in feeds["pixel_mask"]


def test_vision_reproduces_every_recorded_stage(vision: Any, arrays: Recorded) -> None:
    pixel_values, mask = pixels(arrays["pixel_values"]), torch.tensor(arrays["image_masks"])
    with torch.no_grad():
        states, outputs = vision.tower.embeddings(pixel_values), []
        for block in vision.tower.blocks:
            states = block(states)
            outputs.append(states)
        assert len(outputs) == 9  # of ten that are stored
        for output, name in ((0, "vit_out_first_block"), (-1, "vit_out_m2"), (1, "vit_out_m9")):
            assert largest(outputs[output], arrays[name], name) < 1e-4
        features = vision.tower(pixel_values)
        assert largest(features, arrays["vision_features"], "vision_features") < 1e-4
        marked = vision.connector.marked(features, mask)
        assert largest(marked, arrays["connector_input"], "connector_input") < 1e-4
        pooled = vision.connector.image_pooling_2d(windows(marked, 6)).view(2, 9, -1)
        assert largest(pooled, arrays["pooled_features"], "pooled_features") < 1e-4
        assert largest(vision(pixel_values, mask), arrays["visual_tokens"], "visual_tokens") < 1e-4
        unknown = vision(pixel_values, torch.full_like(mask, -1))
        assert largest(unknown, arrays["visual_tokens_mask_neg1"], "visual_tokens_mask_neg1") < 1e-4


def test_from_frames_to_tokens_in_one_go(backbone: Backbone, vision: nn.Module, arrays: Recorded) -> None:
    feeds = vision_feeds(list(arrays["frames_u8"]), backbone.preprocess)
    with torch.no_grad():
        tokens = vision(*map(torch.tensor, feeds.values()))
    assert tokens.shape[1] == backbone.tokens_per_frame == 9
    assert largest(tokens, arrays["visual_tokens"], "visual_tokens") < 1e-4


def test_crops_of_a_picture_with_the_published_masks(vision: Any, crops: Recorded) -> None:
    pixel_values, mask = pixels(crops["pixel_values"]), torch.tensor(crops["image_masks"])
    with torch.no_grad():
        marked = vision.connector.marked(vision.tower(pixel_values), mask)
        assert largest(marked, crops["connector_input"], "connector_input") < 1e-4
        assert largest(vision(pixel_values, mask), crops["visual_tokens"], "visual_tokens") < 1e-4


@pytest.mark.parametrize("kind", ["arrays", "crops"])
def test_visual_tokens_are_added_to_rows_of_both_tables(
    kind: str, backbone: Backbone, table: torch.Tensor, request: pytest.FixtureRequest
) -> None:
    golden = request.getfixturevalue(kind)
    assert backbone.merge == "add" and backbone.llm.table_rows == 384 + 128
    ids = torch.tensor(golden["input_ids"])
    embeds = merged(ids, table, golden["image_input_idx"], golden["visual_tokens"])
    assert largest(embeds, golden["inputs_embeds"], "inputs_embeds") == 0


@pytest.mark.parametrize("kind", ["arrays", "crops"])
def test_decoder_reproduces_every_recorded_stage(kind: str, decoder: Decoder, request: pytest.FixtureRequest) -> None:
    golden = request.getfixturevalue(kind)
    states = torch.tensor(golden["inputs_embeds"])[None]
    positions = torch.arange(states.shape[1])[None]
    mask = torch.ones(states.shape[1], states.shape[1], dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        logits = decoder(states, positions)
        for layer, expected in zip(decoder.model.layers, golden["hidden_states"], strict=False):
            assert largest(states[0], expected, "hidden_states") < 1e-4
            states, _, _ = layer(states, decoder.angles(positions), mask, None)
        assert largest(decoder.model.norm(states)[0], golden["hidden_states"][-1], "after ln_f") < 1e-4
    assert largest(logits[0], golden["logits"], "logits") < 1e-4


def test_greedy_decoding_over_the_cache(decoder: Decoder, table: torch.Tensor, arrays: Recorded) -> None:
    config, at = decoder.config, 0
    past = [torch.randn(1, config.heads_kv, 80, config.head_dim) for _ in range(2 * config.layers)]
    rows, found = torch.tensor(arrays["inputs_embeds"])[None], []
    with torch.no_grad():
        for expected in (arrays["logits"][-1], *arrays["decode_logits"]):
            caches = [KVCache(*pair, torch.tensor([at])) for pair in zip(past[::2], past[1::2], strict=True)]
            positions = torch.arange(at, at + rows.shape[1])[None]
            logits, past = decoder.step(rows, positions, caches)
            assert largest(logits[0], expected, "decode_logits") < 1e-4
            at += rows.shape[1]
            found.append(int(logits.argmax()))
            rows = table[found[-1:]][None]
    assert found == arrays["greedy_ids"].tolist()


def render(backbone: Backbone, layout: str, messages: list[Any], *, answer: bool = True, **counts: int) -> str:
    sizes = {"frames": 0, "tokens": 0, "images": 0, "image_tokens": 0, **counts}
    placeholders = {"visual_token": backbone.prompt.layouts[layout].visual_token, "image_token": "<im_patch>"}
    template = compiled(backbone.prompt.layouts[layout].template)
    return rendered(
        template,
        messages=messages,
        add_generation_prompt=answer,
        system=backbone.prompt.system,
        **placeholders,
        **sizes,
    )


def asked(question: str, *parts: str) -> dict[str, Any]:
    return {"role": "user", "content": [*({"type": part} for part in parts), {"type": "text", "text": question}]}


@pytest.mark.parametrize(("layout", "part", "counts"), [("frames", "video", 1), ("video", "image", 2)])
def test_frames_and_pictures_stand_as_the_processor_puts_them(
    layout: str, part: str, counts: int, backbone: Backbone, arrays: Recorded
) -> None:
    message = asked(str(arrays["question"]), *[part] * counts)
    text = render(backbone, layout, [message], frames=2, tokens=9, images=2, image_tokens=9)
    assert text == str(arrays["prompt_text"])
    ids = Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert ids == arrays["input_ids"].tolist()
    assert [at for at, id_ in enumerate(ids) if id_ == 386] == arrays["image_input_idx"].flatten().tolist()


def test_linvts_rows_stand_in_place_of_the_visual_span(backbone: Backbone) -> None:
    text = render(backbone, "video", [asked("What?", "video")], frames=8, tokens=4)
    assert text == f"<|endoftext|><im_start>{'<im_patch>' * 4}<im_end> User: What? Assistant:"


@pytest.mark.parametrize("answer", [True, False])
def test_a_conversation_goes_on_as_the_published_template_does(answer: bool, backbone: Backbone) -> None:
    texts = ["What is it?", "A dog.", "Why?", "No idea.", "Really?"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    source = json.loads((FOLDER / "tokenizer_config.json").read_text())["chat_template"]
    published = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    expected = published.render(messages=messages, add_generation_prompt=answer)
    assert render(backbone, "video", messages, answer=answer) == f"<|endoftext|> {expected}"
    parts: list[Any] = [asked("What is it?"), messages[1], asked("Why?", "image"), *messages[3:]]
    picture = "<im_start>" + ("<im_patch>" * 3 + "<im_col>") * 3 + "<im_end>"
    found = render(backbone, "frames", parts, answer=answer, images=1, image_tokens=9)
    assert found == f"<|endoftext|>{picture} {expected}"


def test_prompt_facts(backbone: Backbone) -> None:
    prompt = backbone.prompt
    assert (prompt.system, prompt.end_token, prompt.image_token) == (None, "<|endoftext|>", "<im_patch>")
    assert {"<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>", "<|endoftext|>"} <= set(prompt.reserved)


@pytest.mark.parametrize("route", [FrameRoute((28, 28)), FrameRoute(route="video")])
def test_there_is_one_way_for_frames(route: FrameRoute, checkpoint: Checkpoint) -> None:
    with pytest.raises(OptionError, match="molmo"):
        MOLMO.backbone(checkpoint, route)


def test_vision_traces_with_a_free_number_of_frames(vision: nn.Module) -> None:
    frames = Dim("frames", min=1, max=64)
    example = (torch.randn(2, 3, 84, 84), torch.rand(2, 36))
    stage = Stage("vision", vision, example, ("pixel_values", "pixel_mask"), ("tokens",), ({0: frames}, {0: frames}))
    model = onnx_from_stage(stage)
    assert [node.op_type for node in model.graph].count("Attention") == 10
    session = ort.InferenceSession(onnx_ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for count in (1, 5):
        pixel_values, mask = torch.randn(count, 3, 84, 84), torch.randint(0, 3, (count, 36)) / 2
        with torch.no_grad():
            expected = vision(pixel_values, mask)
        feeds = {"pixel_values": pixel_values.numpy(), "pixel_mask": mask.numpy()}
        assert largest(expected, session.run(None, feeds)[0], f"onnx, {count} frames") < 3e-5 * expected.abs().max()
