"""The pooling kernel on a GPU: correct in every dtype, and how fast.

``python -m tests.benchmarks.gather_pool`` needs torch with CUDA and Triton. It checks the kernel against the oracle on
the device (the compiled PTX through cuda-python as well, where that is installed), then prints a table at the sizes of
LinVT: T x N = 16384 tokens, k = 1024, scales 1, 2, 4. Bytes are what the pass must move: k rows read, 1.75 k written.
The last line is one JSON object. Without a GPU it prints one line and exits with 1.

Nothing here has been tuned on a GPU; block sizes come from ``kernels.ptx``.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kernels.ptx import find, layout_of
from kernels.spec import gather_pool, pooled_length

TOKENS, TOP_K, SCALES = 16384, 1024, (1, 2, 4)
WIDTHS = (896, 3584)
DTYPES = ("float32", "float16", "bfloat16")
ODD = ((2, 500, 77, 128), (1, 33, 26, 7), (3, 64, 1, 16))  # batch, rows, k, width


def triton_pool(tokens: Tensor, indices: Tensor) -> Tensor:
    """(B, L, D), (B, k) -> (B, M, D)."""
    from kernels.triton_pool import gather_pool as kernel

    batch, length, width = tokens.shape
    top_k = indices.shape[1]
    layout = layout_of(SCALES, str(tokens.dtype).removeprefix("torch."))
    pooled = tokens.new_empty(batch, pooled_length(top_k, SCALES), width)
    kernel[layout.grid(batch, top_k, width)](
        tokens, indices, length, top_k, width, pooled, SCALES=SCALES, ROWS=layout.rows, ONE_PASS=layout.one_pass,
        BLOCK=layout.block, num_warps=layout.warps,
    )  # fmt: skip
    return pooled


def ptx_pool(tokens: Tensor, indices: Tensor) -> Tensor:
    """The same through the shipped PTX."""
    from kernels import cuda

    batch, length, width = tokens.shape
    top_k = indices.shape[1]
    found = find(torch.cuda.get_device_capability(), str(tokens.dtype).removeprefix("torch."), SCALES)
    pooled = tokens.new_empty(batch, pooled_length(top_k, SCALES), width)
    scalars = [(extent, ctypes.c_int32) for extent in (length, top_k, width)]
    arguments = [(tokens.data_ptr(), None), (indices.data_ptr(), None), *scalars, (pooled.data_ptr(), None)]
    stream = torch.cuda.current_stream().cuda_stream
    function = cuda.load_kernel(found.ptx, found.facts.entry)
    grid = found.facts.layout.grid(batch, top_k, width)
    cuda.launch(function, grid, found.threads, found.facts.shared, stream, arguments)
    return pooled


def eager_pool(tokens: Tensor, indices: Tensor) -> Tensor:
    """PyTorch's gather, avg_pool1d and cat."""
    picked = tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))
    turned = picked.transpose(1, 2)  # (B, D, k)
    means = [picked if scale == 1 else functional.avg_pool1d(turned, scale).transpose(1, 2) for scale in SCALES]
    return torch.cat(means, dim=1)


def check(pool: Callable[[Tensor, Tensor], Tensor], dtype: str) -> None:
    """Bit for bit the oracle, at odd sizes and at LinVT's."""
    for batch, rows, k, width in (*ODD, (1, TOKENS, TOP_K, 896)):
        tokens = torch.randn(batch, rows, width, device="cuda").to(getattr(torch, dtype))
        indices = torch.randint(0, rows, (batch, k), device="cuda")
        found = pool(tokens, indices).float().cpu().numpy()
        wide = gather_pool(tokens.float().cpu().numpy(), indices.cpu().numpy(), SCALES)
        expected = torch.from_numpy(wide).to(tokens.dtype).float().numpy()
        np.testing.assert_array_equal(found, expected, f"{dtype} {(batch, rows, k, width)}")


def microseconds(work: Callable[[], Any], cold: Tensor, runs: int = 50) -> float:
    """Median time on the device; the last-level cache is overwritten before every run.

    ``work`` is replayed as a CUDA graph, so that what the host takes to launch it is not measured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(runs):
        cold.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times)


def measured(width: int, dtype: str, cold: Tensor) -> dict[str, Any]:
    """One row of the table: the pass alone, and the whole core with score and top-k."""
    kind = getattr(torch, dtype)
    tokens = torch.randn(1, TOKENS, width, device="cuda").to(kind)
    weight = torch.randn(1, width, device="cuda").to(kind)
    indices = torch.randperm(TOKENS, device="cuda")[None, :TOP_K]
    size = (TOP_K + pooled_length(TOP_K, SCALES)) * width * tokens.element_size()  # bytes
    source = torch.empty(size // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)  # a copy that moves the same bytes

    def core(pool: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        def work() -> Tensor:
            scores = functional.linear(tokens, weight)[..., 0]
            return pool(tokens, scores.topk(TOP_K, dim=1).indices)

        return work

    times = {
        "copy": microseconds(lambda: target.copy_(source), cold),
        "kernel": microseconds(lambda: triton_pool(tokens, indices), cold),
        "eager": microseconds(lambda: eager_pool(tokens, indices), cold),
        "core with kernel": microseconds(core(triton_pool), cold),
        "core eager": microseconds(core(eager_pool), cold),
        "core compiled": microseconds(torch.compile(core(eager_pool)), cold),
    }
    speed = {name: round(size / times[name] / 1000, 1) for name in ("copy", "kernel", "eager")}  # GB/s
    share = round(100 * times["copy"] / times["kernel"], 1)
    return {"width": width, "dtype": dtype, "us": times, "gb_per_s": speed, "percent_of_copy": share}


def main() -> int:
    """Check, measure, print; the exit code."""
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is false; run this where there is one", file=sys.stderr)
        return 1
    pools = [triton_pool, *([ptx_pool] if find_spec("cuda") and find_spec("cuda.bindings") else [])]
    for pool in pools:
        for dtype in DTYPES:
            check(pool, dtype)
        print(f"{pool.__name__}: equal to the oracle in {', '.join(DTYPES)}")
    cold = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    rows = [measured(width, dtype, cold) for width in WIDTHS for dtype in DTYPES]
    print(
        "| D | dtype | copy us | kernel us | GB/s | % of copy | eager us | core us | eager core us | compiled core us |"
    )
    print("|" + "---|" * 10)
    for row in rows:
        us = {name: f"{time:.1f}" for name, time in row["us"].items()}
        cells = [
            row["width"],
            row["dtype"],
            us["copy"],
            us["kernel"],
            row["gb_per_s"]["kernel"],
            row["percent_of_copy"],
        ]
        cells += [us["eager"], us["core with kernel"], us["core eager"], us["core compiled"]]
        print("| " + " | ".join(map(str, cells)) + " |")
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
