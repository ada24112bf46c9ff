"""``linvt::GatherPool`` as a Triton kernel: one launch gathers the rows and writes all scales.

A program takes ROWS selected rows and BLOCK columns. Where every scale divides ROWS and rows are aligned it reads each
row once, all of them in flight together, and stores a mean wherever a window ends; otherwise it takes the windows that
begin in its rows one by one, and reads a row once per scale.

The arguments are pointers to ``tokens`` (B, L, D), ``indices`` (B, k) int64 and ``pooled`` (B, M, D), and L, k and D as
int32, so that one binary serves every model. Pointers are multiples of 16 bytes, as TensorRT's and torch's are.
``kernels.ptx`` knows the grid.

Needs ``triton``. The score and the top-k are not fused in: whether that is faster has to be measured on a GPU.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment"
# ruff: noqa: N803  (constants of a kernel are upper case)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gather_pool"]


PART: tl.constexpr = tl.constexpr(64)


@triton.jit
def load_row(tokens, indices, clip, position, length, top_k, width, columns):
    """The selected row at ``position``, (BLOCK,); past the last one the last, for windows that are not stored.

    An index outside of [0, length) is the nearest row.
    """
    row = tl.load(indices + clip * top_k + tl.minimum(position, top_k - 1))
    row = tl.minimum(tl.maximum(row, 0), length - 1)
    return tl.load(tokens + (clip * length + row) * width + columns, mask=columns < width)


@triton.jit
def mean(total, SCALE: tl.constexpr):
    """``total`` (BLOCK,) f32 / SCALE, correctly rounded; Triton's ``/`` is approximate."""
    if SCALE & (SCALE - 1) == 0:
        return total * (1.0 / SCALE)
    else:  # noqa: RET505  (what follows a return is compiled as well)
        return tl.div_rn(total, tl.full(total.shape, SCALE, tl.float32))


@triton.jit
def store_means(values, pooled, start, first, windows, width, columns, ROWS: tl.constexpr, SCALE: tl.constexpr):
    """Means of one scale's windows in ``values``, ROWS rows (BLOCK,); its ``windows`` begin at ``start``."""
    for w in tl.static_range(ROWS // SCALE):
        result = values[w * SCALE]
        if SCALE != 1:
            total = result.to(tl.float32)
            for r in tl.static_range(1, SCALE):
                total = total + values[w * SCALE + r].to(tl.float32)
            result = mean(total, SCALE).to(result.dtype)
        window = first // SCALE + w
        limit = tl.where(window < windows, width, 0)
        tl.store(pooled + (start + window) * width + columns, result, mask=columns < limit)


@triton.jit
def one_pass(
    tokens,
    indices,
    length,
    top_k,
    width,
    pooled,
    clip,
    total,
    SCALES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every row is read once; all SCALES divide ROWS. A clip has ``total`` windows."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) * ROWS
    values = ()
    for r in tl.static_range(ROWS):
        row = load_row(tokens, indices, clip, first + r, length, top_k, width, columns)
        values = values + (row,)  # noqa: RUF005  (Triton knows no *)
    start = clip * total
    for i in tl.static_range(len(SCALES)):
        windows = top_k // SCALES[i]
        store_means(values, pooled, start, first, windows, width, columns, ROWS, SCALES[i])
        start += windows


@triton.jit
def store_windows(
    tokens, indices, length, top_k, width, pooled, clip, start, columns, ROWS: tl.constexpr, SCALE: tl.constexpr
):
    """Means of the windows of one scale that begin in the program's rows."""
    first = tl.program_id(0) * ROWS
    end = tl.minimum((first + ROWS + SCALE - 1) // SCALE, top_k // SCALE)
    for w in range((ROWS + SCALE - 1) // SCALE):
        window = (first + SCALE - 1) // SCALE + w
        limit = tl.where(window < end, width, 0)
        result = load_row(tokens, indices, clip, window * SCALE, length, top_k, width, columns)
        if SCALE != 1:
            total = result.to(tl.float32)
            for r in range(1, SCALE):
                row = load_row(tokens, indices, clip, window * SCALE + r, length, top_k, width, columns)
                total = total + row.to(tl.float32)
            result = mean(total, SCALE).to(result.dtype)
        tl.store(pooled + (start + window) * width + columns, result, mask=columns < limit)


@triton.jit
def by_window(
    tokens,
    indices,
    length,
    top_k,
    width,
    pooled,
    clip,
    total,
    SCALES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One window after the other, a column a thread. A clip has ``total`` windows."""
    for part in range(0, BLOCK, PART):
        columns = tl.program_id(1) * BLOCK + part + tl.arange(0, PART)
        start = clip * total
        for i in tl.static_range(len(SCALES)):
            store_windows(tokens, indices, length, top_k, width, pooled, clip, start, columns, ROWS, SCALES[i])
            start += top_k // SCALES[i]


@triton.jit
def gather_pool(
    tokens,
    indices,
    length,
    top_k,
    width,
    pooled,
    SCALES: tl.constexpr,
    ROWS: tl.constexpr,
    ONE_PASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (top_k / ROWS, D / BLOCK, B), rounded up."""
    clip = tl.program_id(2).to(tl.int64)  # tokens of many long videos pass 2^31 elements
    total = top_k // SCALES[0]
    for i in tl.static_range(1, len(SCALES)):
        total += top_k // SCALES[i]
    if ONE_PASS:
        if width % 16 == 0:
            aligned = width // 16 * 16  # the same number, but the compiler sees 16-byte accesses
            one_pass(tokens, indices, length, top_k, aligned, pooled, clip, total, SCALES, ROWS, BLOCK)
        else:
            by_window(tokens, indices, length, top_k, width, pooled, clip, total, SCALES, ROWS, BLOCK)
    else:
        by_window(tokens, indices, length, top_k, width, pooled, clip, total, SCALES, ROWS, BLOCK)
