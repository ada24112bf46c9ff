"""``python -m export.build`` makes engines of every stage, for every TensorRT, and only those that are not there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

import export.build
from runtime.bundle import DEMOS, Bundle, bundle_path
from runtime.engines import (
    EngineRecord,
    Target,
    check_contents,
    engine_folder,
    find_engines,
    platform_name,
    read_record,
)
from tests.bundles import forge
from tests.commands import refused
from tests.trt.bindings import VERSIONS
from tests.trt.double import Double

Captured = pytest.CaptureFixture[str]
STAGES = ("vision", "refine", "aggregate", "decode")
OLDEST, NEWEST = VERSIONS[0], VERSIONS[-1]


@pytest.fixture(params=DEMOS)
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the demo, once in INT8 and once in float."""
    return Path(shutil.copytree(bundle_path(request.param), tmp_path / "bundle"))


@pytest.fixture
def float_bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_path("demo-float"), tmp_path / "bundle"))


def built(bundle: Path, *options: str, code: int = 0) -> None:
    assert export.build.main([str(bundle), *options]) == code


def lines(capfd: Captured) -> list[str]:
    output, errors = capfd.readouterr()
    assert output == ""
    return errors.splitlines()


def target(version: str, sm: tuple[int, int] = (8, 7), name: str = "Orin") -> Target:
    return Target(gpu=name, sm=sm, processors=8, tensorrt=version, platform=platform_name(), cuda=(12, 6))


def records(bundle: Path, version: str) -> dict[str, EngineRecord]:
    return find_engines(Bundle.open(bundle), target(version))


def folder(bundle: Path, version: str) -> Path:
    return engine_folder(Bundle.open(bundle), target(version))


def stamps(bundle: Path, version: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder(bundle, version).glob("*.engine")}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_stage_is_built_and_the_second_time_nothing_is(bundle: Path, version: str, capfd: Captured) -> None:
    with Double(version=version) as double:
        built(bundle)
        assert len(double.builds) == len(STAGES)
        first = [line.split(":")[0] for line in lines(capfd) if " built in " in line]
        built(bundle)
        assert len(double.builds) == len(STAGES)
        assert [line for line in lines(capfd) if line.endswith("up to date")] == [f"{s}: up to date" for s in STAGES]
        assert double.leaks() == []
    assert first == list(STAGES)
    found = records(bundle, version)
    for stage in STAGES:
        check_contents(folder(bundle, version) / f"{stage}.engine", found[stage])
    names = {path.name for path in folder(bundle, version).iterdir()}
    files = {*(f"{stage}.{kind}" for stage in STAGES for kind in ("engine", "json")), "timing.cache"}
    assert names == (files | {"ptx"} if version == OLDEST else files)


@pytest.mark.parametrize("version", VERSIONS)
def test_records_hold_tensors_profiles_and_target(float_bundle: Path, version: str) -> None:
    with Double(version=version) as double:
        built(float_bundle, "--max", "batch=8,tokens=300", "--max", "frames=16,text=40", "--opt", "frames=8")
        engines = {network.inputs[0].name: config for network, config, _ in double.builds}
        assert len(engines["inputs_embeds"].profiles) == 2
        in_place = hasattr(double.trt.ICudaEngine, "get_aliased_input_tensor")
    found = records(float_bundle, version)
    manifest = Bundle.open(float_bundle).manifest
    for stage, record in found.items():
        spec = manifest.stages[stage]
        assert {(t.name, t.dtype) for t in record.inputs} == {(t.name, t.dtype) for t in spec.inputs}
        assert {(t.name, t.dtype) for t in record.outputs} == {(t.name, t.dtype) for t in spec.outputs}
        assert record.device_memory > 0
        assert all(set(profile) == {t.name for t in spec.inputs} for profile in record.profiles)
    assert found["vision"].profiles[0]["pixel_values"].most == (8, 3, 64, 64)
    tokens = found["refine"].profiles[0]["tokens"]
    assert (tokens.least[1], tokens.best[1], tokens.most[1]) == (3, 8, 16)
    assert found["aggregate"].profiles[0]["text"].most == (1, 40, 160)
    prefill, step = found["decode"].profiles
    assert prefill["inputs_embeds"].most == (1, 300, 160) and prefill["position_ids"].most == (1, 300)
    assert step["inputs_embeds"].least == step["inputs_embeds"].most == (1, 1, 160)
    for profile in (prefill, step):
        cache = profile["past_value.3"]
        assert (cache.least[2], cache.most[2]) == (300 if in_place else 1, 300)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_another_option_another_graph_or_another_device_builds_again(
    float_bundle: Path, tmp_path: Path, version: str, capfd: Captured
) -> None:
    with Double(version=version) as double:
        built(float_bundle)
        for options, stages in (
            (["--max", "tokens=200"], ["decode"]),
            (["--max", "tokens=200", "--max", "frames=9"], ["refine"]),
            (["--workspace", "32", "--max", "tokens=200,frames=9"], list(STAGES)),
            (["--workspace", "32", "--max", "tokens=200,frames=9", "--optimization-level", "1"], list(STAGES)),
        ):
            capfd.readouterr()
            built(float_bundle, *options)
            assert [line.split(":")[0] for line in lines(capfd) if " built in " in line] == stages
        config = double.builds[-1][1]
        assert config.pools["WORKSPACE"] == 32 << 20 and config.builder_optimization_level == 1
        assert 0 < config.pools["TACTIC_DRAM"] <= 8 << 30
        before = len(double.builds)
        built(float_bundle, *options, "--force", "--stages", "vision")
        assert len(double.builds) == before + 1
    with Double(version=version, sm=(8, 9), name="NVIDIA GeForce RTX 4090", integrated=False) as other:
        built(float_bundle)
        assert len(other.builds) == len(STAGES)
        assert "TACTIC_DRAM" not in other.builds[-1][1].pools
    names = {path.name for path in (float_bundle / "engines").iterdir()}
    assert names == {f"orin-sm87-trt{version}", f"geforce-rtx-4090-sm89-trt{version}"}
    shutil.copytree(float_bundle / "engines", tmp_path / "moved" / "engines")
    requantised = shutil.copytree(bundle_path("demo"), tmp_path / "moved", dirs_exist_ok=True)
    with Double(version=version) as double:
        built(Path(requantised), *options)
        assert len(double.builds) == len(STAGES)


