"""A bundle opens whole or not at all: every refusal is one line, and what was verified once is not hashed again."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import runtime.bundle
from runtime.bundle import MANIFEST, Bundle
from runtime.engine import VideoQA
from runtime.errors import BackendError, BundleError
from tests.bundles import forge, refusal, replaced


@pytest.fixture
def copied(linvt_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that may be damaged."""
    return forge(linvt_bundle, tmp_path / "bundle")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that get hashed."""
    names: list[str] = []

    def counting(file: Path) -> str:
        names.append(file.name)
        return hashlib.sha256(file.read_bytes()).hexdigest()

    monkeypatch.setattr(runtime.bundle, "sha256_of", counting)
    return names


def test_it_opens(linvt_bundle: Path) -> None:
    bundle = Bundle.open(linvt_bundle)
    assert bundle.manifest.family == "internvl2"
    assert bundle.identity == hashlib.sha256((linvt_bundle / MANIFEST).read_bytes()).hexdigest()


# What is no bundle


def test_other_folders_and_files_are_no_bundles(linvt_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "file", linvt_bundle / MANIFEST, tmp_path / "loop"):
        assert "is not a bundle: it has no bundle.json" in refusal(path)
    assert "is not a bundle: there is no such folder" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("path", ["", None, 7, b"bundle", "a\0b"])
def test_what_cannot_be_a_path(path: object) -> None:
    assert "expected the path of a bundle's folder" in refusal(path)


def test_a_path_too_long_for_the_file_system() -> None:
    assert "cannot read" in refusal("x" * 500)


def test_a_manifest_that_is_no_file(copied: Path) -> None:
    (copied / MANIFEST).unlink()
    (copied / MANIFEST).mkdir()
    assert "is no manifest" in refusal(copied)
    (copied / MANIFEST).rmdir()
    os.mkfifo(copied / MANIFEST)
    assert "is no manifest" in refusal(copied)


# Manifests


HEAD = '{"format": "linvt-bundle", "format_version": 2'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is not a LinVT manifest"),
        (b"hello", "is not a LinVT manifest"),
        (b"[]", "is not a LinVT manifest"),
        (b"\xff\xfe{\0}\0", "is not a LinVT manifest"),
        (b'{"format": "\xff", "format_version": 1}', "is not a LinVT manifest"),
        (b"[" * 10**6, "is not a LinVT manifest"),
        (f'{HEAD}, "provenance": {"[" * 10**5}'.encode(), "is not a LinVT manifest"),
        (b'{"format": "gguf", "format_version": 1}', "has format 'gguf', expected 'linvt-bundle'"),
        (f'{{"format": "{"x" * 10**5}", "format_version": 1}}'.encode(), "has format 'xxx"),
        (b'{"format": "linvt-bundle", "format_version": 1}', "format version 1, this release reads 2 to 3"),
        (b'{"format": "linvt-bundle", "format_version": "1"}', "Expected `int`, got `str`"),
        (f"{HEAD}}}".encode(), "missing required field `family`"),
        (f'{HEAD}, "family": "'.encode() + b'\xff"}', "bundle.json"),
        (f'{HEAD}, "{"x" * 10**5}": 1}}'.encode(), "unknown field"),
        (b" " * (16 * 2**20 + 1), "at most 16777216 bytes"),
    ],
    ids=range(15),
)
def test_a_manifest_that_cannot_be_read(copied: Path, text: bytes, said: str) -> None:
    (copied / MANIFEST).write_bytes(text)
    assert said in refusal(copied)


PATHS = ("../x", "/etc/passwd", "a\\b", "", ".", "..", "a/..", "a/../../b", "a/./b", "a//b", "a/", "C:/x", "a\0b", "é")
PATHS += ("*/_ORT_MEM_ADDR_/*", "a b", "a\nb", "x" * 300)


@pytest.mark.parametrize("path", PATHS)
def test_a_file_path_that_leaves_the_bundle(linvt_bundle: Path, tmp_path: Path, path: str) -> None:
    (tmp_path / "x").write_text("x")
    spec = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    bundle = forge(linvt_bundle, tmp_path / "bundle", edit=lambda manifest: manifest["files"].update({path: spec}))
    assert "leads outside the bundle or has odd characters" in refusal(bundle)


WRONG = [
    ("width", 64, "LinVT has width 48, the LLM 64"),
    ("width", -48, "must all be at least 1"),
    ("width", 48.0, "Expected `int`, got `float` - at `$.width`"),
    ("width", True, "Expected `int`, got `bool` - at `$.width`"),
    ("width", None, "at `$.width`"),
    ("surprise", 1, "unknown field `surprise`"),
    ("layers", 3, "past_key.2 is missing"),
    ("layers", 1, "4 cache inputs, expected a key and a value of 1 layers"),
    ("layers", 10**9, "past_key.2 is missing"),
    ("heads_kv", 3, "past_key.0 is [1, 2, 'capacity', 12], expected [1, 3, 'capacity', 12]"),
    ("head_dim", 10**9, "expected [1, 2, 'capacity', 1000000000]"),
    ("frames/tokens", 5, "tokens is [1, 'frames', 4, 48], expected [1, 'frames', 5, 48]"),
    ("frames/minimum", 1, "top_k 12 needs at least 3 frames, the minimum is 1"),
    ("frames/default", 10**9, "minimum <= default <= maximum"),
    ("frames/maximum", 10**9, "maximum <= 65536"),
    ("linvt/queries", 9, "tokens is [1, 8, 48], expected [1, 9, 48]"),
    ("linvt/pool_scales", [1, 2], "expected [1, 18, 48]"),
    ("linvt", None, "stages must be ['decode', 'vision']"),
    ("preprocess/size", [112, 56], "expected ['frames', 3, 112, 56]"),
    ("preprocess/std", [0, 1, 1], "std is"),
    ("preprocess/fill", [0, 256, 0], "fill is"),
    ("preprocess/fit", "letterbox", "bilinear"),
    ("frames/group", 0, "group >= 1"),
    ("frames/group", 2, "top_k 12 needs at least 5 frames, the minimum is 3"),
    ("positions", {"axes": 3}, "position_ids is [1, 'sequence'], expected [3, 1, 'sequence']"),
    ("positions", {"axes": 2}, "at `$.positions"),
    ("positions", {"axes": 3, "grid": [0, 2]}, "a grid of at least one row and column"),
    ("prompt/image_id", 5, "the files do not belong together"),
    ("prompt/rows", {"<img>": -1}, "rows must be 0 or more"),
    ("prompt/merge", "multiply", "Invalid enum value 'multiply'"),
    ("route", "sound", "Invalid enum value 'sound'"),
    ("generation/temperature", 0, "temperature is 0.0; expected a finite number above 0"),
    ("prompt/stop_ids", [], "there must be a stop id"),
    ("prompt/visual_id", 5, "the files do not belong together"),
    ("stages/vision/inputs", [], "pixel_values is missing"),
    ("stages/vision/file", "nowhere.onnx", "'nowhere.onnx' is not an .onnx file among the files"),
    ("stages/vision/file", "tokenizer.json", "'tokenizer.json' is not an .onnx file among the files"),
    ("stages/vision/compute", "int3", "Invalid enum value 'int3'"),
    ("stages/refine", {}, "missing required field `file` - at `$.stages[...]`"),
    ("files/vision.onnx", {"size": -1, "sha256": "0" * 64}, "a size of 0 or more"),
    ("files/vision.onnx", {"size": 1, "sha256": "zz"}, "64 lower-case hex digits"),
]


@pytest.mark.parametrize(("place", "value", "said"), WRONG, ids=range(len(WRONG)))
def test_a_manifest_that_contradicts_itself(
    linvt_bundle: Path, tmp_path: Path, place: str, value: object, said: str
) -> None:
    assert said in refusal(forge(linvt_bundle, tmp_path / "bundle", edit=replaced(place, value)))


def test_numbers_that_json_does_not_have(copied: Path) -> None:
    text = (copied / MANIFEST).read_text()
    (copied / MANIFEST).write_text(text.replace('"temperature": 1.0', '"temperature": NaN'))
    assert "is not a LinVT manifest" in refusal(copied)


def test_a_missing_stage(linvt_bundle: Path, tmp_path: Path) -> None:
    bundle = forge(linvt_bundle, tmp_path / "bundle", edit=lambda manifest: manifest["stages"].pop("refine"))
    assert "found ['aggregate', 'decode', 'vision']" in refusal(bundle)


# Damaged files


FILES = ["vision.onnx", "decode.onnx.data", "tokenizer.json", "embedding.safetensors", "chat_template.jinja"]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(copied: Path, name: str) -> None:
    Bundle.open(copied)
    data = bytearray((copied / name).read_bytes())
    before = (copied / name).stat()
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    os.utime(copied / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert f"{name} is altered" in refusal(copied)
    (copied / name).write_bytes(data[:-1])
    assert f"{name} has {len(data) - 1} bytes, expected {len(data)}" in refusal(copied)
    (copied / name).unlink()
    assert f"{name} is missing" in refusal(copied)
    (copied / name).mkdir()
    assert f"{name} is missing" in refusal(copied)


def test_a_link_to_another_place(copied: Path, tmp_path: Path) -> None:
    (copied / "vision.onnx").rename(tmp_path / "elsewhere")
    (copied / "vision.onnx").symlink_to(tmp_path / "elsewhere")
    assert "vision.onnx leads outside the bundle" in refusal(copied)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "embedding.safetensors"])
def test_a_file_the_manifest_forgot(linvt_bundle: Path, tmp_path: Path, name: str) -> None:
    bundle = forge(linvt_bundle, tmp_path / "bundle", edit=lambda manifest: manifest["files"].pop(name))
    assert f"bundle.json lists no {name}" in refusal(bundle)


# Files with the right hash that are wrong all the same


def test_graphs_that_are_none(linvt_bundle: Path, tmp_path: Path) -> None:
    assert "vision.onnx is not an ONNX graph" in refusal(
        forge(linvt_bundle, tmp_path / "garbage", vision__onnx=b"\x08garbage" * 100)
    )
    assert "failed to load vision.onnx" in refusal(
        forge(linvt_bundle, tmp_path / "empty", vision__onnx=b""), BackendError
    )
    short = forge(linvt_bundle, tmp_path / "short", decode__onnx__data=b"x" * 100)
    assert "failed to load decode.onnx" in refusal(short, BackendError)


def test_a_graph_that_is_another_than_the_manifest_says(linvt_bundle: Path, plain_bundle: Path, tmp_path: Path) -> None:
    refine = forge(linvt_bundle, tmp_path / "stage", edit=replaced("stages/vision/file", "refine.onnx"))
    assert "refine.onnx: its tensor 'pixel_values' is not as bundle.json says" in refusal(refine, BackendError)
    other = {name: (plain_bundle / name).read_bytes() for name in ("vision.onnx", "vision.onnx.data")}
    wider = forge(linvt_bundle, tmp_path / "width", **{name.replace(".", "__"): data for name, data in other.items()})
    assert "vision.onnx: its tensor 'tokens' is not as bundle.json says" in refusal(wider, BackendError)


@pytest.mark.parametrize("shape", [(420, 64), (20, 48)])
def test_an_embedding_table_of_another_model(linvt_bundle: Path, tmp_path: Path, shape: tuple[int, int]) -> None:
    from safetensors.numpy import save

    table = save({"embedding": np.ones(shape, np.float32)})
    message = refusal(forge(linvt_bundle, tmp_path / "bundle", embedding__safetensors=table))
    assert f"embedding.safetensors is ({shape[0]}, {shape[1]}), bundle.json says (420, 48)" in message


def test_text_files_that_are_none(linvt_bundle: Path, tmp_path: Path) -> None:
    assert "not a readable tokenizer" in refusal(forge(linvt_bundle, tmp_path / "a", tokenizer__json=b"{}"))
    assert "not a readable tokenizer" in refusal(forge(linvt_bundle, tmp_path / "b", tokenizer__json=b"\xff"))
    assert "not readable as text" in refusal(forge(linvt_bundle, tmp_path / "c", chat_template__jinja=b"\xff"))
    assert "prompt template is not usable" in refusal(
        forge(linvt_bundle, tmp_path / "d", chat_template__jinja=b"{% if")
    )


# A bundle that changes while it is open


def test_a_bundle_that_is_replaced_while_it_is_open(copied: Path, plain_bundle: Path) -> None:
    with VideoQA.open(copied) as qa:
        qa.backend.graph("vision")
        shutil.rmtree(copied)
        with pytest.raises(BundleError, match="cannot read"):
            qa.backend.graph("refine")
        shutil.copytree(plain_bundle, copied)
        with pytest.raises(BundleError, match="was replaced after it was opened; open it again"):
            qa.backend.graph("refine")


# What was verified once


def test_a_second_opening_hashes_nothing(copied: Path, hashed: list[str]) -> None:
    first = Bundle.open(copied)
    assert sorted(hashed) == sorted(first.manifest.files)
    hashed.clear()
    Bundle.open(copied)
    assert hashed == []
    (copied / "tokenizer.json").write_bytes((copied / "tokenizer.json").read_bytes())
    Bundle.open(copied)
    assert hashed == ["tokenizer.json"]
    hashed.clear()
    Bundle.open(copied, verify=True)
    assert sorted(hashed) == sorted(first.manifest.files)


def test_a_bundle_that_was_not_good_is_not_remembered(copied: Path, hashed: list[str]) -> None:
    (copied / "vision.onnx.data").write_bytes(bytes((copied / "vision.onnx.data").stat().st_size))
    for _ in range(2):
        assert "vision.onnx.data is altered" in refusal(copied)
        assert "vision.onnx.data" in hashed
        hashed.clear()


def test_a_new_manifest_makes_old_hashes_worthless(copied: Path) -> None:
    Bundle.open(copied)
    manifest = json.loads((copied / MANIFEST).read_bytes())
    manifest["files"]["vision.onnx"]["sha256"] = "0" * 64
    (copied / MANIFEST).write_text(json.dumps(manifest))
    assert "vision.onnx is altered" in refusal(copied)


@pytest.mark.parametrize("cache", ["/proc/nowhere", "/dev/null", "relative"])
def test_a_cache_that_cannot_be_used(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[str], cache: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    Bundle.open(copied)
    hashed.clear()
    Bundle.open(copied)
    assert bool(hashed) == (cache != "relative")  # a relative one is no cache: the home's is taken
    assert not (tmp_path / "relative").exists()


def test_no_home_at_all(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert Bundle.open(copied).folder == copied


@pytest.mark.parametrize("content", [b"", b"[]", b'{"vision.onnx": 1}', b'{"\xff": [1, 2, 3]}', b"[" * 10**5])
def test_a_damaged_memory_is_no_memory(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[str], content: bytes
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Bundle.open(copied)
    (memory,) = (tmp_path / "cache" / "linvt-edge").iterdir()
    memory.write_bytes(content)
    hashed.clear()
    Bundle.open(copied)
    assert "vision.onnx" in hashed
