"""``linvt::GatherPool``: oracle, PyTorch and ONNX function body say the same."""

from __future__ import annotations

from typing import Any

import ml_dtypes
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


def test_a_mean_is_added_in_order_divided_and_rounded_once() -> None:
    tokens = np.array([[[1.0], [2.0**-24], [2.0**-24], [0.0]]], np.float32)  # each half is lost against 1, both are not
    assert gather_pool(tokens, np.array([[0, 1, 2]]), (3,)).item() == np.float32(1) / np.float32(3)
    assert gather_pool(tokens, np.array([[1, 2, 0]]), (3,)).item() == np.float32(1 + 2**-23) / np.float32(3)
    large = np.full((1, 4, 1), 60000, np.float16)  # the sum does not fit into float16
    assert gather_pool(large, np.array([[0, 1, 2, 3]]), (4,)).item() == 60000


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["f32", "f16", "bf16"])
def test_special_values_follow_ieee(dtype: Any) -> None:
    tokens = np.array([[[-0.0], [np.inf], [-np.inf], [np.nan], [1.0]]], dtype)
    picked = np.array([[0, 0, 1, 4, 1, 2, 3, 4]])
    found = gather_pool(tokens, picked, (2,)).astype(np.float32).ravel()
    np.testing.assert_array_equal(found, [0, np.inf, np.nan, np.nan])
    assert np.signbit(found[0])
    assert gather_pool(tokens, picked, (1,)).tobytes() == tokens[:, picked[0]].tobytes()


def test_sixteen_bits_are_the_float32_mean_rounded(random: np.random.Generator) -> None:
    for dtype in (np.float16, ml_dtypes.bfloat16):
        tokens = random.normal(size=(2, 20, 6)).astype(dtype)
        indices = random.integers(0, 20, (2, 15))
        wide = gather_pool(tokens.astype(np.float32), indices, (1, 3, 4))
        np.testing.assert_array_equal(gather_pool(tokens, indices, (1, 3, 4)), wide.astype(dtype))


def test_scales_repeat_and_those_above_k_give_nothing(random: np.random.Generator) -> None:
    tokens, indices = random_case(random, 1, 20, 5, 7)
    once = gather_pool(tokens, indices, (2,))
    np.testing.assert_array_equal(gather_pool(tokens, indices, (2, 9, 2)), np.concatenate([once, once], 1))


@pytest.mark.parametrize("outside", [-1, 20])
def test_an_index_outside_is_refused(outside: int, random: np.random.Generator) -> None:
    tokens, indices = random_case(random, 1, 20, 5, 7)
    indices[0, 3] = outside
    with pytest.raises(IndexError, match=f"{outside}.*expected rows of 0 to 19"):
        gather_pool(tokens, indices, (1,))
