"""Checkpoints in published layouts, whole, sharded or narrow, load as they are; damaged ones are refused by name."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from export import pickled
from export.checkpoint import Checkpoint, TensorFiles
from tests.checkpoints import WITH_LINVT, assert_equal_parts, copied, edit_json, parts_of, refusal, rewrite


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the LinVT-InternVL2 checkpoint, to be damaged."""
    return copied(WITH_LINVT, tmp_path / "checkpoint")


# --- config.json


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe{\x00}\x00", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refusal(folder)


def test_a_folder_without_config_is_no_checkpoint(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "expected a folder with config.json and *.safetensors" in refusal(folder)


# --- tensors


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
    head = parts_of(folder)["decoder"].get_parameter("lm_head.weight")
    table = load_file(folder / "model.safetensors")["language_model.model.embed_tokens.weight"]
    assert torch.equal(head, table.float())


@pytest.mark.parametrize("size", [0, 5, 100, 500_000])
def test_a_truncated_file_is_refused_by_name(folder: Path, size: int) -> None:
    os.truncate(folder / "model.safetensors", size)
    assert "model.safetensors is not a whole safetensors file" in refusal(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds no *.safetensors and no pytorch_model*.bin" in refusal(folder)


# --- pytorch_model files


def unsafed(folder: Path, shards: int = 1) -> list[Path]:
    """The weights as pytorch_model files, with an index when there are several."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return [folder / "pytorch_model.bin"]
    names = sorted(tensors)
    files = [folder / f"pytorch_model-{index + 1:05}-of-{shards:05}.bin" for index in range(shards)]
    for index, file in enumerate(files):
        torch.save({name: tensors[name] for name in names[index::shards]}, file)
    weight_map = {name: files[index % shards].name for index, name in enumerate(names)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


@pytest.mark.parametrize("shards", [1, 3])
def test_pytorch_model_files_are_the_same_model(folder: Path, shards: int) -> None:
    fingerprint = Checkpoint.open(folder).fingerprint()
    unsafed(folder, shards)
    assert_equal_parts(parts_of(folder), parts_of(WITH_LINVT))
    assert Checkpoint.open(folder).fingerprint() == fingerprint


def test_the_format_before_torch_1_6_is_read_too(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_equal_parts(parts_of(folder), parts_of(WITH_LINVT))


def test_what_was_read_of_a_pytorch_file_does_not_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickled, "REMAPPED", 2**22)
    path = tmp_path / "pytorch_model.bin"
    torch.save({str(index): torch.rand(2**18) for index in range(64)}, path)  # 64 MiB
    tensors = TensorFiles.scan([path])
    before = file_bytes_in_memory()
    sums = [float(tensors.tensor(name).sum()) for name in tensors.files]
    held = file_bytes_in_memory() - before
    print(f"{held / 2**20:.1f} MiB of 64 are held")
    assert min(sums) > 0 and held < 2**24


def file_bytes_in_memory() -> int:
    """Bytes of this process' memory that are pages of files."""
    return int(Path("/proc/self/status").read_text().split("RssFile:")[1].split()[0]) * 1024


def test_a_file_that_cannot_be_mapped_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "REMAPPED", 0)
    path = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), path, _use_new_zipfile_serialization=False)
    tensors = TensorFiles.scan([path])
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read again"))
    for name, expected in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensors.tensor(name), expected)


def test_safetensors_are_taken_where_both_are_there(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"something else")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    assert_equal_parts(parts_of(folder), parts_of(WITH_LINVT))


def test_a_missing_pytorch_shard_is_named(folder: Path) -> None:
    unsafed(folder, 2)[1].unlink()
    assert "shard pytorch_model-00002-of-00002.bin is missing" in refusal(folder)


class Harmful:
    """What a pickle can do: run a function when it is read."""

    def __reduce__(self) -> object:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("content", ["code", "list", "nested", "truncated", "text"])
def test_a_pytorch_model_file_that_is_not_tensors_alone_is_refused(
    folder: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (path,) = unsafed(folder)
    contents = {"code": {"a": Harmful()}, "list": [torch.zeros(2)], "nested": {"model": {"a": torch.zeros(2)}}}
    if content in contents:
        torch.save(contents[content], path)
    elif content == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    assert "pytorch_model.bin" in refusal(folder)
    assert not (folder / "harm").exists()


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
