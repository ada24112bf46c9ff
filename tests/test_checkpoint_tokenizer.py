"""A checkpoint's tokenizer, stop tokens and generation settings reach the bundle; broken ones are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from export.checkpoint import Checkpoint
from export.convert import ExportOptions, write_text
from export.families import backbone_from_checkpoint
from export.tokenizer import generation_defaults, stop_ids, tokenizer_from_checkpoint
from tests.checkpoints import ABSENT, WITH_LINVT, copied, edit_json, refusal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the LinVT-InternVL2 checkpoint, to be damaged."""
    return copied(WITH_LINVT, tmp_path / "checkpoint")


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
