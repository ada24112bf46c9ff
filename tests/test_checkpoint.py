"""Checkpoints in published layouts are read as they are, and what does not fit is refused in one line that names it."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn

from export.checkpoint import Checkpoint
from export.convert import ExportOptions, choose_linvt, frame_spec, load_decoder, load_linvt, write_text
from export.families import backbone_from_checkpoint
from export.linvt.layout import LinVTWeights
from export.load import load_module
from export.tokenizer import generation_defaults, stop_ids, tokenizer_from_checkpoint
from runtime.errors import CheckpointError, LinvtError, OptionError

GOLDEN = Path(__file__).parent / "golden"
WITH_LINVT, PLAIN = GOLDEN / "linvt-internvl2-a", GOLDEN / "internvl2-qwen2-a"
ABSENT = object()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the LinVT-InternVL2 checkpoint, to be damaged."""
    return copied(WITH_LINVT, tmp_path / "checkpoint")


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, ignore=shutil.ignore_patterns("expected.npz", "NOTES.md")))


def edit_json(path: Path, key: str, value: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    *parents, last = key.split(".")
    place = content
    for parent in parents:
        place = place[parent]
    if value is ABSENT:
        place.pop(last, None)
    else:
        place[last] = value
    path.write_text(json.dumps(content))


def parts_of(source: Path, linvt: str | None = None) -> dict[str, nn.Module]:
    """All modules, loaded as the export loads them, and everything else it reads of a checkpoint."""
    checkpoint = Checkpoint.open(source)
    backbone = backbone_from_checkpoint(checkpoint)
    weights = choose_linvt(linvt, checkpoint, backbone)
    frame_spec(backbone, weights, None)
    tokenizer = tokenizer_from_checkpoint(checkpoint, backbone.prompt)
    stop_ids(checkpoint, tokenizer, backbone.prompt.end_token)
    generation_defaults(checkpoint)
    checkpoint.fingerprint()
    parts: dict[str, nn.Module] = {
        "vision": load_module(backbone.vision, checkpoint.tensors, backbone.vision_names),
        "decoder": load_decoder(checkpoint, backbone),
    }
    return parts | ({"linvt": load_linvt(weights)} if weights else {})


def refusal(source: Path, linvt: str | None = None) -> str:
    with pytest.raises(LinvtError) as caught:
        parts_of(source, linvt)
    assert isinstance(caught.value, CheckpointError)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def assert_equal_parts(first: dict[str, nn.Module], second: dict[str, nn.Module]) -> None:
    assert first.keys() == second.keys()
    for name, part in first.items():
        state, other = part.state_dict(), second[name].state_dict()
        assert state.keys() == other.keys()
        assert all(torch.equal(state[key], other[key]) for key in state), name


# --- config.json


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe{\x00}\x00", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refusal(folder)


def test_a_folder_without_config_is_no_checkpoint(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "expected a folder with config.json and *.safetensors" in refusal(folder)


@pytest.mark.parametrize("kind", ["llava", None, 5, {"a": 1}, ABSENT])
def test_an_unknown_family_is_refused_with_the_known_ones(folder: Path, kind: object) -> None:
    edit_json(folder / "config.json", "model_type", kind)
    message = refusal(folder)
    assert "model_type" in message and "known: internvl2" in message


@pytest.mark.parametrize(
    "field",
    [
        "vision_config.hidden_size",
        "vision_config.num_attention_heads",
        "vision_config.num_hidden_layers",
        "vision_config.intermediate_size",
        "vision_config.patch_size",
        "vision_config.image_size",
        "vision_config.layer_norm_eps",
        "llm_config.hidden_size",
        "llm_config.num_attention_heads",
        "llm_config.num_key_value_heads",
        "llm_config.num_hidden_layers",
        "llm_config.intermediate_size",
        "llm_config.vocab_size",
        "llm_config.max_position_embeddings",
        "llm_config.rope_theta",
        "llm_config.rms_norm_eps",
        "llm_config.architectures",
    ],
)
@pytest.mark.parametrize("value", [ABSENT, None, "8", [8], {}, 0, -1, True, 10**30, math.nan, math.inf])
def test_a_size_that_is_missing_or_none_is_refused_by_name(folder: Path, field: str, value: object) -> None:
    edit_json(folder / "config.json", field, value)
    assert field in refusal(folder)


@pytest.mark.parametrize("field", ["llm_config", "vision_config"])
@pytest.mark.parametrize("value", [ABSENT, None, "x", [], [1], 3, False])
def test_a_nested_config_that_is_no_object_is_refused_by_name(folder: Path, field: str, value: object) -> None:
    edit_json(folder / "config.json", field, value)
    assert field in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("downsample_ratio", 0, "downsample_ratio"),
        ("downsample_ratio", -0.5, "downsample_ratio"),
        ("downsample_ratio", 3, "downsample_ratio"),
        ("downsample_ratio", 1e-12, "downsample_ratio"),
        ("downsample_ratio", math.nan, "downsample_ratio"),
        ("downsample_ratio", 1 / 3, "divides the 4 patches"),
        ("downsample_ratio", "half", "downsample_ratio"),
        ("ps_version", "v3", "supported: 'v1', 'v2'"),
        ("ps_version", 2, "ps_version"),
        ("select_layer", 0, "expected -2 to -1"),
        ("select_layer", -3, "expected -2 to -1"),
        ("select_layer", "last", "select_layer"),
        ("force_image_size", 448, "force_image_size 448 differs"),
        ("force_image_size", "56", "force_image_size"),
        ("template", "phi3-chat", "supported: 'Hermes-2'"),
        ("template", ["Hermes-2"], "template"),
        ("vision_config.num_attention_heads", 5, "multiple of vision_config.num_attention_heads, which is 5"),
        ("vision_config.patch_size", 15, "multiple of vision_config.patch_size, which is 15"),
        ("vision_config.image_size", 5600, "expected 1 to 4096"),
        ("vision_config.num_hidden_layers", 10**6, "expected 1 to 1024"),
        ("vision_config.hidden_act", "relu", "supported: 'gelu'"),
        ("vision_config.num_channels", 1, "supported: 3"),
        ("llm_config.num_attention_heads", 5, "multiple of llm_config.num_key_value_heads, which is 2"),
        ("llm_config.num_attention_heads", 10, "multiple of llm_config.num_attention_heads, which is 10"),
        ("llm_config.head_dim", 11, "heads of 11 channels, expected an even number"),
        ("llm_config.head_dim", "12", "llm_config.head_dim"),
        ("llm_config.max_position_embeddings", 16, "expected 64 to"),
        ("llm_config.hidden_act", "gelu", "supported: 'silu'"),
        ("llm_config.use_sliding_window", True, "supported: False"),
        ("llm_config.rope_scaling", {"type": "dynamic", "factor": 2.0}, "rope_scaling"),
        ("llm_config.architectures", ["InternLM2ForCausalLM"], "InternLM2ForCausalLM"),
        ("llm_config.architectures", "Qwen2ForCausalLM", "supported: ['Qwen2ForCausalLM']"),
        ("vision_config.norm_type", "rms_norm", "InternViT-6B"),
        ("vision_config.qk_normalization", True, "InternViT-6B"),
        ("linvt_top_k", 0, "LinVT sizes must all be at least 1"),
        ("linvt_top_k", 10**9, "at most 65536"),
        ("linvt_top_k", "12", "LinVT settings"),
        ("linvt_num_heads", 5, "does not divide into 5 heads"),
        ("linvt_num_layers", 10**6, "linvt_num_layers is 1000000, the LinVT weights hold 2"),
        ("num_video_query_token", 16, "num_video_query_token is 16, the LinVT weights hold 8"),
        ("linvt_axes", "sideways", "LinVT settings"),
        ("linvt_norm_eps", -1, "norm_eps"),
        ("linvt_positions", "absolute", "absolute positions need tokens_per_frame and max_frames"),
        ("linvt_max_frames", 2, "needs 3 frames for its top_k and has positions for 2"),
        ("use_multi_scale", "yes", "use_multi_scale"),
    ],
)
def test_a_choice_that_does_not_fit_is_refused_by_name(folder: Path, field: str, value: object, named: str) -> None:
    edit_json(folder / "config.json", field, value)
    assert named in refusal(folder)


