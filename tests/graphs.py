"""Exported graphs run in ONNX Runtime, and their values held against expected ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
Recorded = Callable[[str], Arrays]


def session(bundle: Path, stage: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(bundle / f"{stage}.onnx", options, providers=["CPUExecutionProvider"])


def run(opened: ort.InferenceSession, **feeds: NDArray[Any]) -> Arrays:
    names = [output.name for output in opened.get_outputs()]
    return dict(zip(names, opened.run(names, feeds), strict=True))


def assert_close(found: NDArray[Any], expected: NDArray[Any], what: str, limit: float = 1e-4) -> None:
    assert found.shape == expected.shape, what
    difference = float(np.abs(found - expected).max())
    print(f"{what}: {difference:.1e}")
    assert difference <= limit, what
