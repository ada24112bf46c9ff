"""The double of CUDA's driver API loads PTX, checks launches, and computes what it was told a kernel computes."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from tests import trt_fixtures
from tests.trt.cuda_play import SIZE, stream_of, value
from tests.trt.double import Double

double = trt_fixtures.cuda_double

PTX = b""".version 8.5\n.target sm_87\n.address_size 64
.visible .entry add_one(.param .u64 .ptr .global a, .param .u32 n) { ret; }\n\0"""


def test_a_kernel_is_launched_with_checked_arguments_and_computes_what_it_was_told(double: Double) -> None:
    from cuda.bindings import driver
    from cuda.bindings import runtime as cuda

    def add_one(launch: Any) -> None:
        address, count = launch.arguments
        launch.memory.view(address, count, launch.entry)[:] += 1

    double.kernel("add_one", add_one)
    stream = stream_of(cuda)
    device = value(cuda.cudaMalloc(SIZE))
    function = value(driver.cuModuleGetFunction(value(driver.cuModuleLoadData(PTX)), b"add_one"))
    value(cuda.cudaMemsetAsync(device, 1, SIZE, stream))
    arguments = ((device, SIZE), (ctypes.c_void_p, ctypes.c_int32))
    value(driver.cuLaunchKernel(function, 4, 1, 1, 128, 1, 1, 0, stream, arguments, 0))
    back = np.empty(SIZE, np.uint8)
    kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
    value(cuda.cudaMemcpyAsync(back.ctypes.data, device, SIZE, kind, stream))
    assert (back == 2).all() and double.launches[0].grid == (4, 1, 1)
    with pytest.raises(AssertionError, match="NUL"):
        driver.cuModuleLoadData(PTX.rstrip(b"\0"))
    other = value(driver.cuModuleGetFunction(value(driver.cuModuleLoadData(PTX.replace(b"add", b"sub"))), b"sub_one"))
    value(driver.cuLaunchKernel(other, 1, 1, 1, 1, 1, 1, 0, stream, arguments, 0))
    with pytest.raises(AssertionError, match="not told what the kernel sub_one"):
        cuda.cudaStreamSynchronize(stream)
    with pytest.raises(AssertionError, match="2 parameters"):
        driver.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, ((device,), (ctypes.c_void_p,)), 0)
    with pytest.raises(TypeError, match="getPtr"):
        driver.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, ((device, 1), (None, None)), 0)
    assert (
        driver.cuLaunchKernel(function, 0, 1, 1, 1, 1, 1, 0, stream, arguments, 0)[0].name == "CUDA_ERROR_INVALID_VALUE"
    )


@pytest.mark.parametrize(
    "ptx, error",
    [
        (PTX.replace(b"8.5", b"9.9"), "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"),
        (PTX.replace(b"sm_87", b"sm_90"), "CUDA_ERROR_INVALID_PTX"),
        (b"nothing\0", "CUDA_ERROR_INVALID_PTX"),
    ],
    ids=["version", "target", "garbage"],
)
def test_ptx_that_the_device_cannot_run_is_refused(double: Double, ptx: bytes, error: str) -> None:
    from cuda.bindings import driver

    assert driver.cuModuleLoadData(ptx)[0].name == error
    assert driver.cuModuleGetFunction(value(driver.cuModuleLoadData(PTX)), b"other")[0].name == "CUDA_ERROR_NOT_FOUND"