def test_engines_of_another_tensorrt_stay_beside(float_bundle: Path) -> None:
    for version in (OLDEST, NEWEST):
        with Double(version=version):
            built(float_bundle)
    assert records(float_bundle, OLDEST) and records(float_bundle, NEWEST)


def test_the_plugin_is_in_the_refine_engine_alone_and_can_be_left_out(float_bundle: Path, capfd: Captured) -> None:
    kinds = {}
    for version in VERSIONS:
        with Double(version=version) as double:
            built(float_bundle, "--stages", "vision", "refine")
            vision, refine = (read_record(folder(float_bundle, version) / f"{s}.json") for s in ("vision", "refine"))
            assert vision.plugin is None and refine.plugin is not None
            kinds[version] = refine.plugin.kind
            inside = [plan.plugins for _, _, plan in double.builds if plan.plugins]
            assert len(inside) == len(inside[0]) == 1
            assert "GatherPool" in str(inside[0][0]) and f"'{kinds[version]}'" in str(inside[0][0])
            built(float_bundle, "--no-plugin", "--stages", "vision", "refine")
            assert len(double.builds) == 3  # refine again
            assert read_record(folder(float_bundle, version) / "refine.json").plugin is None
    assert kinds == {VERSIONS[0]: "v3", **dict.fromkeys(VERSIONS[1:], "aot")}


def test_networks_are_strongly_typed_and_compiled_plugins_come_first_where_that_can_be_said(float_bundle: Path) -> None:
    for version in VERSIONS:
        with Double(version=version) as double:
            built(float_bundle, "--stages", "refine")
            flags = double.trt.NetworkDefinitionCreationFlag
            network, config, _ = double.builds[0]
            assert network.get_flag(flags.STRONGLY_TYPED)
            if hasattr(flags, "PREFER_AOT_PYTHON_PLUGINS"):
                assert network.get_flag(flags.PREFER_AOT_PYTHON_PLUGINS)
            assert config.flags == 0  # float32 is float32
            built(float_bundle, "--stages", "refine", "--tf32")
            assert double.builds[1][1].flags == 1 << double.trt.BuilderFlag.TF32.value


@pytest.mark.parametrize("version", VERSIONS)
def test_attention_that_no_fused_kernel_fits_is_built_of_single_layers(float_bundle: Path, version: str) -> None:
    with Double(version) as double:
        double.fuses_attention = False
        built(float_bundle)


def test_a_bundle_without_linvt_has_two_engines(plain_bundle: Path, tmp_path: Path, capfd: Captured) -> None:
    bundle = Path(shutil.copytree(plain_bundle, tmp_path / "bundle"))
    with Double(version=OLDEST) as double:
        built(bundle)
        assert len(double.builds) == 2
    assert set(records(bundle, OLDEST)) == {"vision", "decode"}


@pytest.mark.parametrize("shared", [False, True], ids=["beside the engines", "of one's own"])
def test_measured_tactics_are_kept_and_added_to(float_bundle: Path, tmp_path: Path, shared: bool) -> None:
    file = tmp_path / "caches" / "mine.cache" if shared else folder(float_bundle, OLDEST) / "timing.cache"
    options = ["--timing-cache", str(file)] if shared else []
    with Double(version=OLDEST) as double:
        built(float_bundle, "--stages", "vision", *options)
        first = file.read_bytes()
        built(float_bundle, "--stages", "decode", *options)
        both = file.read_bytes()
        assert set(first.split(b"\n")) < set(both.split(b"\n"))
        given = [call.arguments for call in double.calls if call.name == "IBuilderConfig.set_timing_cache"]
        assert given and not any(arguments["ignore_mismatch"] for arguments in given)


