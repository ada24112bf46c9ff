"""Bundles are checked stage by stage for every version, and the command says in lines what would be refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from calibration.trt_rules import RELEASES
from export.check import check_bundle, main
from runtime.bundle import Bundle
from runtime.errors import BundleError, OptionError
from tests.bundles import forge
from tests.commands import Captured, refused

ROOT = Path(__file__).parent.parent
FLOAT = ROOT / "runtime" / "demo" / "float"


def with_k(k: int) -> bytes:
    """The demo's SVR graph, which selects another number of tokens."""
    model = onnx.load(FLOAT / "refine.onnx", load_external_data=False)
    name = next(node for node in model.graph.node if node.op_type == "TopK").input[1]
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.array([k]), name))
    return bytes(model.SerializeToString())


def with_node(*added: onnx.NodeProto) -> bytes:
    """The demo's vision graph with nodes behind it."""
    model = onnx.load(FLOAT / "vision.onnx", load_external_data=False)
    model.graph.node.extend(added)
    return bytes(model.SerializeToString())


CAPPED = (  # Attention in a form that nothing lowers
    helper.make_node("Constant", [], ["four"], value_ints=[1, 1, -1, 8]),
    helper.make_node("Reshape", ["tokens", "four"], ["q"]),
    helper.make_node("Attention", ["q", "q", "q"], ["capped"], name="capped", is_causal=1),
)


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """A bundle whose SVR selects more tokens than TensorRT can."""
    return forge(FLOAT, tmp_path / "faulty", refine__onnx=with_k(4000))


def test_a_faulty_stage_is_reported_for_every_version(faulty: Path) -> None:
    report = check_bundle(Bundle.open(faulty), ["10.3", "11.4"])
    assert not report
    tops = [line.split(": ")[1].rsplit(" ", 1)[0] for line in report.problems]
    assert [line.split(":")[0] for line in report.problems] == ["10.3 refine"] * 2 + ["11.4 refine"] * 2
    assert set(tops) == {"TopK"}  # one selects, one brings the selected into order
    assert {check.stage for check in report.checks if not check} == {"refine"}


def test_what_cannot_be_lowered_is_a_problem_of_old_versions_alone(tmp_path: Path) -> None:
    bundle = forge(FLOAT, tmp_path / "bundle", vision__onnx=with_node(*CAPPED))
    report = check_bundle(Bundle.open(bundle), list(RELEASES))
    assert [check.version for check in report.checks if not check] == ["10.3", "10.13"]
    assert all("Attention capped: found is_causal set" in line for line in report.problems)


def test_a_graph_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    values, places = helper.make_tensor("v", 1, [2], [1.0, 2.0]), helper.make_tensor("i", 7, [2], [0, 3])
    sparse = helper.make_sparse_tensor(values, places, [5])  # which onnx-ir does not read
    node = helper.make_node("Constant", [], ["sparse"], sparse_value=sparse)
    bundle = forge(FLOAT, tmp_path / "bundle", vision__onnx=with_node(node))
    with pytest.raises(BundleError, match=r"^cannot read .*vision\.onnx: .*; export the bundle again$"):
        check_bundle(Bundle.open(bundle), ["11.4"])


def test_a_graph_that_is_not_valid_is_a_problem(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Reshape", ["tokens"], ["y"], name="lost"),
        helper.make_node("FastGelu", ["tokens"], ["y"], domain="com.microsoft"),
    ]
    for number, node in enumerate(nodes):
        bundle = forge(FLOAT, tmp_path / str(number), vision__onnx=with_node(node))
        (line,) = check_bundle(Bundle.open(bundle), ["10.3"]).problems
        assert line.startswith("10.3 vision: graph: found ") and "expected valid ONNX" in line and "\n" not in line


def test_a_dtype_that_cannot_be_known_is_a_problem(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["number"], value_ints=[1]),
        helper.make_node("Concat", ["tokens", "number"], ["unknown"], name="mixed", axis=0),
    ]
    bundle = forge(FLOAT, tmp_path / "bundle", vision__onnx=with_node(*nodes))
    (line,) = check_bundle(Bundle.open(bundle), ["11.4"]).problems
    assert line == "11.4 vision: Concat mixed: found an output of unknown dtype, expected one that ONNX infers"


def test_versions_are_taken_once_and_newer_ones_noted() -> None:
    bundle = Bundle.open("demo")
    report = check_bundle(bundle, ["11.4", "12.1", "11.4"])
    assert report and len(report.checks) == 2 * len(bundle.manifest.stages)
    assert report.notes == ("TensorRT 12.1 is newer than the newest rules; those of 11.4 are applied",)
    with pytest.raises(OptionError, match=r"expected a version from 10\.3 on"):
        check_bundle(bundle, ["11.4", "9.1"])


