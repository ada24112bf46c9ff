"""The comparison passes what PyTorch says, finds the stage that says something else, and keeps evidence of it."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image
from safetensors.numpy import load_file, save_file

from calibration.parity import Row, Tolerance
from calibration.write import ADVICE
from export import compare, convert
from export.cases import Comparer, Sides, moving_shapes
from export.reference import Reference
from runtime import inspect
from runtime.bundle import Bundle
from runtime.engine import VideoQA
from runtime.options import GenerationOptions
from tests.families import FIXTURES, Fixture

GOLDEN = Path(__file__).parent / "golden"
WITH_LINVT, PLAIN = GOLDEN / "linvt-internvl2-a", GOLDEN / "internvl2-qwen2-a"

OURS = "this project's modules"
SIGLIP = "transformers' SiglipVisionModel and this project's connector"
QWEN2VL = "transformers' Qwen2VLForConditionalGeneration"
MADE_OF = {  # vision and LLM
    "internvl2-qwen2-a": (OURS, "transformers' Qwen2ForCausalLM"),
    "internvl2-internlm2-a": (OURS, "transformers' LlamaForCausalLM"),
    "internvl2-phi3-a": (OURS, "transformers' Phi3ForCausalLM"),
    "qwen2vl-a": (QWEN2VL, QWEN2VL),
    "aquila-a": (SIGLIP, "transformers' Qwen2ForCausalLM"),
    "molmo-a": (OURS, "transformers' Qwen2ForCausalLM"),
    "xgenmm-a": (SIGLIP, "transformers' Phi3ForCausalLM with a bias in its head"),
    "mipha-a": (SIGLIP, "transformers' PhiForCausalLM"),
}
QWEN2VL_PAIRS = ("qwen2vl-a", {"linvt": "none", "image_size": (56, 84), "route": "video"})

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def bundle(linvt_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the LinVT bundle, to be altered."""
    return Path(shutil.copytree(linvt_bundle, tmp_path / "bundle"))


def compared(bundle: Path, checkpoint: Path, *options: str) -> int:
    return compare.main([str(bundle), str(checkpoint), "--tokens", "3", "--frames", "4", *options])


def refusal(captured: Captured, bundle: Path, checkpoint: Path, *options: str) -> str:
    assert compared(bundle, checkpoint, *options) == 1
    lines = captured.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("linvt-compare: ")
    return lines[0]


def alter(bundle: Path, file: str, edit: Callable[[Path], None]) -> None:
    """Change a file, and the manifest so that the bundle still opens."""
    edit(bundle / file)
    manifest = json.loads((bundle / "bundle.json").read_text())
    for name in (file, f"{file}.data"):
        if name in manifest["files"]:
            data = (bundle / name).read_bytes()
            manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def scale_largest_weight(factor: float) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        model = onnx.load(path)
        # Of the largest the last: in LinVT the aggregator's, to which all others are small corrections.
        largest = max(reversed(model.graph.initializer), key=lambda weight: len(weight.raw_data))
        array = numpy_helper.to_array(largest)
        largest.CopyFrom(numpy_helper.from_array((array * np.float32(factor)).astype(array.dtype), largest.name))
        path.with_name(f"{path.name}.data").unlink()
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)

    return edit


def scale_embedding(path: Path) -> None:
    save_file({"embedding": load_file(path)["embedding"] * np.float32(1.1)}, path)


# --- what passes


def test_a_bundle_agrees_with_its_checkpoint_and_says_so(bundle: Path, capsys: Captured) -> None:
    assert compared(bundle, WITH_LINVT) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.splitlines()[-1] == "the bundle agrees with PyTorch in 1 case(s)"
    first, _, _, *rows = out.splitlines()[:-3]
    assert first == (
        "PyTorch is this project's modules for vision, this project's modules for linvt, "
        "transformers' Qwen2ForCausalLM for decode"
    )
    assert [line.split()[0] for line in rows] == [
        *("vision", "refine", "refine", "refine", "refine", "refine", "refine", "embedding"),
        *("aggregate", "aggregate", "decode", "decode", "decode", "decode", "decode"),
    ]
    assert inspect.main([str(bundle)]) == 0
    assert "passed: 1 cases against PyTorch" in capsys.readouterr().out


