"""Launch the Triton kernel in Triton's CPU interpreter: a command, because Triton decides when it is imported.

``python tests/kernel_interpreter.py JOBS.json ARRAYS.npz OUT.npz`` runs every job as a device would: the grid, and the
scalars between inputs and outputs, are taken as given. ``interpreted`` calls it from a test. Without arguments it tries
tokens of more than 2^31 elements.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parent.parent
Array = NDArray[Any]


@dataclass(frozen=True)
class Launch:
    """Arguments of one launch; constants are SCALES, ROWS, ONE_PASS and BLOCK."""

    grid: tuple[int, int, int]
    scalars: tuple[int, ...]
    constants: dict[str, Any]
    pooled: tuple[int, int, int]


def triton_spec() -> ModuleSpec | None:
    """Where Triton is installed; tests do not import it themselves (conftest.py), the processes they start do."""
    return PathFinder.find_spec("triton")


def interpreted(launches: list[Launch], inputs: list[tuple[Array, Array]], folder: Path) -> list[Array]:
    """The outputs (B, M, D) of all launches on their (tokens, indices); where nothing is written, 77 stays."""
    jobs = [
        {**asdict(launch), "dtype": str(tokens.dtype)} for launch, (tokens, _) in zip(launches, inputs, strict=True)
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    arrays = {f"tokens_{i}": as_bits(tokens) for i, (tokens, _) in enumerate(inputs)}
    arrays |= {f"indices_{i}": indices for i, (_, indices) in enumerate(inputs)}
    np.savez(folder / "arrays.npz", **arrays)
    run(*(str(folder / name) for name in ("jobs.json", "arrays.npz", "out.npz")))
    with np.load(folder / "out.npz") as found:
        return [found[f"pooled_{i}"].view(tokens.dtype) for i, (tokens, _) in enumerate(inputs)]


def run(*arguments: str) -> None:
    """This file as a command, with the interpreter on."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def as_bits(array: Array) -> Array:
    """Unsigned integers of the same bits; files hold no bfloat16."""
    return array.view({2: np.uint16, 4: np.uint32}[array.itemsize])


def far() -> None:
    """Two clips whose rows lie beyond 2^31 elements; memory that is not touched is not taken."""
    import torch

    from kernels.triton_pool import gather_pool

    width, length = 16, (1 << 31) // 16 + 3
    tokens = torch.empty((2, length, width), dtype=torch.float16)
    indices = torch.tensor([[length - 1, length - 2], [length - 3, 0]])
    for clip in range(2):
        tokens[clip, indices[clip]] = torch.randn(2, width).half()
    pooled = torch.empty((2, 3, width), dtype=torch.float16)
    constants = {"SCALES": (1, 2), "ROWS": 4, "ONE_PASS": True, "BLOCK": 64}
    for one_pass in (True, False):
        gather_pool[(1, 1, 2)](tokens, indices, length, 2, width, pooled, **{**constants, "ONE_PASS": one_pass})
        for clip in range(2):
            picked = tokens[clip, indices[clip]]
            assert torch.equal(pooled[clip, :2], picked)
            assert torch.equal(pooled[clip, 2], picked.float().mean(0).half())


def main(jobs: str, arrays: str, out: str) -> None:
    import torch

    from kernels.triton_pool import gather_pool

    results = {}
    with np.load(arrays) as given:
        for i, job in enumerate(json.loads(Path(jobs).read_text())):
            dtype, bits = getattr(torch, job["dtype"]), torch.int16 if "16" in job["dtype"] else torch.int32
            numbers = given[f"tokens_{i}"].view(np.int16 if bits == torch.int16 else np.int32)
            tokens = torch.from_numpy(numbers).view(dtype)
            pooled = torch.full(job["pooled"], 77.0, dtype=dtype)
            indices = torch.from_numpy(given[f"indices_{i}"])
            constants = {**job["constants"], "SCALES": tuple(job["constants"]["SCALES"])}
            gather_pool[tuple(job["grid"])](tokens, indices, *job["scalars"], pooled, **constants)
            results[f"pooled_{i}"] = as_bits(pooled.view(bits).numpy())
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:]) if sys.argv[1:] else far()
