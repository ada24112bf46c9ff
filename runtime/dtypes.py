"""The dtypes of graph tensors: by the manifest's names, what holds them on the host and their numbers in ONNX.

NumPy has no bfloat16, whose bits uint16 holds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.manifest import Dtype

__all__ = ["NUMBERS", "NUMPY", "name_of_ort"]

NUMPY: dict[Dtype, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "bool": np.dtype(np.bool_),
}
NUMBERS: dict[Dtype, int] = {"float32": 1, "float16": 10, "bfloat16": 16, "int64": 7, "int32": 6, "bool": 9}
ORT_NAMES = {"float": "float32", "double": "float64"}  # where ONNX Runtime's names are not the manifest's


def name_of_ort(kind: str) -> str:
    """ONNX Runtime's "tensor(float)" -> the manifest's "float32"; what the manifest does not have keeps its name."""
    element = kind.removeprefix("tensor(").removesuffix(")")
    return ORT_NAMES.get(element, element)