@pytest.mark.parametrize("fixture", FIXTURES, ids=str)
def test_every_family_agrees_with_the_code_that_is_named(
    fixture: Fixture, export_bundle: Callable[..., Path], tmp_path: Path, random: np.random.Generator, capsys: Captured
) -> None:
    bundle = shutil.copytree(export_bundle(fixture.name, linvt="none", **fixture.options), tmp_path / "bundle")
    question = "What about " + "".join(random.choice([*"abcdefgh ,"], random.integers(1, 60))) + "?"
    seed = str(random.integers(2**31))
    assert compared(bundle, GOLDEN / fixture.name, "--frames", "3", "--seed", seed, "--question", question) == 0
    out, err = capsys.readouterr()
    vision, decode = MADE_OF[fixture.name]
    content = json.loads((bundle / "evidence.json").read_text())
    assert content["reference"] == {"vision": vision, "decode": decode}
    assert err == "" and out.splitlines()[0] == f"PyTorch is {vision} for vision, {decode} for decode"
    assert "refine" not in out and content["passed"]
    assert content["tolerance"] == {"absolute": 1e-4, "relative": 1e-4}


def test_no_evidence_leaves_the_bundle_as_it_was(plain_bundle: Path) -> None:
    assert compared(plain_bundle, PLAIN, "--frames", "2", "--no-evidence") == 0
    assert not (plain_bundle / "evidence.json").exists()


