"""Mipha in PyTorch is the original code's, number for number, and its Phi-2 is transformers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from export.checkpoint import Checkpoint
from export.families.base import FrameRoute
from export.families.mipha import MIPHA
from runtime.errors import CheckpointError, OptionError
from runtime.preprocess import pixel_values_from_frames
from tests.checkpoints import ABSENT, copied, edit_json, rewrite
from tests.conftest import GOLDEN, Recorded
from tests.llava import Loaded, greedy, largest, loaded, peer_of, video

Arrays = Recorded
NAME = "mipha-a"
TOWER, PROJECTOR = "vision_config.vision_tower", "vision_config.mm_projector"


@pytest.fixture(scope="module")
def model() -> Loaded:
    """The checkpoint."""
    return loaded(MIPHA, GOLDEN / NAME)


@pytest.fixture
def arrays(recorded: Callable[[str], Arrays]) -> Arrays:
    """What the original recorded."""
    return recorded(NAME)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be changed."""
    return copied(GOLDEN / NAME, tmp_path / "checkpoint")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        loaded(MIPHA, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- numbers


def test_frames_are_padded_and_normalised_as_recorded(model: Loaded, arrays: Arrays) -> None:
    found = pixel_values_from_frames(list(arrays["frames_u8"]), model.backbone.preprocess)
    difference = np.abs(found - arrays["pixel_values"])
    print(f"largest difference {difference.max():.1e}")
    assert difference.mean() <= 1 / 255 and difference.max() < 1e-5


def test_vision_reproduces_every_recorded_stage(model: Loaded, arrays: Arrays) -> None:
    pixel_values, tower, connector = torch.tensor(arrays["pixel_values"]), model.vision.tower, model.vision.connector
    with torch.no_grad():
        assert largest(tower.embeddings(pixel_values), arrays["vit_embeddings"]) < 1e-4
        features = tower(pixel_values)
        assert largest(features, arrays["vision_features"]) < 1e-4
        assert largest(connector[0](features), arrays["projector_hidden"]) < 1e-4
        assert largest(model.vision(pixel_values), arrays["visual_tokens"]) < 1e-4


def test_another_layer_can_be_selected(folder: Path, arrays: Arrays) -> None:
    pixel_values = torch.tensor(arrays["pixel_values"])
    for select, expected in ((-1, "vit_out_last"), (3, "vit_out_last"), (2, "vision_features")):
        edit_json(folder / "config.json", f"{TOWER}.mm_vision_select_layer", select)
        with torch.no_grad():
            assert largest(loaded(MIPHA, folder).vision.tower(pixel_values), arrays[expected]) < 1e-4


def test_the_llm_reproduces_every_recorded_stage(model: Loaded, arrays: Arrays) -> None:
    decoder, embeds = model.decoder, torch.tensor(arrays["inputs_embeds"])[None]
    rows = embeds.shape[1]
    positions, mask = torch.arange(rows)[None], torch.ones(rows, rows, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        assert largest(embeds, arrays["hidden_states"][0]) == 0
        first, _, _ = decoder.model.layers[0](embeds, decoder.angles(positions), mask, None)
        assert largest(first, arrays["hidden_states"][1]) < 1e-4
        last, _ = decoder.run(embeds, positions, mask)
        assert largest(decoder.model.norm(last), arrays["hidden_states"][2]) < 1e-4
        assert largest(decoder(embeds, positions), arrays["logits"]) < 1e-4


def test_every_decoded_step_is_as_recorded(model: Loaded, arrays: Arrays) -> None:
    with torch.no_grad():
        ids, steps = greedy(model.decoder, torch.tensor(arrays["inputs_embeds"])[None], model.table, 16)
    assert ids == arrays["greedy_ids"].tolist()
    assert largest(steps[0], arrays["logits"][-1]) < 1e-4
    assert largest(steps[1:], arrays["decode_logits"]) < 1e-4


@pytest.mark.parametrize("factor", [0.25, 0.4, 0.5, 1.0])
def test_transformers_own_class_is_the_same_llm(folder: Path, factor: float) -> None:
    edit_json(folder / "config.json", "partial_rotary_factor", factor)
    edit_json(folder / "config.json", "rope_theta", 500.0)
    rewrite(folder, lambda tensors: tensors.update({name: torch.randn_like(tensors[name]) for name in LM_HEAD}))
    model = loaded(MIPHA, folder)
    peer = peer_of(Checkpoint.open(folder), model.backbone)
    embeds, positions = torch.randn(1, 41, 64), torch.arange(41)[None]
    with torch.no_grad():
        expected = peer(inputs_embeds=embeds, position_ids=positions).logits
        assert largest(model.decoder(embeds, positions), expected) < 1e-4


LM_HEAD = ("lm_head.weight", "lm_head.bias")


def test_grouped_keys_and_a_tied_head_are_transformers_own_too(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".k_proj" in name or ".v_proj" in name]:
            if "vision_tower" not in name:
                tensors[name] = tensors[name][:32].clone()
        del tensors["lm_head.weight"]

    edit_json(folder / "config.json", "num_key_value_heads", 2)
    edit_json(folder / "config.json", "tie_word_embeddings", True)
    rewrite(folder, edit)
    model = loaded(MIPHA, folder)
    peer = peer_of(Checkpoint.open(folder), model.backbone)
    embeds, positions = torch.randn(1, 12, 64), torch.arange(12)[None]
    with torch.no_grad():
        expected = peer(inputs_embeds=embeds, position_ids=positions).logits
        assert largest(model.decoder(embeds, positions), expected) < 1e-4


# --- the prompt


def test_one_image_holds_all_frames_of_the_recorded_prompt(model: Loaded, arrays: Arrays) -> None:
    question = str(arrays["question"])
    assert model.text("frames", video(question), frames=1, tokens=1) == str(arrays["prompt_text"])
    ids = model.ids(model.text("frames", video(question), frames=3, tokens=16))
    assert np.array_equal(np.where(ids == model.token("<image>"), -200, ids), arrays["input_ids_expanded"])
    with torch.no_grad():
        tokens = model.vision(torch.tensor(arrays["pixel_values"])).flatten(0, 1)
    assert largest(model.embeds(ids, tokens), arrays["inputs_embeds"]) < 1e-4


def test_a_single_frame_answers_as_recorded(model: Loaded, arrays: Arrays) -> None:
    asked = [{"type": "image"}, {"type": "text", "text": str(arrays["question"])}]
    as_image = model.text("video", [{"role": "user", "content": asked}], images=1, image_tokens=16)
    assert as_image == model.text("frames", video(str(arrays["question"])), frames=1, tokens=16)
    with torch.no_grad():
        tokens = model.vision(torch.tensor(arrays["pixel_values"][:1]))[0]
        embeds = model.embeds(model.ids(as_image), tokens)
        logits = model.decoder(embeds, torch.arange(embeds.shape[1])[None])
    assert largest(logits[0, -8:], arrays["logits_single_frame_last8"]) < 1e-4


def test_linvt_s_rows_stand_in_the_place_of_the_frames_tokens(model: Loaded, arrays: Arrays) -> None:
    question = str(arrays["question"])
    rows = model.ids(model.text("video", video(question), frames=3, tokens=48))
    assert np.array_equal(rows, model.ids(model.text("frames", video(question), frames=3, tokens=16)))


def test_a_conversation_ends_turns_as_the_original_s(model: Loaded) -> None:
    asked = {"role": "user", "content": "Who?"}
    turns = [asked, {"role": "assistant", "content": "A cat."}, asked]
    facts = model.backbone.prompt
    expected = f"{facts.system} USER: Who? ASSISTANT: A cat.<|endoftext|>USER: Who? ASSISTANT:"
    assert model.text("video", turns) == expected
    assert model.text("frames", turns[:2], ask=False) == expected.removesuffix("USER: Who? ASSISTANT:")
    assert facts.extra_tokens == ("<image>",) and "<image>" in facts.reserved and facts.end_token == "<|endoftext|>"


# --- preprocessing


def test_without_a_preprocessor_file_the_published_numbers_hold(folder: Path) -> None:
    before = loaded(MIPHA, folder).backbone.preprocess
    (folder / "preprocessor_config.json").unlink()
    assert loaded(MIPHA, folder).backbone.preprocess == before


@pytest.mark.parametrize("aspect", ["square", ABSENT, None])
def test_another_aspect_stretches(folder: Path, aspect: object) -> None:
    edit_json(folder / "config.json", "image_aspect_ratio", aspect)
    assert loaded(MIPHA, folder).backbone.preprocess.fit == "stretch"


def test_the_preprocessor_file_says_size_filter_and_colours(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    edit_json(path, "size", {"height": 56, "width": 69})  # both hold the tower's four patches
    edit_json(path, "resample", 2)
    edit_json(path, "image_mean", [0.1, 0.5, 0.999])
    edit_json(path, "rescale_factor", 0.01)
    spec = loaded(MIPHA, folder).backbone.preprocess
    assert (spec.size, spec.resample, spec.fill, spec.rescale) == ((56, 69), "bilinear", (25, 127, 254), 0.01)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size.height", 70),
        ("size", 62),
        ("size", {"shortest_edge": 62}),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", [0.5, 0.5, 2]),
        ("image_std", [0.5, 0.5, 0]),
        ("image_std", "half"),
        ("resample", 1),
        ("rescale_factor", 0),
        ("do_resize", False),
        ("do_rescale", False),
        ("do_normalize", False),
    ],
)
def test_a_preprocessor_file_that_does_not_fit_is_refused_by_name(folder: Path, field: str, value: object) -> None:
    edit_json(folder / "preprocessor_config.json", field, value)
    message = refusal(folder)
    assert "preprocessor_config.json" in message and field.split(".")[0].removeprefix("image_") in message


# --- refusals


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("model_type", "mipha_gemma", "model_type"),
        ("architectures", ["MiphaPhi15ForCausalLM"], "MiphaPhi15ForCausalLM"),
        ("architectures", ABSENT, "architectures"),
        (f"{TOWER}.vision_model_name_or_path", "openai/clip-vit-large-patch14", "vision_model_name_or_path"),
        (f"{TOWER}.vision_model_name_or_path", "clip-or-siglip", "vision_model_name_or_path"),
        (f"{TOWER}.vision_model_name_or_path", ABSENT, "vision_model_name_or_path"),
        (f"{TOWER}.mm_vision_select_layer", 0, "mm_vision_select_layer is 0"),
        (f"{TOWER}.mm_vision_select_layer", -4, "expected -3 to -1 or 1 to 3"),
        (f"{TOWER}.mm_vision_select_layer", 4, "mm_vision_select_layer"),
        (f"{TOWER}.mm_vision_select_feature", "cls", "mm_vision_select_feature"),
        (f"{TOWER}.hidden_size", ABSENT, "hidden_size"),
        (f"{TOWER}.hidden_act", ABSENT, "hidden_act"),
        (f"{TOWER}.layer_norm_eps", ABSENT, "layer_norm_eps"),
        (f"{TOWER}.image_size", 76, "size.height"),
        (f"{TOWER}.intermediate_size", 90, "mlp.fc1.weight"),
        (f"{PROJECTOR}.mm_projector_type", "linear", "mm_projector_type"),
        (f"{PROJECTOR}.mm_hidden_size", 64, "mm_hidden_size is 64, expected 32"),
        (f"{PROJECTOR}.hidden_size", 32, "mm_projector.hidden_size is 32, expected 64"),
        ("vision_config", ABSENT, "vision_config"),
        ("image_aspect_ratio", "anyres", "image_aspect_ratio"),
        ("mm_use_im_start_end", True, "mm_use_im_start_end"),
        ("hidden_act", "gelu", "hidden_act"),
        ("qk_layernorm", True, "qk_layernorm"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling"),
        ("rope_theta", ABSENT, "rope_theta"),
        ("partial_rotary_factor", ABSENT, "partial_rotary_factor"),
        ("partial_rotary_factor", 0.45, "partial_rotary_factor is 0.45"),
        ("partial_rotary_factor", 2.0, "partial_rotary_factor"),
        ("num_key_value_heads", 3, "num_key_value_heads is 3"),
        ("num_key_value_heads", 2, "k_proj.weight"),
        ("layer_norm_eps", ABSENT, "layer_norm_eps"),
        ("vocab_size", 401, "lm_head.weight"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(folder: Path, field: str, value: object, named: str) -> None:
    edit_json(folder / "config.json", field, value)
    assert named in refusal(folder)


def test_as_many_key_heads_as_heads_where_the_field_is_absent(folder: Path) -> None:
    edit_json(folder / "config.json", "num_key_value_heads", None)
    assert loaded(MIPHA, folder).backbone.llm.config.heads_kv == 4


def test_parts_that_do_not_run_need_not_be_stored(folder: Path) -> None:
    unused = ("post_layernorm", "vision_model.head", "vision_model.encoder.layers.2")
    before = set(load_file(folder / "model.safetensors"))

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in before:
            if any(part in name for part in unused):
                del tensors[name]

    rewrite(folder, edit)
    assert len(load_file(folder / "model.safetensors")) < len(before)
    loaded(MIPHA, folder)


@pytest.mark.parametrize("route", [FrameRoute(route="video"), FrameRoute(image_size=(384, 384))])
def test_a_choice_it_has_not_is_refused(route: FrameRoute) -> None:
    with pytest.raises(OptionError, match="mipha"):
        loaded(MIPHA, GOLDEN / NAME, route)