@pytest.mark.parametrize("content", ["garbage", "of another device"])
def test_a_timing_cache_that_is_none_is_noted_and_replaced(
    float_bundle: Path, tmp_path: Path, content: str, capfd: Captured
) -> None:
    file = tmp_path / "my.cache"
    if content == "garbage":
        file.write_bytes(b"\0garbage" * 100)
    else:
        with Double(version=OLDEST, sm=(8, 9)):
            built(float_bundle, "--stages", "vision", "--timing-cache", str(file))
    before = file.read_bytes()
    capfd.readouterr()
    with Double(version=OLDEST):
        built(float_bundle, "--stages", "vision", "--timing-cache", str(file))
    notes = [line for line in lines(capfd) if "timing cache" in line]
    assert len(notes) == 1 and "measured again" in notes[0]
    assert file.read_bytes() != before
    with Double(version=OLDEST):
        built(float_bundle, "--stages", "vision", "--timing-cache", str(file), "--force")
    assert not [line for line in lines(capfd) if "timing cache" in line]


def test_what_tensorrt_says_is_shown_when_asked_for(float_bundle: Path, capfd: Captured, tmp_path: Path) -> None:
    garbage = tmp_path / "cache"
    garbage.write_bytes(b"garbage")
    with Double(version=OLDEST):
        built(float_bundle, "--stages", "vision", "--timing-cache", str(garbage), "-v")
    assert any(line.startswith("[TRT] [E] ") for line in lines(capfd))


BLOCKED = ("torch", "transformers", "onnxscript", "onnxruntime", "safetensors", "tqdm", "triton", "sklearn", "scipy")


def alone(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, where none of ``BLOCKED`` can be imported from then on."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({BLOCKED}))\n"
    root = str(Path(__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code.replace("BLOCK", block), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        timeout=120,
    )


def test_building_needs_no_torch_and_no_onnxruntime(float_bundle: Path) -> None:
    code = """
from tests.trt.double import Double
BLOCK
import export.build
with Double(version=sys.argv[1]):
    code = export.build.main(sys.argv[2:])
sys.exit(code)
"""
    done = alone(code, OLDEST, str(float_bundle))
    assert done.returncode == 0, done.stderr
    assert set(records(float_bundle, OLDEST)) == set(STAGES)


def test_a_dry_run_needs_neither_tensorrt_nor_a_gpu_and_writes_nothing(float_bundle: Path) -> None:
    before = sorted(float_bundle.rglob("*"))
    code = """
BLOCK
sys.modules.update(tensorrt=None, cuda=None)
import export.build
sys.exit(export.build.main(sys.argv[1:]))
"""
    done = alone(code, str(float_bundle), "--dry-run", "--tensorrt", "10.3", "--device-memory", "7000")
    assert (done.returncode, done.stderr) == (0, "")
    assert "decode" in done.stdout and "fits into 7000 MiB" in done.stdout
    assert sorted(float_bundle.rglob("*")) == before


@pytest.mark.parametrize(
    ("scales", "options", "said"),
    [
        (None, [], None),
        (None, ["--no-plugin"], None),
        (None, ["--stages", "vision", "decode"], None),
        ([1, 6], [], "refine: no plugin, no compiled kernel has the scales 1,6"),
        ([1] * 9, [], "refine: no plugin, the plugin takes at most 8 scales; found 9"),
        ([1] * 9, ["--stages", "vision"], None),
    ],
    ids=str,
)
def test_a_dry_run_takes_the_plugin_where_a_build_would(
    float_bundle: Path, tmp_path: Path, scales: list[int] | None, options: list[str], said: str | None, capfd: Captured
) -> None:
    bundle = float_bundle if scales is None else forge(float_bundle, tmp_path / "forged", refine__onnx=scaled(scales))
    words = [str(bundle), "--dry-run", "--tensorrt", "10.9", "--device-memory", "7000", *options]
    assert export.build.main(words) == 0
    output, errors = capfd.readouterr()
    assert "fits into 7000 MiB" in output
    assert errors.startswith(said) and errors.count("\n") == 1 if said else errors == ""
    if scales and len(scales) > 8:
        with Double(version=VERSIONS[1]):
            built(bundle, *options)
        assert [line for line in lines(capfd) if "plugin" in line] == ([errors.rstrip()] if said else [])


def scaled(scales: list[int]) -> bytes:
    """The demo's SVR graph with other scales on its node; its body stays."""
    model = onnx.load(bundle_path("demo-float") / "refine.onnx", load_external_data=False)
    (node,) = (node for node in model.graph.node if node.op_type == "GatherPool")
    (attribute,) = (attribute for attribute in node.attribute if attribute.name == "scales")
    attribute.ints[:] = scales
    return bytes(model.SerializeToString())


def test_a_dry_run_refuses_stages_that_are_not_there(float_bundle: Path, capfd: Captured) -> None:
    line = refused(capfd, [str(float_bundle), "--dry-run", "--stages", "llm"], 1, export.build.main)
    assert "--stages names 'llm'" in line


def test_a_record_is_readable_json(float_bundle: Path) -> None:
    with Double(version=OLDEST):
        built(float_bundle, "--stages", "vision")
    record = json.loads((folder(float_bundle, OLDEST) / "vision.json").read_text())
    assert record["target"]["tensorrt"] == OLDEST and record["options"]["workspace"] == "auto"