def picture(path: Path, random: np.random.Generator) -> str:
    Image.fromarray(random.integers(0, 256, (50, 70, 3)).astype(np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize(("name", "options"), [("linvt-internvl2-a", {}), QWEN2VL_PAIRS], ids=["linvt", "pairs"])
def test_pictures_are_a_case_of_vision_and_llm(
    name: str,
    options: dict[str, Any],
    export_bundle: Callable[..., Path],
    tmp_path: Path,
    random: np.random.Generator,
    capsys: Captured,
) -> None:
    bundle = export_bundle(name, **options)
    pictures = [picture(tmp_path / f"{name}.png", random) for name in ("one", "two", "three")]
    given = [option for path in pictures for option in ("--image", path)]
    assert (
        compared(bundle, GOLDEN / name, *given, "--no-evidence", "--json", "--question", "A?", "--question", "B?") == 0
    )
    cases = json.loads(capsys.readouterr().out)["cases"]
    assert [(case["kind"], case["source"], case["frames"], case["question"]) for case in cases] == [
        ("image", "one.png, two.png, three.png", 3, question) for question in ("A?", "B?")
    ]
    assert [row["stage"] for row in cases[0]["rows"]] == ["vision", "embedding", *["decode"] * 5]
    greedy = GenerationOptions(max_new_tokens=3, ignore_eos=True, do_sample=False, repetition_penalty=1.0)
    with VideoQA.open(bundle) as qa:
        asked = qa.ask(qa.images(pictures), "A?", greedy)
        answer = qa.prompts.tokenizer.decode(list(asked.token_ids))
    assert cases[0]["answer"] == cases[0]["reference_answer"] == answer


def test_pictures_stand_beside_videos(
    linvt_bundle: Path, tmp_path: Path, random: np.random.Generator, capsys: Captured
) -> None:
    paths = clip(tmp_path / "eins.mp4"), picture(tmp_path / "one.png", random)
    assert compared(linvt_bundle, WITH_LINVT, "--video", paths[0], "--image", paths[1], "--no-evidence") == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if line.endswith("?")]
    assert heads == [f"eins.mp4, 4 frames: {compare.QUESTION}", f"one.png, 1 picture(s): {compare.QUESTION}"]


def clip(path: Path) -> str:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for frame in moving_shapes(12, 3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return str(path)


def test_videos_and_questions_are_crossed_and_json_is_all_that_is_printed(
    bundle: Path, tmp_path: Path, capsys: Captured
) -> None:
    videos = [clip(tmp_path / "eins.mp4"), clip(tmp_path / "zwei.mp4")]
    options = [option for video in videos for option in ("--video", video)]
    assert (
        compared(
            bundle, WITH_LINVT, *options, "--tokens", "1", "--question", "Who?", "--question", "Wo ist 猫?", "--json"
        )
        == 0
    )
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert err == "" and out.count("\n") == 1
    assert [(case["source"], case["question"]) for case in content["cases"]] == [
        (video, question) for video in ("eins.mp4", "zwei.mp4") for question in ("Who?", "Wo ist 猫?")
    ]
    assert content["passed"] and content["first_departure"] is None
    assert content["bundle"] == Bundle.open(bundle).identity
    assert content == json.loads((bundle / "evidence.json").read_text())


# --- what departs


@pytest.mark.parametrize("stage", ["vision", "refine", "aggregate", "decode"])
def test_an_altered_graph_is_named(stage: str, bundle: Path, capsys: Captured) -> None:
    alter(bundle, f"{stage}.onnx", scale_largest_weight(1.5))
    assert compared(bundle, WITH_LINVT, "--atol", "1e-5", "--rtol", "1e-5") == 1
    out, err = capsys.readouterr()
    assert err == "" and f"departs from PyTorch first at {stage}:" in out.splitlines()[-1]
    assert "fed by the reference" in out.splitlines()[-1]
    assert inspect.main([str(bundle)]) == 0
    assert f"FAILED at {stage}" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["vision", "decode"])
@pytest.mark.parametrize(("name", "options"), [("aquila-a", {}), QWEN2VL_PAIRS], ids=["siglip", "qwen2vl"])
def test_an_altered_graph_is_named_where_transformers_is_the_reference(
    name: str, options: dict[str, Any], stage: str, export_bundle: Callable[..., Path], tmp_path: Path, capsys: Captured
) -> None:
    bundle = shutil.copytree(export_bundle(name, **{"linvt": "none", **options}), tmp_path / "bundle")
    alter(bundle, f"{stage}.onnx", scale_largest_weight(1.5))
    assert compared(bundle, GOLDEN / name) == 1
    assert f"departs from PyTorch first at {stage}:" in capsys.readouterr().out.splitlines()[-1]


def test_what_follows_another_selection_is_held_against_the_same_one(
    linvt_bundle: Path, random: np.random.Generator
) -> None:
    """Other tokens make the selection depart, and nothing behind it; PyTorch's answer stays its own."""

    class Careless(Comparer):
        def graph(self, stage: str, **feeds: Any) -> dict[str, Any]:
            found = super().graph(stage, **feeds)
            if stage == "refine":
                found["indices"][0] = np.arange(found["indices"].shape[1])
                found["visual"] = self.reference.pool_at(feeds["tokens"], found["indices"])
            return found

    with VideoQA.open(linvt_bundle) as qa:
        reference = Reference.open(str(WITH_LINVT), None, qa.bundle.manifest)
        comparer = Careless(qa, reference, None, 16)
        case = comparer.case(moving_shapes(5, 0), "Who?", None)
        assert {(row.stage, row.value) for row in case.rows if not row.passed} == {("refine", "indices")}
        first, second = random.standard_normal((2, 9, reference.table.shape[1])).astype(np.float32)
        rows: list[Row] = []
        answers = comparer.answered(Sides(first, second, second), np.arange(9)[None], rows)
        own = comparer.greedy(second, np.arange(9)[None])[1], reference.greedy(first, np.arange(9)[None], 16)[0]
        assert answers == tuple(map(qa.prompts.tokenizer.decode, own))
        assert len(rows) == 4 and all(row.passed for row in rows)


def test_an_altered_embedding_table_is_named(bundle: Path, capsys: Captured) -> None:
    alter(bundle, "embedding.safetensors", scale_embedding)
    assert compared(bundle, WITH_LINVT, "--no-evidence") == 1
    assert "departs from PyTorch first at embedding: rows" in capsys.readouterr().out


def test_tolerances_decide(bundle: Path, capsys: Captured) -> None:
    assert compared(bundle, WITH_LINVT, "--no-evidence", "--atol", "0", "--rtol", "0") == 1
    assert "first at vision" in capsys.readouterr().out
    alter(bundle, "vision.onnx", scale_largest_weight(1.5))
    assert compared(bundle, WITH_LINVT, "--no-evidence", "--atol", "1e9") == 0


def test_every_stage_is_given_what_its_dtype_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """With the decoder in float16 too, whatever is known of the LLM's range."""
    monkeypatch.setattr(convert, "stage_dtype", lambda stage, asked, *_: "float32" if stage == "refine" else asked)
    bundle = convert.bundle_from_checkpoint(
        convert.ExportOptions(str(WITH_LINVT), tmp_path / "bundle", dtype="float16")
    )
    assert compared(bundle, WITH_LINVT) == 0
    content = json.loads((bundle / "evidence.json").read_text())
    assert content["tolerance"] == {"absolute": 2e-2, "relative": 2e-2}
    limits = {(row["stage"], row["value"], row["scope"]): row["limit"] for row in content["cases"][0]["rows"]}
    assert max(limits["refine", "scores", "reference"], limits["embedding", "rows", "reference"]) < 1e-3
    assert min(limits["vision", "tokens", "reference"], limits["refine", "scores", "chain"]) > 2e-2
    assert compare.tolerances(None, 0.0, Bundle.open(bundle).manifest) == (Tolerance(2e-2, 0.0), Tolerance(2e-2, 0.0))
    assert compared(bundle, WITH_LINVT, "--atol", "1e-4", "--rtol", "1e-4", "--no-evidence") == 1
    alter(bundle, "decode.onnx", scale_largest_weight(1.5))
    capsys.readouterr()
    assert compared(bundle, WITH_LINVT) == 1
    assert "departs from PyTorch first at decode:" in capsys.readouterr().out


def test_a_graph_that_yields_nan_departs_and_the_evidence_stays_json(bundle: Path, capsys: Captured) -> None:
    alter(bundle, "vision.onnx", scale_largest_weight(np.nan))
    assert compared(bundle, WITH_LINVT, "--json") == 1
    content = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert not content["passed"] and content["first_departure"] == "vision tokens (reference)"
    assert content["cases"][0]["rows"][0]["max_abs"] is None


def test_evidence_of_another_state_of_the_bundle_does_not_count(bundle: Path, capsys: Captured) -> None:
    assert compared(bundle, WITH_LINVT) == 0
    alter(bundle, "decode.onnx", scale_largest_weight(2.0))
    capsys.readouterr()
    assert inspect.main([str(bundle)]) == 0
    assert "of another state of this bundle; compare again" in capsys.readouterr().out


# --- what is refused


def test_a_bundle_of_another_model_is_refused(linvt_bundle: Path, plain_bundle: Path, capsys: Captured) -> None:
    assert "the bundle is of another model: its linvt is" in refusal(
        capsys, linvt_bundle, WITH_LINVT, "--linvt", "none"
    )
    assert "its vocabulary" not in refusal(capsys, plain_bundle, WITH_LINVT)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--video", "absent.mp4"], "absent.mp4"),
        (["--image", "absent.png"], "absent.png"),
        (["--question", "  "], "question is empty"),
        (["--question", "a <IMG_CONTEXT> b"], "control token"),
        (["--frames", "0"], "frames"),
        (["--frames", "-3"], "frames"),
        (["--frames", "513"], "frames"),
        (["--tokens", "0"], "--tokens must be at least 1"),
        (["--tokens", "40000"], "do not fit into the context of 32768"),
        (["--seed", "-1"], "--seed at least 0"),
        (["--atol", "-1"], "--atol and --rtol must be at least 0"),
        (["--rtol", "nan"], "--atol and --rtol must be at least 0"),
        (["--backend", "cuda"], "cuda"),
    ],
)
def test_an_option_that_does_not_fit_is_one_line(
    options: list[str], reason: str, linvt_bundle: Path, capsys: Captured
) -> None:
    assert reason in refusal(capsys, linvt_bundle, WITH_LINVT, "--no-evidence", *options)


def test_what_is_no_bundle_or_no_checkpoint_is_one_line(linvt_bundle: Path, tmp_path: Path, capsys: Captured) -> None:
    assert "is not a bundle" in refusal(capsys, tmp_path, WITH_LINVT)
    assert "is not a checkpoint" in refusal(capsys, linvt_bundle, tmp_path)


def test_a_bundle_that_cannot_be_written_is_one_line_after_the_result(
    bundle: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: Path, data: bytes) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", closed)
    assert compared(bundle, WITH_LINVT) == 1
    out, err = capsys.readouterr()
    assert "agrees with PyTorch" in out
    assert err == f"linvt-compare: cannot write {bundle / 'evidence.json'}: Permission denied; {ADVICE[errno.EACCES]}\n"
    assert compared(bundle, WITH_LINVT, "--no-evidence") == 0
