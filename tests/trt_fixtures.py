"""Fixtures over the double of TensorRT that several modules share; a module takes one by giving it a name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engines import IN_PLACE, TWO_SETS, Built
from tests.trt.bindings import CUDA_VERSIONS
from tests.trt.double import Double
from tests.trt.play import Machine

# --- for tests of the backend


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory)


@pytest.fixture
def frames(random: np.random.Generator) -> Any:
    """(9, 64, 64, 3) uint8: two whole batches and a rest."""
    return random.integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(params=[TWO_SETS, IN_PLACE])
def clean_double(request: pytest.FixtureRequest) -> Iterator[Double]:
    """A machine with the oldest or the newest TensorRT, in which nothing is left over."""
    with Double(version=request.param) as double:
        yield double
        left = double.leaks()
        assert left == [], left


@pytest.fixture
def bundle(built: Built, double: Double) -> Path:
    return built(double.version)


# --- for tests of the double itself, which may break what they like


@pytest.fixture(params=[TWO_SETS, IN_PLACE])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with Double(request.param) as double:
        made = Machine(double)
        yield made
        made.close()
        double.failures.clear()


@pytest.fixture(params=CUDA_VERSIONS)
def cuda_double(request: pytest.FixtureRequest) -> Iterator[Double]:
    with Double("10.3.0", cuda=request.param) as made:
        yield made
        made.failures.clear()  # the tests have seen them


@pytest.fixture
def cuda(double: Double) -> Any:
    from cuda.bindings import runtime

    return runtime