@pytest.mark.parametrize("frames", [0, -1, 2, 513])
def test_frames_outside_what_the_model_takes_are_refused_with_the_range(frames: int) -> None:
    checkpoint = Checkpoint.open(WITH_LINVT)
    backbone = backbone_from_checkpoint(checkpoint)
    with pytest.raises(OptionError, match=r"--frames .* 3 to 512"):
        frame_spec(backbone, choose_linvt(None, checkpoint, backbone), frames)


# --- tensors


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "vision_model.encoder.layers.1.attn.qkv.bias",
        "mlp1.3.weight",
        "language_model.model.layers.0.self_attn.k_proj.bias",
        "language_model.lm_head.weight",
        "linVT.tta_module.layers_vt.1.norm_cross_t.bias",
        "linVT.svt_module.token_selection.score_net.weight",
    ],
)
def test_a_missing_or_odd_shaped_tensor_is_named(folder: Path, name: str) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(3, 5, 7)}))
    message = refusal(folder)
    assert name in message and "[3, 5, 7]" in message and "expected [" in message
    rewrite(folder, lambda tensors: tensors.pop(name))
    message = refusal(folder)
    assert name in message and "missing" in message


def test_the_tensors_that_no_formula_reads_may_be_missing(folder: Path) -> None:
    dead = [f"linVT.tta_module.layer_linagg.linear_aggregator.{name}.weight" for name in ("wv", "dense")]
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in dead])
    assert torch.count_nonzero(parts_of(folder)["linvt"].get_parameter(dead[0])) == 0


