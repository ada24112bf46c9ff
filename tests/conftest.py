"""Fixtures shared by all tests: recorded outputs of the original code, and bundles exported from tiny checkpoints."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
sys.modules["triton"] = None  # type: ignore[assignment]  # torch's tracer imports it, and it talks after the summary

GOLDEN = Path(__file__).parent / "golden"

Recorded = dict[str, NDArray[np.generic]]


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the memory of checked bundles out of the user's home."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def seed() -> int:
    """A fresh seed for every test, shown when it fails; LINVT_TEST_SEED repeats one."""
    value = int(os.environ.get("LINVT_TEST_SEED") or secrets.randbits(32))
    print(f"LINVT_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture
def random(seed: int) -> np.random.Generator:
    """NumPy's generator with the test's seed."""
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def recorded() -> Callable[[str], Recorded]:
    """Arrays that the original implementation recorded, by fixture name."""

    def load(name: str) -> Recorded:
        with np.load(GOLDEN / name / "expected.npz") as arrays:
            return {key: arrays[key] for key in arrays.files}

    return load


@pytest.fixture(scope="session")
def export_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Export a golden checkpoint once per set of options; the bundle must not be changed by a test."""
    from export.convert import ExportOptions, bundle_from_checkpoint

    done: dict[str, Path] = {}

    def export(name: str, **options: object) -> Path:
        key = f"{name} {sorted(options.items())}"
        if key not in done:
            output = tmp_path_factory.mktemp("bundle") / name
            done[key] = bundle_from_checkpoint(ExportOptions(str(GOLDEN / name), output, **options))  # type: ignore[arg-type]
        return done[key]

    return export


@pytest.fixture(scope="session")
def linvt_bundle(export_bundle: Callable[..., Path]) -> Path:
    """LinVT-InternVL2, as released."""
    return export_bundle("linvt-internvl2-a")


@pytest.fixture(scope="session")
def plain_bundle(export_bundle: Callable[..., Path]) -> Path:
    """InternVL2 without LinVT."""
    return export_bundle("internvl2-qwen2-a", linvt="none")
