"""The bundled demo answers its sample rightly, is small, proven, and answers about videos it never saw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from export.compare import main as compare
from export.demo.evaluate import film
from export.demo.glyphs import glyphs
from export.demo.questions import ask
from export.demo.sample import QUESTIONS
from export.demo.scenes import random_scene
from runtime import VideoQA
from runtime.bundle import Bundle
from runtime.inspect import read_evidence
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


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_sample_s_other_questions_are_answered_rightly(question: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(SAMPLE), question, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == QUESTIONS[question]


def test_the_demo_answers_where_torch_transformers_and_onnx_cannot_be_imported() -> None:
    assert answered_without_heavy_packages("demo", str(SAMPLE), "How many digits are there?") == "3"


def test_bundle_and_sample_stay_small() -> None:
    files = Bundle.open("demo", verify=True).manifest.files
    assert sum(spec.size for spec in files.values()) <= 10_000_000
    assert SAMPLE.stat().st_size <= 200_000


def test_the_bundle_carries_the_proof_that_it_is_its_checkpoint() -> None:
    bundle = Bundle.open("demo")
    evidence = read_evidence(bundle)
    assert evidence is not None
    assert evidence["passed"]
    assert evidence["bundle"] == bundle.identity


def test_the_shipped_checkpoint_is_the_bundle_s(capsys: pytest.CaptureFixture[str]) -> None:
    question = "What colour is the 8?"
    assert compare(["demo", str(CHECKPOINT), "--video", str(SAMPLE), "--question", question, "--no-evidence"]) == 0
    assert "agrees with PyTorch" in capsys.readouterr().out


def test_it_answers_most_questions_about_drawings_it_never_saw(random: np.random.Generator) -> None:
    """A small sample of what ``export.demo.evaluate`` measures; chance is below a third."""
    right = asked = 0
    with VideoQA.open("demo") as qa:
        for _ in range(SCENES):
            scene = random_scene(random, glyphs("test"))
            video = qa.video(film(scene, glyphs("test")), frames=8)
            for kind in KINDS:
                if question := ask(scene, kind, random):
                    asked += 1
                    right += qa.ask(video, question.text).text == question.answer
    print(f"{right} of {asked} right")
    assert right >= 0.7 * asked
