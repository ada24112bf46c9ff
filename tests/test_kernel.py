"""``linvt::GatherPool``: oracle, PyTorch and ONNX function body say the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from export.ops import gather_pool as torch_gather_pool
from kernels.function import function_body
from kernels.spec import DOMAIN, NAME, VERSION, gather_pool, pooled_length

OPSET = 24
Array = NDArray[Any]
CASES = [  # batch, rows, width, k, scales
    (1, 96, 64, 24, (1, 2, 4)),
    (1, 40, 7, 26, (1, 2, 4)),
    (2, 33, 5, 3, (1, 2, 4)),
    (1, 8, 3, 1, (1, 2, 4)),
    (3, 50, 11, 17, (1, 3, 5, 20)),
    (1, 64, 16, 64, (4,)),
]


def random_case(random: np.random.Generator, batch: int, rows: int, width: int, k: int) -> tuple[Array, Array]:
    tokens = random.normal(size=(batch, rows, width)).astype(np.float32)
    return tokens, random.integers(0, rows, (batch, k))  # repeats are allowed


def model_of(k: int, scales: tuple[int, ...]) -> bytes:
    """One node with its function body, as the exporter writes it."""
    node = helper.make_node(NAME, ["tokens", "indices"], ["pooled"], domain=DOMAIN, scales=list(scales))
    inputs = [
        helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["b", "l", "d"]),
        helper.make_tensor_value_info("indices", TensorProto.INT64, ["b", k]),
    ]
    outputs = [helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["b", "m", "d"])]
    model = helper.make_model(
        helper.make_graph([node], "pool", inputs, outputs),
        functions=[function_body(k, scales, OPSET)],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(("batch", "rows", "width", "k", "scales"), CASES)
def test_function_body_and_torch_equal_the_oracle(
    batch: int, rows: int, width: int, k: int, scales: tuple[int, ...], random: np.random.Generator
) -> None:
    tokens, indices = random_case(random, batch, rows, width, k)
    expected = gather_pool(tokens, indices, scales)
    assert expected.shape == (batch, pooled_length(k, scales), width)
    torch_pooled = torch_gather_pool(torch.from_numpy(tokens), torch.from_numpy(indices), scales)
    np.testing.assert_allclose(torch_pooled.numpy(), expected, atol=1e-6)
    session = ort.InferenceSession(model_of(k, scales), providers=["CPUExecutionProvider"])
    (pooled,) = session.run(None, {"tokens": tokens, "indices": indices})
    print(f"largest difference {np.abs(pooled - expected).max():.2e}")
    np.testing.assert_allclose(pooled, expected, atol=1e-6)


def test_the_first_scale_is_the_gather_itself(random: np.random.Generator) -> None:
    tokens, indices = random_case(random, 2, 30, 8, 9)
    pooled = gather_pool(tokens, indices, (1, 2))
    np.testing.assert_array_equal(pooled[:, :9], np.take_along_axis(tokens, indices[..., None], 1))


@pytest.mark.parametrize(("k", "length"), [(1024, 1792), (26, 45), (3, 4), (2, 3), (1, 1)])
def test_pooled_length_is_the_released_one(k: int, length: int) -> None:
    assert pooled_length(k, (1, 2, 4)) == length
