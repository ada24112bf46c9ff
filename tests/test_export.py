"""The export command writes the same bundle every time or refuses in one line, and leaves nothing half done."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import pytest
from safetensors.torch import load_file, save_file

from export import convert
from export.__main__ import main
from export.convert import ExportOptions, bundle_from_checkpoint
from export.stages import Stage
from runtime.bundle import Bundle
from runtime.engine import VideoQA
from runtime.options import GenerationOptions
from tests.conftest import GOLDEN
from tests.videos import write_video

ROOT = Path(__file__).parents[1]
WITH_LINVT, PLAIN = "linvt-internvl2-a", "internvl2-qwen2-a"


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch, linvt_bundle: Path) -> None:
    """Export as always, but take each graph from the bundle that was traced before."""

    def loaded(stage: Stage) -> ir.Model:
        return ir.load(linvt_bundle / f"{stage.name}.onnx")

    monkeypatch.setattr(convert, "onnx_from_stage", loaded)


# --- the command


def test_the_command_writes_the_same_bytes_and_only_its_steps(linvt_bundle: Path, tmp_path: Path) -> None:
    """In a process of its own, from a sharded copy, into a folder with an odd name."""
    checkpoint = tmp_path / WITH_LINVT
    shutil.copytree(GOLDEN / WITH_LINVT, checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(tensors)
    for file, part in {"a.safetensors": names[::2], "b.safetensors": names[1::2]}.items():
        save_file({name: tensors[name] for name in part}, checkpoint / file)
    done = subprocess.run(
        [sys.executable, "-m", "export", str(checkpoint), "-o", str(tmp_path / "ein Bündel 🎬") + "/"],
        cwd=ROOT,
        env=os.environ | {"PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0 and done.stdout == ""
    steps = [line.split()[1] for line in done.stderr.splitlines()[:-1]]
    assert steps == ["checkpoint", "vision", "refine", "aggregate", "decode", "embedding", "manifest"]
    assert done.stderr.splitlines()[-1].startswith("wrote ")
    written = tmp_path / "ein Bündel 🎬"
    assert sorted(path.name for path in written.iterdir()) == sorted(path.name for path in linvt_bundle.iterdir())
    for path in written.iterdir():
        assert path.read_bytes() == (linvt_bundle / path.name).read_bytes(), path.name


@pytest.mark.usefixtures("untraced")
def test_linvt_weights_of_their_own_make_the_same_graphs(tmp_path: Path, linvt_bundle: Path) -> None:
    tensors = load_file(GOLDEN / WITH_LINVT / "model.safetensors")
    linvt = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("linVT.", "query_tokens"))}
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / WITH_LINVT, checkpoint)
    save_file(tensors, checkpoint / "model.safetensors")
    save_file(linvt, tmp_path / "linvt.safetensors")
    assert main([str(checkpoint), "-o", str(tmp_path / "b"), "--linvt", str(tmp_path / "linvt.safetensors")]) == 0
    manifests = [Bundle.open(bundle).manifest for bundle in (tmp_path / "b", linvt_bundle)]
    assert manifests[0].linvt == manifests[1].linvt
    assert manifests[0].provenance["linvt"] == "linvt.safetensors"


@pytest.mark.usefixtures("untraced")
def test_options_reach_the_manifest(tmp_path: Path) -> None:
    options = ["--frames", "7", "--layout", "training", "--text-input", "released_slice"]
    assert main([str(GOLDEN / WITH_LINVT), "-o", str(tmp_path / "b"), *options]) == 0
    manifest = Bundle.open(tmp_path / "b").manifest
    assert (manifest.frames.minimum, manifest.frames.default, manifest.prompt.text_input) == (3, 7, "released_slice")
    assert "loop.last" in (tmp_path / "b" / "chat_template.jinja").read_text()


REFUSED = {
    "unknown checkpoint": (["no-such-folder", "-o", "b"], 1, "is not a checkpoint"),
    "no output": ([WITH_LINVT], 2, "--output"),
    "odd layout": ([WITH_LINVT, "-o", "b", "--layout", "sideways"], 2, "--layout"),
    "frames": ([WITH_LINVT, "-o", "b", "--frames", "1"], 1, "--frames 1 is outside what the model takes: 3 to 512"),
    "frames in words": ([WITH_LINVT, "-o", "b", "--frames", "many"], 2, "--frames"),
    "no linvt": ([PLAIN, "-o", "b"], 1, "give --linvt WEIGHTS, or --linvt none"),
    "other linvt": ([PLAIN, "-o", "b", "--linvt", f"{WITH_LINVT}/model.safetensors"], 1, "belong to another LLM"),
    "existing": ([WITH_LINVT, "-o", "taken"], 1, "exists; choose another --output or give --force"),
    "not a bundle": ([WITH_LINVT, "-o", "taken", "--force"], 1, "is not a bundle"),
    "below a file": ([WITH_LINVT, "-o", "taken/file/b"], 1, "cannot write"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_line_and_a_code(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, code, reason = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    for name in (WITH_LINVT, PLAIN):
        Path(name).symlink_to(GOLDEN / name)
    Path("taken").mkdir()
    Path("taken/file").touch()
    before = sorted(tmp_path.iterdir())
    try:
        found = main(arguments)
    except SystemExit as end:
        found = end.code  # type: ignore[assignment]
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("export: ")]
    assert found == code and out == ""
    assert len(lines) == 1 and lines[0].startswith("linvt-export: ") and reason in lines[0]
    assert err.splitlines()[-1] == lines[0]
    assert sorted(tmp_path.iterdir()) == before


STEPS = ("checkpoint", "vision", "refine", "aggregate", "decode", "embedding", "manifest")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--precision", "int8"], "need --calibration CLIPS"),
        (["--calibration", "{clips}"], "nothing else takes it; found --precision float with"),
        (["--llm", "int4"], "--llm is for quantisation; give --precision int8 or int4 with it"),
        (["--block-size", "32"], "--block-size is for quantisation"),
        (["--precision", "int8", "--calibration", "{clips}/none"], "there is no such file"),
        (["--precision", "int8", "--calibration", "{clips}", "--max-drop", "1"], "--max-drop needs labelled questions"),
        (["--precision", "int4", "--calibration", "{clips}", "--dtype", "bfloat16"], "cannot compute in bfloat16"),
        (["--precision", "int4", "--calibration", "{clips}", "--dtype", "float16"], "where float16 is asked for"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_quantisation_needs_is_refused_before_anything_is_exported(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    write_video(clips / "one.mp4")
    given = [argument.format(clips=clips) for argument in arguments]
    assert main([str(GOLDEN / "linvt-internvl2-a"), "-o", str(tmp_path / "out"), *given]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("linvt-export: ") and said in line
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]


def test_a_checkpoint_becomes_a_quantised_bundle_in_one_go(
    linvt_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(2):
        write_video(clips / f"{number}.mp4")
    words = ["--precision", "int4", "--calibration", str(clips), "--min-cosine", "0", "--method", "minmax"]
    assert main([str(GOLDEN / "linvt-internvl2-a"), "-o", str(tmp_path / "out"), *words]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"wrote {tmp_path / 'out'}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "out"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    manifest = Bundle.open(tmp_path / "out").manifest
    assert manifest.provenance["quantized_from"] == Bundle.open(linvt_bundle).identity
    weights = {stage: spec.quantized and spec.quantized.weights for stage, spec in manifest.stages.items()}
    assert weights == {"vision": "int8", "refine": "int8", "aggregate": "int8", "decode": "int4"}
    with VideoQA.open(tmp_path / "out") as qa:
        assert qa.ask(clips / "0.mp4", "What happens?", GenerationOptions(max_new_tokens=2)).token_ids


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_an_interruption_at_any_step_leaves_what_was_there(
    step: str, force: bool, tmp_path: Path, linvt_bundle: Path
) -> None:
    target = tmp_path / "bundle"
    if force:
        shutil.copytree(linvt_bundle, target)
    before = {path: path.read_bytes() for path in target.rglob("*")}

    def interrupt(begun: str) -> None:
        if begun == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundle_from_checkpoint(ExportOptions(str(GOLDEN / WITH_LINVT), target, force=force), interrupt)
    assert {path: path.read_bytes() for path in target.rglob("*")} == before
    assert list(tmp_path.iterdir()) == ([target] if force else [])


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 100 kB: every graph's weights are larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("untraced", "small_disk")
def test_a_disk_that_is_full_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN / WITH_LINVT), "-o", str(tmp_path / "b")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"linvt-export: cannot write {tmp_path / 'b'}: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("untraced")
def test_an_embedding_table_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors import SafetensorError

    def full(*arguments: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(convert, "save_file", full)
    assert main([str(GOLDEN / WITH_LINVT), "-o", str(tmp_path / "b")]) == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


# --- optimum-cli


def optimum_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """Run ``optimum-cli`` with our register file in the place where optimum looks for such files."""
    optimum = pytest.importorskip("optimum.commands.optimum_cli")
    from export.optimum_command import REGISTER_COMMANDS

    monkeypatch.setattr(optimum, "load_optimum_namespace_cli_commands", lambda: REGISTER_COMMANDS)
    monkeypatch.setattr(sys, "argv", ["optimum-cli", *arguments])
    try:
        optimum.main()
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.usefixtures("untraced")
def test_optimum_lists_and_runs_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], linvt_bundle: Path
) -> None:
    assert optimum_cli(monkeypatch, "export", "--help") == 0
    assert "linvt" in capsys.readouterr().out
    arguments = ("export", "linvt", "--model", str(GOLDEN / WITH_LINVT), str(tmp_path / "b"))
    assert optimum_cli(monkeypatch, *arguments) == 0
    assert (tmp_path / "b" / "bundle.json").read_bytes() == (linvt_bundle / "bundle.json").read_bytes()
    capsys.readouterr()
    assert optimum_cli(monkeypatch, *arguments) == 1
    assert [line[:21] for line in capsys.readouterr().err.splitlines()] == [f"linvt-export: {tmp_path}"[:21]]


def test_the_wheel_puts_the_register_file_where_optimum_looks() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '"export/optimum_command.py" = "optimum/commands/register/register_linvt.py"' in text
