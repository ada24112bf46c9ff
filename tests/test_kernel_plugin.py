"""The TensorRT plugins, over the real bindings: what they would launch, launched in the interpreter, is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from kernels.ptx import SHIPPED, find, read_index
from kernels.spec import PLUGIN_FIELDS, gather_pool, plugin_attributes, scales_of_fields
from tests.kernel_interpreter import Launch, interpreted, triton_spec
from tests.trt.bindings import CUDA_VERSIONS, VERSIONS, run_with

SCRIPT = Path(__file__).with_name("kernel_plugins.py")
WITH_AOT = [version for version in VERSIONS if version != "10.3.0"]
RUNS = [*((version, "aot") for version in WITH_AOT), *((version, "v3") for version in VERSIONS)]


def launched(version: str, kind: str, cases: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What the plugin of this TensorRT does for every case."""
    (folder / "cases.json").write_text(json.dumps(cases))
    names = [str(folder / name) for name in ("cases.json", "launches.json")]
    done = run_with(version, SCRIPT, kind, *names, cuda=CUDA_VERSIONS[0])
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "launches.json").read_text())
    return found


@pytest.mark.parametrize(("version", "kind"), RUNS)
def test_what_a_plugin_launches_is_the_oracle(
    version: str, kind: str, random: np.random.Generator, tmp_path: Path
) -> None:
    shapes = [(1, 40, 24, 80), (2, 21, 11, 7), (3, 9, 3, 33)]  # batch, rows, k, width
    cases = [
        {"dtype": dtype, "scales": [1, 2, 4], "tokens": [batch, rows, width], "indices": [batch, k]}
        for dtype, (batch, rows, k, width) in zip(("float32", "float16", "bfloat16"), shapes, strict=True)
    ]
    found = launched(version, kind, cases, tmp_path)
    expected_kind = "v3" if version == "10.3.0" else "aot"
    assert found["registered"][0] == expected_kind, found["registered"]
    kernels = {entry.sha256: entry for entry in read_index(SHIPPED).kernels}
    for case, launch in zip(cases, found["launches"], strict=True):
        entry = kernels[launch["sha256"]]
        assert (entry.entry, entry.dtype, entry.sm, entry.shared) == (
            launch["entry"],
            case["dtype"],
            87,
            launch["shared"],
        )
        assert launch["threads"] == entry.layout.warps * 32
    check_in_the_interpreter(cases[:2], found["launches"][:2], kernels, random, tmp_path)


def check_in_the_interpreter(
    cases: list[dict[str, Any]], found: list[dict[str, Any]], kernels: Any, random: np.random.Generator, folder: Path
) -> None:
    """Grid and scalars as the plugin gave them, constants as the index has them."""
    if triton_spec() is None:
        pytest.skip("Triton is not installed: launch parameters were read, not run")
    launches, inputs = [], []
    for case, launch in zip(cases, found, strict=True):
        layout = kernels[launch["sha256"]].layout
        constants = {"SCALES": (1, 2, 4), "ROWS": layout.rows, "ONE_PASS": layout.one_pass, "BLOCK": layout.block}
        launches.append(Launch(tuple(launch["grid"]), tuple(launch["scalars"]), constants, tuple(launch["pooled"])))
        tokens = random.normal(size=case["tokens"]).astype(case["dtype"])
        inputs.append((tokens, random.integers(0, case["tokens"][1], case["indices"])))
    for pooled, pair in zip(interpreted(launches, inputs, folder), inputs, strict=True):
        np.testing.assert_array_equal(pooled, gather_pool(*pair, (1, 2, 4)))


def test_without_a_fitting_kernel_nothing_is_registered_and_the_reason_is_said() -> None:
    code = """
import tensorrt
tensorrt.get_plugin_registry = None
from kernels.register import register
for found in (register((7, 5)), register((8, 7), scales=(1, 6)), register((8, 7), scales=range(1, 10))):
    assert (found.kind, found.sha256) == ("none", ""), found
    print(found.reason)
"""
    done = run_with("10.13.3.9", code, cuda=CUDA_VERSIONS[0])
    assert done.returncode == 0, done.stderr
    old, scales, many = done.stdout.splitlines()[-3:]
    assert "sm_75" in old
    assert "python -m kernels.compile --scales 1,6" in scales
    assert "at most 8 scales" in many


def test_an_old_tensorrt_without_cuda_python_gets_the_function_body() -> None:
    code = "from kernels.register import register; print(register((8, 7)))"
    done = run_with("10.3.0", code)
    assert done.returncode == 0, done.stderr
    assert "kind='none'" in done.stdout
    assert "pip install cuda-python" in done.stdout


def test_the_hash_tells_kernels_apart() -> None:
    assert len({find((8, sm), dtype, (1, 2, 4)).facts.sha256 for sm in (0, 7) for dtype in ("float32", "float16")}) == 4


def test_attributes_survive_the_way_through_the_fields(random: np.random.Generator) -> None:
    for _ in range(20):
        scales = [int(scale) for scale in random.integers(1, 2**31, random.integers(1, 9))]
        attributes = plugin_attributes(scales)
        node = onnx.helper.make_node("GatherPool", ["x", "i"], ["y"], domain="linvt", **attributes)
        assert {attribute.name for attribute in node.attribute} == set(attributes)
        assert list(attributes)[1:9] == list(PLUGIN_FIELDS)
        values = [np.array([attributes[name]], np.int32) for name in PLUGIN_FIELDS]
        assert list(scales_of_fields(values)) == scales


@pytest.mark.parametrize("scales", [[1] * 9, [1, 0], [-2]])
def test_scales_that_no_field_can_hold_are_refused(scales: list[int]) -> None:
    with pytest.raises(ValueError, match="1 to 8 scales of at least 1"):
        plugin_attributes(scales)