# --- the command


def test_the_command_says_what_each_version_needs(capfd: Captured) -> None:
    assert main(["demo"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 4 * len(RELEASES)
    assert "vision 10.3: ok, lowered: Attention, opset 24 -> 20" in lines
    assert (
        "decode 10.13: ok, lowered: Attention, RMSNormalization, RotaryEmbedding, TensorScatter, opset 24 -> 20"
        in lines
    )
    assert "decode 11.4: ok, as written" in lines


def test_the_command_names_problems_and_fails(faulty: Path, capfd: Captured) -> None:
    assert main([str(faulty), "--tensorrt", "10.16"]) == 1
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert not err and len(lines) == 2 + 4
    assert all(line.startswith("10.16 refine: TopK ") for line in lines[:2])
    assert lines[0].endswith(": found K 4000, expected at most 3840")
    assert "refine 10.16: 2 problems, as written" in lines[2:]


def test_the_command_s_json_holds_the_same(faulty: Path, capfd: Captured) -> None:
    assert main([str(faulty), "--tensorrt", "10.3", "12.0", "--json"]) == 1
    report = json.loads(capfd.readouterr().out)
    assert not report["ok"] and len(report["notes"]) == 1
    assert {check["stage"] for check in report["checks"] if check["problems"]} == {"refine"}
    assert {check["version"] for check in report["checks"]} == {"10.3", "12.0"}


def test_the_command_keeps_lowered_graphs_for_trtexec(tmp_path: Path, capfd: Captured) -> None:
    folder = tmp_path / "lowered"
    assert main([str(FLOAT), "--tensorrt", "10.3", "--write", str(folder)]) == 0
    for stage in Bundle.open(FLOAT).manifest.stages:
        graph = onnx.load(folder / f"{stage}.onnx", load_external_data=False)
        assert {opset.domain: opset.version for opset in graph.opset_import} == {"": 20}
        assert (folder / f"{stage}.onnx.data").samefile(FLOAT / f"{stage}.onnx.data")
    assert "holds files" in refused(capfd, [str(FLOAT), "--tensorrt", "10.3", "--write", str(folder)], main=main)
    assert "one version" in refused(capfd, [str(FLOAT), "--write", str(folder)], code=2, main=main)


def test_graphs_with_problems_are_kept_too_and_it_is_said_which(faulty: Path, tmp_path: Path, capfd: Captured) -> None:
    folder = tmp_path / "lowered"
    assert main([str(faulty), "--tensorrt", "10.3", "--write", str(folder)]) == 1
    out, err = capfd.readouterr()
    assert err == f"linvt-check: wrote {', '.join(Bundle.open(faulty).manifest.stages)} to {folder}\n"
    assert "TopK" in out and (folder / "refine.onnx").is_file()
    bundle = forge(FLOAT, tmp_path / "bundle", vision__onnx=with_node(*CAPPED))
    assert main([str(bundle), "--tensorrt", "10.3", "--write", str(tmp_path / "rest"), "--json"]) == 1
    out, err = capfd.readouterr()
    assert err.endswith("; vision could not be lowered\n") and err.count("\n") == 1
    assert not json.loads(out)["ok"] and "vision.onnx" not in {path.name for path in (tmp_path / "rest").iterdir()}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["demo", "--tensorrt", "8.6"], "TensorRT '8.6': expected a version from 10.3 on"),
        (["nowhere"], "nowhere is not a bundle"),
    ],
)
def test_the_command_refuses_in_one_line(words: list[str], said: str, capfd: Captured) -> None:
    assert main(words) == 1
    out, err = capfd.readouterr()
    assert not out and err.startswith(f"linvt-check: {said}") and err.count("\n") == 1


def command(blocked: tuple[str, ...], *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that cannot import some packages."""
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); from export.check import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_it_runs_on_a_device_that_has_onnx_alone() -> None:
    done = command(("torch", "transformers", "onnxscript", "onnxruntime", "tensorrt", "cuda", "triton"), "demo")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(": ok, ") == 4 * len(RELEASES)


def test_without_onnx_the_extra_is_named() -> None:
    done = command(("onnx", "onnx_ir"), "demo")
    assert done.returncode == 1
    assert done.stderr == "linvt-check: onnx is not installed; run: pip install 'linvt-edge[tensorrt]'\n"
