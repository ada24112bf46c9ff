"""8-bit products are exact on every processor."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest

from runtime import VideoQA, backend_ort
from runtime.manifest import QuantizedSpec, StageSpec


def test_products_that_would_saturate_are_computed_another_way_with_the_same_result(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = random.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    features = []
    for saturate in (False, True):
        monkeypatch.setattr(backend_ort, "products_saturate", lambda saturate=saturate: saturate)
        with VideoQA.open("demo") as qa:
            spec = qa.bundle.manifest.stages["vision"]
            assert bool(backend_ort.w8a8_entries(spec)) is saturate
            features.append(qa.video(frames).features)
    assert np.array_equal(*features)


def test_weights_of_4_bits_and_floats_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_ort, "products_saturate", lambda: True)
    narrow = QuantizedSpec(weights="int4", activations="float", layers=1, cosine=1, size_ratio=0.2)
    assert backend_ort.w8a8_entries(StageSpec("", (), ())) == {}
    assert backend_ort.w8a8_entries(StageSpec("", (), (), quantized=narrow)) == {}


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "flags\t\t: fpu avx2 avx512_vnni sse\n", False),
        ("x86_64", "flags\t\t: fpu avx2 avx_vnni\n", False),
        ("AMD64", "flags\t\t: fpu avx2 avx512f\n", True),
        ("x86_64", "no such line\n", True),
        ("x86_64", None, True),
        ("aarch64", None, False),
    ],
)
def test_only_x86_without_vnni_saturates(
    machine: str, flags: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(backend_ort, "CPUINFO", tmp_path / "cpuinfo")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}bugs\t\t: none\n")
    assert backend_ort.products_saturate.__wrapped__() is expected
