"""The 8-bit embedding table: every row within half a step of what it was, in a file that the runtime reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from calibration import embedding
from calibration.embedding import write_narrow_embedding
from runtime.embedding import EmbeddingTable
from runtime.errors import BundleError, CalibrationError, OutputError

WIDTH = 24


def stored(path: Path, rows: NDArray[np.generic]) -> Path:
    save_file({"embedding": rows}, path)
    return path


def random_rows(random: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Rows of very different magnitudes."""
    return (random.standard_normal((count, WIDTH)) * random.lognormal(0, 4, (count, 1))).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("count", [1, 6, 7, 23])
def test_every_row_is_within_half_a_step_of_its_own(
    count: int, dtype: type, random: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tables in one piece, whole pieces and a shorter last one."""
    monkeypatch.setattr(embedding, "PIECE", 6)
    rows: NDArray[Any] = random_rows(random, count).clip(-60000, 60000).astype(dtype)
    source = stored(tmp_path / "float.safetensors", rows)
    write_narrow_embedding(source, tmp_path / "narrow.safetensors")
    narrow, ids = EmbeddingTable.open(tmp_path / "narrow.safetensors"), np.arange(count)
    wanted = EmbeddingTable.open(source).rows(ids)
    step = np.abs(wanted).max(axis=1, keepdims=True) / 127
    assert (narrow.dtype, narrow.vocabulary, narrow.width) == ("I8", count, WIDTH)
    assert (np.abs(narrow.rows(ids) - wanted) <= step * 0.501).all()
    largest = np.abs(wanted).argmax(axis=1)
    np.testing.assert_allclose(narrow.rows(ids)[ids, largest], wanted[ids, largest], rtol=1e-6)


def test_rows_of_zeros_stay_zeros(random: np.random.Generator, tmp_path: Path) -> None:
    rows = random_rows(random, 5)
    rows[2] = 0
    rows[4] = 1e-37  # its scale would be subnormal
    write_narrow_embedding(stored(tmp_path / "a", rows), tmp_path / "b")
    found = EmbeddingTable.open(tmp_path / "b").rows(np.arange(5))
    assert not found[[2, 4]].any() and found[[0, 1, 3]].any(axis=1).all()


def test_the_file_is_a_quarter_as_large_and_readable_by_all(random: np.random.Generator, tmp_path: Path) -> None:
    rows = random.standard_normal((500, 160)).astype(np.float32)
    write_narrow_embedding(stored(tmp_path / "a", rows), tmp_path / "b")
    ratio = (tmp_path / "b").stat().st_size / (tmp_path / "a").stat().st_size
    print(f"{ratio:.3f} of the size")
    assert ratio < 0.26
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_no_number_is_refused(
    value: float, random: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "PIECE", 4)
    rows = random_rows(random, 10)
    rows[9, 3] = value
    with pytest.raises(
        CalibrationError, match=r"row 9 of a\.safetensors holds NaN or infinite values, expected finite"
    ):
        write_narrow_embedding(stored(tmp_path / "a.safetensors", rows), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_target_that_cannot_be_written_and_a_damaged_source_are_refused_in_one_line(
    random: np.random.Generator, tmp_path: Path
) -> None:
    source = stored(tmp_path / "a", random_rows(random, 3))
    with pytest.raises(OutputError, match=r"cannot write .*none/b") as caught:
        write_narrow_embedding(source, tmp_path / "none" / "b")
    assert "\n" not in str(caught.value)
    source.write_bytes(source.read_bytes()[:-1])
    with pytest.raises(BundleError, match="is not an embedding table"):
        write_narrow_embedding(source, tmp_path / "b")