def test_quantised_weights_are_refused_by_name(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"mlp1.1.weight": tensors["mlp1.1.weight"].to(torch.int8)}))
    message = refusal(folder)
    assert "mlp1.1.weight" in message and "I8" in message


def test_a_tied_output_head_need_not_be_stored(folder: Path) -> None:
    edit_json(folder / "config.json", "llm_config.tie_word_embeddings", True)
    rewrite(folder, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    decoder = parts_of(folder)["decoder"]
    assert decoder.get_parameter("lm_head.weight") is decoder.get_parameter("model.embed_tokens.weight")


@pytest.mark.parametrize("size", [0, 5, 100, 500_000])
def test_a_truncated_file_is_refused_by_name(folder: Path, size: int) -> None:
    os.truncate(folder / "model.safetensors", size)
    assert "model.safetensors is not a whole safetensors file" in refusal(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds no *.safetensors" in refusal(folder)


# --- shards


def split(folder: Path) -> dict[str, Any]:
    """Two shards and an index in place of the one file; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_a_sharded_checkpoint_is_the_same_model(folder: Path) -> None:
    fingerprint = Checkpoint.open(folder).fingerprint()
    split(folder)
    assert_equal_parts(parts_of(folder), parts_of(WITH_LINVT))
    assert Checkpoint.open(folder).fingerprint() == fingerprint


def test_files_outside_the_index_are_not_read(folder: Path) -> None:
    split(folder)
    (folder / "consolidated.safetensors").write_bytes(b"something else")
    assert_equal_parts(parts_of(folder), parts_of(WITH_LINVT))


def test_a_missing_shard_is_named(folder: Path) -> None:
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "shard model-00002-of-00002.safetensors is missing" in refusal(folder)


@pytest.mark.parametrize("shard", ["../x", "/etc/passwd", "..", ".", "", "sub/model.safetensors"])
def test_an_index_that_leads_elsewhere_is_refused(folder: Path, shard: str) -> None:
    index = split(folder)
    index["weight_map"]["mlp1.1.weight"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "expected files beside it" in refusal(folder)


@pytest.mark.parametrize("index", [{}, [], {"weight_map": []}, {"weight_map": {"a": None}}, {"weight_map": {}}])
def test_an_index_without_files_is_refused(folder: Path, index: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refusal(folder)


def test_a_tensor_in_two_files_is_refused_with_both(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "again.safetensors")
    message = refusal(folder)
    assert "again.safetensors" in message and "model.safetensors" in message


# --- tokenizer and generation settings


def published_vocabulary(folder: Path) -> None:
    """vocab.json and merges.txt in place of tokenizer.json, as InternVL2-1B is published."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer.json").unlink()


def written_tokenizer(folder: Path, out: Path) -> Tokenizer:
    checkpoint = Checkpoint.open(folder)
    out.mkdir(exist_ok=True)
    write_text(out, checkpoint, backbone_from_checkpoint(checkpoint), None, ExportOptions(str(folder), out))
    return Tokenizer.from_file(str(out / "tokenizer.json"))


def test_vocabulary_and_merges_become_the_same_tokenizer(folder: Path, tmp_path: Path) -> None:
    published_vocabulary(folder)
    converted, original = (
        written_tokenizer(folder, tmp_path / "out"),
        Tokenizer.from_file(str(WITH_LINVT / "tokenizer.json")),
    )
    for text in (
        "<|im_start|>user\nFrame1: <img><IMG_CONTEXT></img>\nWhat's 12345?  Don't\tsay.\r\n<|im_end|>",
        "你好，世界 🎉 e\u0301 naïve",
    ):
        ids = original.encode(text, add_special_tokens=False).ids
        assert converted.encode(text, add_special_tokens=False).ids == ids
        assert converted.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("absent", ["vocab.json", "merges.txt"])
def test_half_a_vocabulary_is_refused_by_name(folder: Path, absent: str) -> None:
    published_vocabulary(folder)
    (folder / absent).unlink()
    assert f"neither tokenizer.json nor {absent}" in refusal(folder)


@pytest.mark.parametrize("kind", ["NoSuchTokenizer", "AutoModel", "AutoTokenizer", "pipeline", "", None, 5])
def test_a_tokenizer_class_of_somebody_else_is_refused(folder: Path, kind: object) -> None:
    published_vocabulary(folder)
    edit_json(folder / "tokenizer_config.json", "tokenizer_class", kind)
    assert "add a tokenizer.json" in refusal(folder)


def without_placeholder(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<IMG_CONTEXT>"]
    content["model"]["vocab"].pop("<IMG_CONTEXT>", None)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def test_tokens_that_only_the_tokenizer_config_adds_are_known(folder: Path, tmp_path: Path) -> None:
    without_placeholder(folder)
    assert written_tokenizer(folder, tmp_path / "out").token_to_id("<IMG_CONTEXT>") == 413


def test_a_tokenizer_without_the_placeholder_is_refused(folder: Path) -> None:
    without_placeholder(folder)
    for name in ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        (folder / name).unlink()
    assert "no token '<IMG_CONTEXT>'" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": 3}'])
def test_a_broken_tokenizer_is_refused_by_name(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    assert "tokenizer.json is broken" in refusal(folder)


def test_a_tokenizer_that_is_a_folder_is_refused_by_name(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    assert "tokenizer.json is broken" in refusal(folder)


@pytest.mark.parametrize(
    ("settings", "ids"),
    [(ABSENT, (410,)), ({}, (410,)), (None, (410,)), (5, (5, 410)), ([7, 410, 5], (5, 7, 410)), ([], (410,))],
)
def test_answers_end_at_the_listed_tokens_and_the_template_s(folder: Path, settings: object, ids: object) -> None:
    if settings is ABSENT:
        (folder / "generation_config.json").unlink()
    elif settings != {}:
        edit_json(folder / "generation_config.json", "eos_token_id", settings)
    checkpoint = Checkpoint.open(folder)
    tokenizer = tokenizer_from_checkpoint(checkpoint, backbone_from_checkpoint(checkpoint).prompt)
    assert stop_ids(checkpoint, tokenizer, "<|im_end|>") == ids


@pytest.mark.parametrize("value", ["abc", True, -1, 1.5, [[1]], {"a": 1}, ["5"]])
def test_odd_stop_tokens_are_refused_by_name(folder: Path, value: object) -> None:
    edit_json(folder / "generation_config.json", "eos_token_id", value)
    assert "eos_token_id" in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 0), ("temperature", "hot"), ("top_p", [1]), ("top_k", -1), ("max_new_tokens", 1e99)],
)
def test_odd_generation_settings_are_refused_by_name(folder: Path, field: str, value: object) -> None:
    edit_json(folder / "generation_config.json", field, value)
    assert f"generation_config.json does not fit: {field}" in refusal(folder)


def test_generation_settings_that_are_null_or_unknown_leave_the_defaults(folder: Path) -> None:
    settings = {"temperature": None, "top_k": 5, "do_sample": True, "max_length": 20}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    defaults = generation_defaults(Checkpoint.open(folder))
    assert (defaults.temperature, defaults.top_k, defaults.do_sample) == (1.0, 5, True)


# --- LinVT weights of their own


def cut_linvt(folder: Path, target: Path, metadata: dict[str, str] | None = None) -> Path:
    """Move the LinVT tensors, and what config.json says about them, out of the checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    linvt = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("linVT.", "query_tokens"))}
    save_file(tensors, folder / "model.safetensors")
    target.parent.mkdir(exist_ok=True)
    save_file(linvt, target, metadata=metadata)
    return target


LINVT_KEYS = ("linvt_num_heads", "linvt_num_layers", "linvt_top_k", "num_video_query_token")


def take_linvt_keys(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    taken = {key: config.pop(key) for key in LINVT_KEYS}
    (folder / "config.json").write_text(json.dumps(config))
    return taken


def test_weights_in_their_own_file_take_their_settings_from_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    weights = cut_linvt(folder, tmp_path / "linvt" / "linvt.safetensors")
    assert_equal_parts(parts_of(folder, str(weights)), parts_of(WITH_LINVT))
    assert_equal_parts(parts_of(folder, str(weights.parent)), parts_of(WITH_LINVT))


def test_weights_in_their_own_file_bring_their_settings_in_metadata(folder: Path, tmp_path: Path) -> None:
    keys = {key: json.dumps(value) for key, value in take_linvt_keys(folder).items()}
    weights = cut_linvt(folder, tmp_path / "linvt.safetensors", {"format": "pt", **keys})
    assert_equal_parts(parts_of(folder, str(weights)), parts_of(WITH_LINVT))


def test_weights_in_their_own_file_bring_their_settings_in_a_config_beside_them(folder: Path, tmp_path: Path) -> None:
    keys = take_linvt_keys(folder)
    weights = cut_linvt(folder, tmp_path / "linvt" / "linvt.safetensors")
    (weights.parent / "config.json").write_text(json.dumps(keys))
    assert_equal_parts(parts_of(folder, str(weights)), parts_of(WITH_LINVT))


def settings_of(folder: Path, linvt: Path | None) -> LinVTWeights:
    checkpoint = Checkpoint.open(folder)
    weights = choose_linvt(str(linvt) if linvt else None, checkpoint, backbone_from_checkpoint(checkpoint))
    assert weights
    return weights


def test_metadata_goes_before_a_config_beside_the_weights_and_that_before_the_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    weights = cut_linvt(folder, tmp_path / "linvt" / "linvt.safetensors", {"linvt_top_k": "5"})
    (weights.parent / "config.json").write_text(json.dumps({"linvt_top_k": 6, "linvt_norm_eps": 1e-6}))
    config = settings_of(folder, weights).config
    assert (config.top_k, config.norm_eps, config.heads) == (5, 1e-6, 4)


def test_a_checkpoint_does_not_say_how_many_queries_another_file_holds(folder: Path, tmp_path: Path) -> None:
    weights = cut_linvt(folder, tmp_path / "linvt.safetensors")
    edit_json(folder / "config.json", "num_video_query_token", 32)
    edit_json(folder / "config.json", "linvt_num_layers", 8)
    config = settings_of(folder, weights).config
    assert (config.queries, config.layers) == (8, 2)


def test_without_settings_the_released_code_s_sizes_hold(folder: Path, tmp_path: Path) -> None:
    take_linvt_keys(folder)
    config = settings_of(folder, cut_linvt(folder, tmp_path / "linvt.safetensors")).config
    assert (config.heads, config.top_k, config.layers, config.queries) == (4, 1024, 2, 8)


def test_a_checkpoint_without_linvt_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    cut_linvt(folder, tmp_path / "linvt.safetensors")
    message = refusal(folder)
    assert "--linvt WEIGHTS" in message and "--linvt none" in message
    assert "linvt" not in parts_of(folder, "none")


def test_linvt_of_another_width_is_refused() -> None:
    message = refusal(PLAIN, str(WITH_LINVT / "model.safetensors"))
    assert "query_tokens has shape [1, 8, 48], expected [1, queries, 64]" in message


def test_linvt_weights_that_are_none_are_refused(folder: Path, tmp_path: Path) -> None:
    empty, text = tmp_path / "empty", tmp_path / "text.safetensors"
    empty.mkdir()
    text.write_text("these are not the weights")
    assert "expected a safetensors file" in refusal(folder, str(empty))
    assert "expected a safetensors file" in refusal(folder, str(tmp_path / "absent"))
    assert "text.safetensors is not a whole safetensors file" in refusal(folder, str(text))
    assert "tensor query_tokens is missing" in refusal(folder, str(PLAIN / "model.safetensors"))


# --- hub ids


def hub_refusal(identifier: str, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> str:
    def fail(*arguments: object, **options: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    return refusal(Path(identifier))


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    transport = next(kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception))
    for error in (
        transport("read timed out"),
        LocalEntryNotFoundError("no network"),
        HFValidationError("bad id"),
        ConnectionError("reset"),
    ):
        assert "neither a folder nor a checkpoint that could be downloaded" in hub_refusal("a/b", monkeypatch, error)


def test_what_cannot_be_a_hub_id_is_not_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = AssertionError("the hub was asked")
    for source in ("no-such-folder", "a/b/c", str(tmp_path / "absent"), str(tmp_path), "x" * 300):
        assert "is not a checkpoint" in hub_refusal(source, monkeypatch, asked)


def test_offline_a_hub_id_ends_at_once(tmp_path: Path) -> None:
    code = "from export.checkpoint import Checkpoint; Checkpoint.open('nobody/no-such-model')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr.splitlines()[-1].startswith("runtime.errors.CheckpointError: nobody/no-such-model is neither")


# --- narrow weights


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_narrow_weights_load_as_the_float32_they_mean(folder: Path, dtype: torch.dtype, name: str) -> None:
    narrow = {key: tensor.to(dtype) for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(narrow, folder / "model.safetensors")
    with safe_open(folder / "model.safetensors", "pt") as reader:
        assert reader.get_slice("mlp1.1.weight").get_dtype() == name
    state = copy.copy(parts_of(folder)["vision"].state_dict())
    for ours, theirs in (("connector.mlp1.1.weight", "mlp1.1.weight"),):
        assert state[ours].dtype == torch.float32
        assert torch.equal(state[ours], narrow[theirs].float())
