"""Embedding rows come out of the file as safetensors wrote them; damaged or hostile files are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.embedding import EmbeddingTable
from runtime.errors import BundleError


def random_table(seed: int, rows: int = 37, width: int = 12) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, width)) * 10).astype(np.float32)


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file by hand: ``header`` as JSON or as the bytes given."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(encoded) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + encoded + data)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"embedding": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}}


# --- sound files


def test_rows_in_8_bits_are_multiplied_by_their_scales(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.numpy").save_file
    random = np.random.default_rng(3)
    stored = random.integers(-127, 128, (37, 13), dtype=np.int8)
    scale = random.uniform(0.01, 0.1, 37).astype(np.float32)
    save_file({"embedding": stored, "scale": scale}, tmp_path / "embedding.safetensors")
    table = EmbeddingTable.open(tmp_path / "embedding.safetensors")
    ids = random.integers(0, 37, 100)
    assert table.dtype == "I8"
    assert np.array_equal(table.rows(ids), stored[ids].astype(np.float32) * scale[ids][:, None])


@pytest.mark.parametrize(
    "header",
    [
        entry(dtype="I8", data_offsets=[0, 6]),
        entry() | {"scale": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]}},
        entry(dtype="I8", data_offsets=[0, 6]) | {"scale": {"dtype": "F32", "shape": [3], "data_offsets": [6, 18]}},
        entry(dtype="I8", data_offsets=[0, 6]) | {"scale": {"dtype": "F32", "shape": [2], "data_offsets": [2, 10]}},
    ],
)
def test_scales_that_do_not_belong_to_the_table_are_refused(header: dict[str, Any], tmp_path: Path) -> None:
    size = max(tensor["data_offsets"][1] for tensor in header.values())
    with pytest.raises(BundleError, match="not an embedding table"):
        EmbeddingTable.open(raw_file(tmp_path / "e.safetensors", header, bytes(size)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_equal_what_safetensors_saved(dtype: type, tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.numpy").save_file
    stored = random_table(seed=1).astype(dtype)
    save_file({"embedding": stored}, tmp_path / "embedding.safetensors")
    table = EmbeddingTable.open(tmp_path / "embedding.safetensors")
    assert (table.vocabulary, table.width) == (37, 12)
    ids = np.random.default_rng(2).integers(0, 37, 100)
    rows = table.rows(ids)
    assert rows.dtype == np.float32
    assert rows.shape == (100, 12)
    np.testing.assert_array_equal(rows, stored[ids].astype(np.float32))


def test_bfloat16_rows_equal_torchs_conversion(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    stored = torch.from_numpy(random_table(seed=3)).to(torch.bfloat16)
    stored[0, :4] = torch.tensor([0.0, -0.0, 3.3e38, 1e-40])
    save_file({"embedding": stored}, tmp_path / "embedding.safetensors")
    table = EmbeddingTable.open(tmp_path / "embedding.safetensors")
    assert table.dtype == "BF16"
    rows = table.rows(np.arange(37))
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows.view(np.uint32), stored.float().numpy().view(np.uint32))


def test_metadata_and_an_unaligned_header_do_no_harm(tmp_path: Path) -> None:
    stored = random_table(seed=4, rows=2, width=3)
    for padding in range(8):
        header = {"__metadata__": {"format": "pt", "pad": "x" * padding}, **entry()}
        table = EmbeddingTable.open(raw_file(tmp_path / "e.safetensors", header, stored.tobytes()))
        np.testing.assert_array_equal(table.rows(np.array([1, 0])), stored[::-1])


def test_rows_are_the_callers_own_and_the_table_cannot_be_changed(tmp_path: Path) -> None:
    stored = random_table(seed=5, rows=2, width=3)
    table = EmbeddingTable.open(raw_file(tmp_path / "e.safetensors", entry(), stored.tobytes()))
    ids = np.array([0, 0, 1])
    table.rows(ids)[:] = 7
    np.testing.assert_array_equal(table.rows(ids), stored[ids])
    assert table.rows(np.empty(0, np.int64)).shape == (0, 3)


def test_a_table_of_gigabytes_opens_at_once_and_gives_its_rows(tmp_path: Path) -> None:
    rows, width = 1 << 20, 4096  # 16 GiB, a file with one hole
    header = entry(shape=[rows, width], data_offsets=[0, rows * width * 4])
    path = raw_file(tmp_path / "e.safetensors", header)
    start = path.stat().st_size
    last = random_table(seed=6, rows=1, width=width)
    try:
        with path.open("r+b") as file:
            file.truncate(start + rows * width * 4)
            file.seek(-last.nbytes, 2)
            file.write(last.tobytes())
    except OSError:
        pytest.skip("this file system has no files of 16 GiB")
    table = EmbeddingTable.open(path)
    np.testing.assert_array_equal(table.rows(np.array([rows - 1, 0])), np.vstack([last, np.zeros_like(last)]))


@pytest.mark.parametrize("bad", [-1, 2, 2**40, -(2**40)])
def test_an_id_without_a_row_is_refused(bad: int, tmp_path: Path) -> None:
    table = EmbeddingTable.open(raw_file(tmp_path / "e.safetensors", entry(), bytes(24)))
    with pytest.raises(BundleError, match=f"token id {bad} has no row .* expected 0 to 1"):
        table.rows(np.array([0, bad, 1]))


# --- damaged and hostile files

HEADERS: dict[str, object] = {
    "missing tensor": {},
    "other tensor": {"weight": entry()["embedding"]},
    "second tensor": {**entry(), "other": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    "wrong dtype": entry(dtype="I64"),
    "dtype of another kind": entry(dtype=3),
    "three axes": entry(shape=[1, 2, 3]),
    "one axis": entry(shape=[6]),
    "zero rows": entry(shape=[0, 3], data_offsets=[0, 0]),
    "negative shape": entry(shape=[-2, -3]),
    "fractional shape": entry(shape=[2.5, 3]),
    "shape that overflows": entry(shape=[2**62, 2**62]),
    "huge numbers": entry(shape=[10**400, 1]),
    "shape and bytes disagree": entry(shape=[2, 4]),
    "negative offset": entry(data_offsets=[-24, 0]),
    "offsets into the header": entry(data_offsets=[-8, 16]),
    "offsets reversed": entry(data_offsets=[24, 0]),
    "offset gap": entry(data_offsets=[4, 28]),
    "offsets past the end": entry(data_offsets=[0, 2**63]),
    "unknown field": entry(strides=[1, 1]),
    "metadata of another kind": {"__metadata__": [1], **entry()},
    "not an object": [1, 2],
    "null": None,
    "not JSON": b"{'embedding': 1}",
    "not UTF-8": b'{"embedding": "\xff\xfe"}',
    "broken off": b'{"embedding": {"dtype": "F32"',
    "deeply nested": b'{"embedding": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "deeply nested metadata": b'{"__metadata__": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"}",
    "zero bytes": bytes(64),
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_does_not_fit_is_refused_in_one_line(header: object, tmp_path: Path) -> None:
    path = raw_file(tmp_path / "e.safetensors", header, bytes(24))
    with pytest.raises(BundleError, match="is not an embedding table") as caught:
        EmbeddingTable.open(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1500
    assert str(path) in message
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("length", [0, 1, 2**16 + 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_beyond_reason_is_refused(length: int, tmp_path: Path) -> None:
    path = raw_file(tmp_path / "e.safetensors", entry(), bytes(24), length=length)
    with pytest.raises(BundleError, match=f"header would have {length} bytes"):
        EmbeddingTable.open(path)


@pytest.mark.parametrize("size", range(0, 130, 3))
def test_a_file_cut_off_anywhere_is_refused(size: int, tmp_path: Path) -> None:
    path = raw_file(tmp_path / "e.safetensors", entry(), bytes(24))
    complete = path.read_bytes()
    path.write_bytes(complete[: min(size, len(complete) - 1)])
    with pytest.raises(BundleError):
        EmbeddingTable.open(path)


def test_bytes_after_the_tensor_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="need 24 bytes"):
        EmbeddingTable.open(raw_file(tmp_path / "e.safetensors", entry(), bytes(25)))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(BundleError, match="cannot be read"):
            EmbeddingTable.open(path)


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    random = np.random.default_rng(9)
    path = raw_file(tmp_path / "e.safetensors", entry(), bytes(24))
    sound = np.frombuffer(path.read_bytes(), np.uint8)
    refused = 0
    for _ in range(500):
        damaged = sound.copy()
        at = random.integers(0, len(sound) - 24, random.integers(1, 4))
        damaged[at] = random.integers(0, 256, at.size)
        path.write_bytes(damaged.tobytes())
        try:
            EmbeddingTable.open(path).rows(np.array([0, 1]))
        except BundleError:
            refused += 1
    assert refused > 400
