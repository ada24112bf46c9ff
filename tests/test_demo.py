"""The bundled demo answers its sample rightly, is small, proven, and answers about videos it never saw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from export.compare import main as compare
from export.demo.film import film
from export.demo.glyphs import glyphs
from export.demo.questions import ask
from export.demo.sample import QUESTIONS
from export.demo.scenes import random_scene
from runtime import VideoQA
from runtime.bundle import DEMOS, Bundle
from runtime.inspect_bundle import read_evidence
from runtime.run import SAMPLE, SAMPLE_QUESTION, main
from tests.test_light import answered_without_heavy_packages

CHECKPOINT = Path(__file__).parent.parent / "export" / "demo" / "linvt-internvl2-demo"
KINDS = ("colour", "digit", "count", "motion")
SCENES = 12


def test_without_arguments_it_answers_rightly_about_its_sample(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    output, errors = capsys.readouterr()
    assert output.strip() == QUESTIONS["What happens in the video?"]
    assert SAMPLE_QUESTION in errors
    assert "first token" in errors


@pytest.mark.parametrize("bundle", DEMOS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_sample_s_other_questions_are_answered_rightly(
    question: str, bundle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([bundle, str(SAMPLE), question, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == QUESTIONS[question]


def test_the_demo_answers_where_torch_transformers_and_onnx_cannot_be_imported() -> None:
    assert answered_without_heavy_packages("demo", str(SAMPLE), "How many digits are there?") == "3"


def test_bundles_and_sample_stay_small() -> None:
    sizes = {}
    for name in DEMOS:
        files = Bundle.open(name, verify=True).manifest.files
        sizes[name] = sum(spec.size for spec in files.values())
    assert sizes["demo"] <= 5_000_000 < sizes["demo-float"] <= 10_000_000
    assert SAMPLE.stat().st_size <= 200_000


def test_the_demo_is_the_float_one_quantised() -> None:
    manifest, source = (Bundle.open(name) for name in DEMOS)
    assert manifest.manifest.provenance["quantized_from"] == source.identity
    for stage, spec in manifest.manifest.stages.items():
        assert spec.quantized and (spec.quantized.weights, spec.quantized.floats) == ("int8", ()), stage
        assert spec.quantized.cosine >= (0.99 if stage == "decode" else 0.999)
        assert spec.quantized.size_ratio <= 0.3


@pytest.mark.parametrize("name", DEMOS)
def test_the_bundles_carry_the_proof_that_they_are_the_checkpoint_s(name: str) -> None:
    bundle = Bundle.open(name)
    evidence = read_evidence(bundle)
    assert evidence is not None
    assert evidence["passed"]
    assert evidence["bundle"] == bundle.identity


@pytest.mark.parametrize("name", DEMOS)
def test_the_shipped_checkpoint_is_the_bundles_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    question = "What colour is the 8?"
    assert compare([name, str(CHECKPOINT), "--video", str(SAMPLE), "--question", question, "--no-evidence"]) == 0
    assert "agrees with PyTorch" in capsys.readouterr().out


@pytest.mark.parametrize("name", DEMOS)
def test_it_answers_most_questions_about_drawings_it_never_saw(name: str, random: np.random.Generator) -> None:
    """A small sample of what ``export.demo.evaluate`` measures; chance is below a third."""
    right = asked = 0
    with VideoQA.open(name) as qa:
        for _ in range(SCENES):
            scene = random_scene(random, glyphs("test"))
            video = qa.video(film(scene, glyphs("test")), frames=8)
            for kind in KINDS:
                if question := ask(scene, kind, random):
                    asked += 1
                    right += qa.ask(video, question.text).text == question.answer
    print(f"{right} of {asked} right")
    assert right >= 0.7 * asked
