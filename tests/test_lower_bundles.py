"""All families, in float, 16, 8 and 4 bits: every TensorRT takes the stages, lowered or not, and they stay the same.

Graphs are compared in float32 and without rounding of activations (``tests.lowered.plain``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.options import Precision, QuantizeOptions
from calibration.quantize import quantized_bundle
from calibration.trt_rules import RELEASES
from export.lower import lower, release_of
from runtime.bundle import Bundle
from tests.conftest import Recorded
from tests.families import FIXTURES, ROUTED, Fixture, random_linvt
from tests.lowered import OLDEST, assert_taken, cases, feeds_of, largest_shares, loaded, plain, run, session, share
from tests.videos import write_video

Export = Callable[..., Path]
Load = Callable[[str], Recorded]

EXACT = 1e-5  # share of the largest value
NEWEST = list(RELEASES)[-1]
DEMO = Path(__file__).parent.parent / "runtime" / "demo"
DTYPES = dict(zip(map(str, ROUTED), ("float16", "bfloat16", "float16"), strict=True))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short videos."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(2):
        write_video(folder / f"{number}.mp4", frames=3 + 2 * number)
    return folder


def quantised(source: Path, clips: Path, target: Path, precision: Precision) -> Path:
    """By the cheapest method, asking for nothing."""
    options = QuantizeOptions(precision, method="minmax", rounding="rounded", block=32, min_cosine=0, threads=1)
    quantized_bundle(source, clips, target, options)
    return target


def assert_taken_and_the_same(bundle: Path, random: np.random.Generator) -> None:
    assert_taken(bundle)
    shares = largest_shares(bundle, random)
    assert shares.keys() == Bundle.open(bundle).manifest.stages.keys()
    assert max(shares.values()) < EXACT


@pytest.mark.parametrize("fixture", FIXTURES, ids=str)
def test_every_family_is_taken_and_the_same(
    fixture: Fixture, export_bundle: Export, clips: Path, tmp_path: Path, random: np.random.Generator
) -> None:
    source = export_bundle(fixture.name, linvt="none", **fixture.options)
    assert_taken_and_the_same(source, random)
    for precision in ("int8", "int4"):
        assert_taken_and_the_same(quantised(source, clips, tmp_path / precision, precision), random)


def test_linvt_is_taken_and_the_same(
    linvt_bundle: Path, clips: Path, tmp_path: Path, random: np.random.Generator
) -> None:
    assert_taken_and_the_same(linvt_bundle, random)
    for precision in ("int8", "int4"):
        assert_taken_and_the_same(quantised(linvt_bundle, clips, tmp_path / precision, precision), random)


@pytest.mark.parametrize("fixture", ROUTED, ids=str)
def test_linvt_on_other_families_in_16_bits_is_taken_and_the_same(
    fixture: Fixture, export_bundle: Export, tmp_path: Path, recorded: Load, random: np.random.Generator
) -> None:
    weights = random_linvt(tmp_path / "linvt.safetensors", recorded(fixture.name)["visual_tokens"].shape[-1])
    bundle = export_bundle(fixture.name, linvt=str(weights), dtype=DTYPES[str(fixture)], **fixture.options)
    assert_taken_and_the_same(bundle, random)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_float16_in_8_and_4_bits_is_taken_and_the_same(
    precision: Precision, export_bundle: Export, clips: Path, tmp_path: Path, random: np.random.Generator
) -> None:
    source = export_bundle("internvl2-phi3-a", linvt="none", dtype="float16")
    assert_taken_and_the_same(quantised(source, clips, tmp_path / "out", precision), random)


@pytest.mark.parametrize("name", ["bundle", "float"])
def test_the_demo_is_taken_and_the_same(name: str, random: np.random.Generator) -> None:
    assert_taken_and_the_same(DEMO / name, random)


def test_newer_releases_get_the_graphs_as_they_are(random: np.random.Generator) -> None:
    assert max(largest_shares(DEMO / "float", random, NEWEST).values()) < 1e-6


@pytest.mark.parametrize("name", ["internvl2-phi3-a", "internvl2-internlm2-a"])
def test_a_float16_graph_is_as_accurate_lowered_as_it_was(
    name: str, export_bundle: Export, random: np.random.Generator
) -> None:
    """Both round at every node, not at the same ones: each is held against the same graph in float32.

    One step of float16 at the largest value, 2^-10 of it, is allowed on top of 1.5 times the original's error.
    """
    bundle = export_bundle(name, linvt="none", dtype="float16")
    manifest = Bundle.open(bundle).manifest
    for stage, spec in manifest.stages.items():
        original, lowered = loaded(bundle / spec.file), loaded(bundle / spec.file)
        lower(lowered, release_of(OLDEST), plugin=False)
        wide, before, after = session(plain(original)), session(original), session(lowered)
        narrow = {value.name for value in before.get_inputs() if value.type == "tensor(float16)"}
        for free, at in cases(manifest, stage):
            feeds: dict[str, Any] = feeds_of(spec.inputs, random, free, at)
            feeds = {key: array.astype(np.float16) if key in narrow else array for key, array in feeds.items()}
            rounded = {key: array.astype(np.float32) if key in narrow else array for key, array in feeds.items()}
            expected = run(wide, rounded)
            errors = [
                share({key: array.astype(np.float32) for key, array in run(opened, feeds).items()}, expected)
                for opened in (before, after)
            ]
            print(f"{stage} {free}: original {errors[0]:.1e}, lowered {errors[1]:.1e}")
            assert errors[1] < 1.5 * errors[0] + 2**-10
