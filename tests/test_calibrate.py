"""A float bundle and clips become a quantised bundle that answers as before, by the command and by the function."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from calibration.__main__ import main
from calibration.accuracy import right_answers
from calibration.options import QuantizeOptions
from calibration.parity import cosine
from calibration.progress import Steps
from calibration.quantize import quantized_bundle
from calibration.questions import questions_from
from calibration.report import REPORT, SCALES, Report
from calibration.scales import ScaleTable, encode_table
from calibration.watch import WatchingBackend
from export.demo.glyphs import glyphs
from export.demo.questions import KINDS, ask
from export.demo.scenes import middle_times, random_scene, render
from export.demo.video import write
from runtime.bundle import EVIDENCE, Bundle
from runtime.engine import VideoQA
from runtime.manifest import Manifest
from runtime.run import SAMPLE, SAMPLE_QUESTION
from tests.bundles import forge, replaced
from tests.commands import Captured
from tests.videos import write_video

BLOCKED = ("torch", "transformers", "export", "optimum", "onnxscript", "huggingface_hub", "sklearn", "scipy")
ROOT = Path(__file__).parents[1]
SCENES, LABELLED = 7, 2
ASKED = ("Which digit is red?", "What colour is the number 5?", "How many digits are there?", "Is there a blue digit?")
FAST: dict[str, Any] = {"method": "minmax", "min_cosine": 0.9}
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of the demo's world and its sample, with labelled questions about the scenes."""
    folder = tmp_path_factory.mktemp("clips")
    lines = []
    for index in range(SCENES):
        random = np.random.default_rng([7, index])
        scene = random_scene(random, glyphs("validation"))
        write(folder / f"{index}.mp4", render(scene, glyphs("validation"), middle_times(32), 256), fps=8)
        asked = [question for kind in KINDS if (question := ask(scene, kind, random))]
        if index < LABELLED:
            lines += [{"clip": f"{index}.mp4", "question": found.text, "answer": found.answer} for found in asked]
    (folder / "sample.mp4").write_bytes(SAMPLE.read_bytes())
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def made(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Quantise the demo once per set of options; the bundle must not be changed by a test."""
    done: dict[QuantizeOptions, Path] = {}

    def quantised(**options: Any) -> Path:
        chosen = QuantizeOptions(**options)
        if chosen not in done:
            done[chosen] = quantized_bundle("demo-float", clips, tmp_path_factory.mktemp("made") / "bundle", chosen)
        return done[chosen]

    return quantised


def sample_answers(bundle: Path | str) -> list[str]:
    """Short ones: a description of three digits turns on one of its words."""
    with VideoQA.open(bundle) as qa:
        seen = qa.video(SAMPLE)
        return [qa.ask(seen, question).text for question in ASKED]


def manifest_of(bundle: Path | str) -> Manifest:
    return Bundle.open(bundle).manifest


def table_of(bundle: Path) -> ScaleTable:
    return msgspec.json.decode((bundle / SCALES).read_bytes(), type=ScaleTable)


def report_of(bundle: Path) -> Report:
    return msgspec.json.decode((bundle / REPORT).read_bytes(), type=Report)


def thresholds(bundle: Path) -> dict[str, float]:
    stages = table_of(bundle).stages.items()
    return {f"{stage}/{name}": scale.threshold for stage, found in stages for name, scale in found.tensors.items()}


def contents(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.iterdir()}


def float32_bytes(stage: str) -> int:
    """What the demo's float stage would take with all weights in float32, its graph file included."""
    path = Bundle.open("demo-float").path(f"{stage}.onnx")
    tensors = onnx.load(str(path), load_external_data=False).graph.initializer
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return path.stat().st_size + sum(4 * int(np.prod(one.dims)) for one in tensors if one.data_type in kinds)


def stored_bytes(bundle: Path, stage: str) -> int:
    return sum((bundle / name).stat().st_size for name in (f"{stage}.onnx", f"{stage}.onnx.data"))


def weight_types(bundle: Path, stage: str) -> set[int]:
    """Types of the matrices that MatMul reads, behind DequantizeLinear or not."""
    graph = onnx.load(str(bundle / f"{stage}.onnx"), load_external_data=False).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    weights = [makers.get(node.input[1]) for node in graph.node if node.op_type == "MatMul"]
    return {types[node.input[0]] for node in weights if node is not None and node.input[0] in types}


# --- what comes out


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_quantised_demo_says_what_the_float_demo_says(made: Made, precision: str) -> None:
    assert sample_answers(made(precision=precision)) == sample_answers("demo-float")


@pytest.mark.parametrize(
    ("options", "llm", "largest"),
    [
        ({}, onnx.TensorProto.INT8, 0.30),
        ({"precision": "int4"}, onnx.TensorProto.INT4, 0.17),
        ({"llm": "float", "embedding": "int8"}, onnx.TensorProto.FLOAT16, 0.52),
    ],
)
def test_every_stage_is_stored_as_asked_and_small(
    made: Made, options: dict[str, Any], llm: int, largest: float
) -> None:
    bundle = made(**options)
    for stage in ("vision", "refine", "aggregate", "decode"):
        share = stored_bytes(bundle, stage) / float32_bytes(stage)
        print(f"{stage}: {share:.4f}")
        assert share <= (largest if stage == "decode" else 0.30)
        types = weight_types(bundle, stage)
        if stage == "aggregate":  # one layer reads learned queries alone and is computed while loading
            types.discard(onnx.TensorProto.FLOAT16)
        assert types == {llm if stage == "decode" else onnx.TensorProto.INT8}


def test_the_sizes_that_are_told_are_those_on_disk(made: Made) -> None:
    for stage, spec in manifest_of(made()).stages.items():
        assert spec.quantized is not None
        share = stored_bytes(made(), stage) / float32_bytes(stage)
        assert spec.quantized.size_ratio == pytest.approx(share, abs=6e-5)


def keep_outputs(seen: dict[str, Any], stage: str, feeds: object, outputs: Mapping[str, Any]) -> None:
    seen[stage] = outputs.get("tokens")


def test_tokens_stay_close_on_pictures_that_nothing_was_calibrated_on(made: Made, tmp_path: Path) -> None:
    scene = random_scene(np.random.default_rng(99), glyphs("test"))
    write(tmp_path / "unseen.mp4", render(scene, glyphs("test"), middle_times(32), 256), fps=8)
    found = []
    for path in ("demo-float", made()):
        seen: dict[str, Any] = {}
        found.append(seen)
        bundle = Bundle.open(path)
        look = partial(keep_outputs, seen)
        with VideoQA.over(bundle, WatchingBackend(bundle, {}, look, None)) as qa:
            qa.ask(qa.video(tmp_path / "unseen.mp4"), SAMPLE_QUESTION)
    for stage, least in (("vision", 0.999), ("aggregate", 0.98)):  # refine may select, and so order, others
        near = cosine(found[1][stage], found[0][stage])
        print(f"{stage}: {near:.5f}")
        assert least < near < 1


@pytest.mark.parametrize("options", [{}, {"precision": "int4"}], ids=str)
def test_the_manifest_tells_the_loss_and_lists_the_evidence(made: Made, options: dict[str, Any]) -> None:
    bundle = made(**options)
    manifest, report = manifest_of(bundle), report_of(bundle)
    for stage, spec in manifest.stages.items():
        assert spec.quantized is not None and not spec.quantized.floats
        assert spec.quantized.cosine == pytest.approx(report.stages[stage].loss.cosine, abs=1e-6)
        assert spec.quantized.cosine >= (0.9 if stage == "decode" else 0.999)
        assert (stage == "decode") == (report.stages[stage].loss.agreement is not None)
        assert spec.quantized.layers == report.stages[stage].layers > 10
    assert manifest.files.keys() >= {REPORT, SCALES}
    assert EVIDENCE not in manifest.files  # that of the float bundle
    assert {path.name for path in bundle.iterdir()} == {*manifest.files, "bundle.json"}
    assert manifest.provenance["quantized_from"] == Bundle.open("demo-float").identity
    assert manifest.provenance.items() >= manifest_of("demo-float").provenance.items()
    with VideoQA.open(bundle, verify=True) as qa:
        assert qa.bundle.manifest.prompt == manifest_of("demo-float").prompt


def test_the_report_says_which_clips_calibrated_and_which_measured(made: Made) -> None:
    report, table = report_of(made()), table_of(made())
    calibrated = [clip.name for clip in table.clips]
    assert len(report.measured_on) == 2 and not set(calibrated) & set(report.measured_on) and report.held_out
    assert len({*calibrated, *report.measured_on}) == SCENES + 1 == report.calibrated_on + 2
    assert report.skipped == {} and report.accuracy is None
    assert all(clip.frames == manifest_of("demo-float").frames.default for clip in table.clips)
    assert report.source == Bundle.open("demo-float").identity


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
def test_a_method_that_is_asked_for_chooses_every_threshold(made: Made, method: str) -> None:
    bundle = made(**FAST) if method == "minmax" else made(method=method, llm="float", min_cosine=0.9)
    scales = [scale for stage in table_of(bundle).stages.values() for scale in stage.tensors.values()]
    assert {scale.method for scale in scales} == {method}
    clipped = [scale for scale in scales if not scale.smooth and scale.threshold < scale.largest]
    assert bool(clipped) == (method != "minmax")
    assert sample_answers(bundle)


def test_an_embedding_table_in_8_bits_and_a_float_llm(made: Made) -> None:
    bundle, source = made(llm="float", embedding="int8"), Bundle.open("demo-float")
    name = "embedding.safetensors"
    assert (bundle / name).stat().st_size < 0.55 * source.path(name).stat().st_size
    assert manifest_of(bundle).stages["decode"] == source.manifest.stages["decode"]
    for file in ("decode.onnx", "decode.onnx.data", "decode.opset23.onnx"):
        assert (bundle / file).read_bytes() == source.path(file).read_bytes()
    assert sample_answers(bundle) == sample_answers("demo-float")


def test_the_float_bundle_is_left_as_it_was(made: Made) -> None:
    made()
    with VideoQA.open("demo-float", verify=True) as qa:
        assert all(stage.quantized is None for stage in qa.bundle.manifest.stages.values())


# --- the same again


def test_a_second_run_writes_the_same_bytes(made: Made, clips: Path, tmp_path: Path) -> None:
    again = quantized_bundle("demo-float", clips, tmp_path / "again", QuantizeOptions(**FAST))
    first, second = contents(made(**FAST)), contents(again)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_thresholds_do_not_depend_on_the_number_of_threads(made: Made) -> None:
    first, second = (thresholds(made(**FAST, threads=n)) for n in (None, 1))
    assert first == pytest.approx(second, rel=1e-4)


def test_a_table_gives_its_graphs_again_and_an_edit_of_it_shows(made: Made, clips: Path, tmp_path: Path) -> None:
    table = table_of(made())
    name = next(name for name, scale in table.stages["vision"].tensors.items() if not scale.smooth)
    edited = msgspec.structs.replace(table.stages["vision"].tensors[name], threshold=12.7, method="by hand")
    table.stages["vision"].tensors[name] = edited
    (tmp_path / "table.json").write_bytes(encode_table(table))
    options = QuantizeOptions(method="minmax", scales=tmp_path / "table.json", min_cosine=0)
    again = quantized_bundle("demo-float", clips, tmp_path / "again", options)
    first, second = contents(made()), contents(again)
    differing = {file for file in first if ".onnx" in file and first[file] != second[file]}
    assert differing == {"vision.onnx", "vision.opset23.onnx"}
    scales = {tensor.name: tensor for tensor in onnx.load(str(again / "vision.onnx")).graph.initializer}
    assert onnx.numpy_helper.to_array(scales[f"{name}.scale"]) == np.float32(0.1)
    found = table_of(again).stages
    assert found["vision"].tensors[name].error > edited.error  # of what the edit makes of it
    found["vision"].tensors[name] = edited
    assert found == table.stages


# --- labelled answers


def test_answers_are_counted_as_a_user_would_get_them(made: Made, clips: Path) -> None:
    questions = clips / "questions.jsonl"
    bundle = made(**FAST, llm="float", questions=questions, max_drop=50.0)
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    right = []
    for path in ("demo-float", bundle):
        with VideoQA.open(path) as qa:
            seen = {name: qa.video(clips / name) for name in {line["clip"] for line in lines}}
            told = [qa.ask(seen[line["clip"]], line["question"]).text for line in lines]
        right.append(sum(answer == line["answer"] for answer, line in zip(told, lines, strict=True)))
    accuracy = report_of(bundle).accuracy
    assert accuracy is not None
    print(accuracy)
    assert [accuracy.asked, accuracy.right_float, accuracy.right_quantized] == [len(lines), *right]
    assert right[0] > len(lines) / 2


def test_a_bundle_that_draws_its_answers_is_compared_by_the_likeliest(clips: Path, tmp_path: Path) -> None:
    drawing = replaced("generation", {"do_sample": True, "temperature": 50.0, "max_new_tokens": 24})
    bundle = forge(Bundle.open("demo-float").folder, tmp_path / "bundle", edit=drawing)
    labelled = questions_from(clips / "questions.jsonl").labelled[:12]
    right = []
    for path in ("demo-float", bundle):
        with VideoQA.open(path) as qa:
            paths = {f"{index}.mp4": clips / f"{index}.mp4" for index in range(SCENES)}
            right.append(right_answers(qa, paths, labelled, None, lambda step: None))
    assert right[0] == right[1] and any(right[0])


# --- the command


def test_the_command_runs_without_torch_and_says_each_step_once(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(8):
        write_video(folder / f"clip-{number}.mp4", frames=8 + number, size=(64, 64))
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({BLOCKED})); from calibration.__main__ import main;"
        "sys.exit(main(sys.argv[1:]))"
    )
    options = ["--llm", "float", "--method", "minmax", "--min-cosine", "0.9", "--threads", "1"]
    words = [sys.executable, "-c", code, "demo-float", str(folder), "-o", str(tmp_path / "out"), *options]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    lines = done.stderr.splitlines()
    steps = [line.removeprefix("calibrate: ")[:18].strip() for line in lines if line.startswith("calibrate: ")]
    assert len(steps) == len(set(steps)) and {"clips", "clips held out", "choose vision", "measure refine"} <= {*steps}
    assert [line.split(":")[0] for line in lines if not line.startswith("calibrate: ")] == [
        "scales rest on 6 clips; 32 or more of the kind you will ask about are better",
        "vision",
        "refine",
        "aggregate",
        f"wrote {tmp_path / 'out'}",
    ]
    assert lines[-1].startswith("wrote ")
    assert "\r" not in done.stderr and "clip-" not in done.stderr
    assert sample_answers(tmp_path / "out")


def test_force_replaces_a_bundle_even_the_float_one_itself(made: Made, clips: Path, tmp_path: Path) -> None:
    target = forge(Bundle.open("demo-float").folder, tmp_path / "bundle")
    options = ["--llm", "float", "--method", "minmax", "--min-cosine", "0.9", "--force"]
    assert main([str(target), str(clips / "sample.mp4"), "-o", str(target), *options]) == 0
    assert manifest_of(target).stages["vision"].quantized
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert report_of(target).held_out is False  # a single clip does both


def test_help_fits_a_terminal(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0 and max(map(len, text.splitlines())) <= 80


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_how_far_a_step_is_and_no_control_characters_of_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Steps("calibrate") as steps:
        steps.begin("clips: 1/2 \x1b[31mred.mp4")
        steps.begin("clips: 2/2 b.mp4")
        steps.say("skipped \x1b[2J\n.mp4")
    text = terminal.getvalue()
    assert "calibrate: clips: 2/2 b.mp4" in text and "\\x1b[31mred.mp4" in text and "\\x1b[2J\\n.mp4" in text
    assert "\x1b[31m" not in text and "\x1b[2J" not in text
    assert text.count(" s   peak ") == 1


def test_a_closed_stderr_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with Steps("calibrate") as steps:
        steps.begin("clips")
        steps.say("a line")
    assert steps.step is None
