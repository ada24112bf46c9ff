"""The loss of a graph against recorded runs of the float one: none for the same graph, and what an altered one does."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from calibration.measure import Examples, Loss, loss_of, measured, worth
from calibration.watch import InMemory, WatchingBackend
from runtime.bundle import Bundle
from runtime.engine import VideoQA
from runtime.options import GenerationOptions

Floats = NDArray[np.float32]

STAGES = ("vision", "refine", "aggregate", "decode")
QUESTIONS = ("Which digit is red?", "How many digits are there?")
STEPS = 6
CLIPS = 2


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open("demo-float")


@pytest.fixture(scope="module")
def recorded_examples(bundle: Bundle) -> Examples:
    """Two clips with two questions each, recorded from the float bundle."""
    examples, random = Examples(8), np.random.default_rng(5)
    outputs = {name: {spec.name for spec in stage.outputs} for name, stage in bundle.manifest.stages.items()}
    backend = WatchingBackend(bundle, {}, examples.look, 1)
    assert {"tokens"} == outputs["vision"]
    with VideoQA.over(bundle, backend) as qa:
        for _ in range(CLIPS):
            seen = qa.video(random.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8))
            for question in QUESTIONS:
                qa.ask(seen, question, GenerationOptions(max_new_tokens=STEPS, do_sample=False))
    return examples


@pytest.fixture
def examples(recorded_examples: Examples) -> Examples:
    """A copy to be changed."""
    return copy.deepcopy(recorded_examples)


def loss(bundle: Bundle, stage: str, examples: Examples) -> Loss:
    """Of the float graph."""
    return measured(stage, [bundle.path(bundle.manifest.stages[stage].file)], examples, bundle.manifest, 1)


# --- the same graph


@pytest.mark.parametrize("stage", STAGES)
def test_a_graph_loses_nothing_against_itself(stage: str, bundle: Bundle, recorded_examples: Examples) -> None:
    found = loss(bundle, stage, recorded_examples)
    print(found)
    assert found.cosine > 1 - 1e-9 and found.mean_cosine > 1 - 1e-9
    assert found.relative < 1e-5
    refine, decode = stage == "refine", stage == "decode"
    assert (found.overlap, found.worth) == ((1.0, 1.0) if refine else (None, None))
    assert found.agreement == (1.0 if decode else None)


def test_every_step_of_every_question_is_recorded(recorded_examples: Examples, bundle: Bundle) -> None:
    sequences = recorded_examples.sequences
    assert len(sequences) == CLIPS * len(QUESTIONS)
    for sequence in sequences:
        prompt, *steps = sequence
        assert len(prompt[0]) > 16 and 1 <= len(steps) < STEPS
        assert all(embeds.shape == (1, bundle.manifest.width) for embeds, _, _ in steps)
        firsts = [int(positions[0, 0]) for _, positions, _ in sequence]
        assert firsts == [0, *range(len(prompt[0]), len(prompt[0]) + len(steps))]
    assert {stage: len(pairs) for stage, pairs in recorded_examples.graphs.items()} == {
        "vision": 4,
        "refine": 2,
        "aggregate": 4,
    }


# --- another result


def test_one_run_that_went_wrong_is_seen_among_many(bundle: Bundle, examples: Examples) -> None:
    tokens = examples.graphs["vision"][2][1]["tokens"]
    tokens *= -1
    found = loss(bundle, "vision", examples)
    assert found.cosine == pytest.approx(-1)
    assert found.mean_cosine == pytest.approx(1 - 2 / len(examples.graphs["vision"]))
    assert found.relative == pytest.approx(2)


@pytest.mark.parametrize("step", [0, 1, -1])
def test_one_step_of_the_llm_that_went_wrong_is_seen_among_many(step: int, bundle: Bundle, examples: Examples) -> None:
    embeds, positions, logits = examples.sequences[-1][step]
    examples.sequences[-1][step] = embeds, positions, -logits
    found = loss(bundle, "decode", examples)
    steps = sum(map(len, examples.sequences))
    assert found.cosine == pytest.approx(-1)
    assert found.agreement == pytest.approx(1 - 1 / steps)


def test_steps_follow_on_one_another(bundle: Bundle, examples: Examples) -> None:
    """Logits of a later step depend on the rows before it."""
    embeds, positions, logits = examples.sequences[0][0]
    examples.sequences[0][0] = np.roll(embeds, 3, axis=0), positions, logits
    first = Examples(1, sequences=[examples.sequences[0][:2]])
    assert loss(bundle, "decode", first).cosine < 0.999
    assert loss(bundle, "decode", Examples(1, sequences=examples.sequences[1:2])).cosine > 1 - 1e-9


def scores_negated(bundle: Bundle) -> InMemory:
    """The refine graph that selects the worst tokens and pools the same values."""
    path = bundle.path("refine.onnx")
    model = onnx.load(path, load_external_data=False)
    (selection,) = (node for node in model.graph.node if "scores" in node.input and node.op_type == "TopK")
    negation = onnx.helper.make_node("Neg", ["scores"], ["scores.negated"])
    model.graph.node.insert([*model.graph.node].index(selection), negation)
    selection.input[0] = "scores.negated"
    return InMemory(model.SerializeToString(), path.parent)


def test_another_selection_is_judged_by_the_float_scores_and_not_by_its_tokens(
    bundle: Bundle, recorded_examples: Examples
) -> None:
    found = measured("refine", [scores_negated(bundle)], recorded_examples, bundle.manifest, 1)
    print(found)
    assert found.cosine > 1 - 1e-9
    assert found.overlap is not None and found.overlap < 0.2
    assert found.worth is not None and found.worth < 0


def test_refined_tokens_that_went_wrong_are_seen(bundle: Bundle, examples: Examples) -> None:
    visual = examples.graphs["refine"][1][1]["visual"]
    visual[:] = np.roll(visual, 1, axis=1)
    found = loss(bundle, "refine", examples)
    assert found.cosine < 0.999 and (found.overlap, found.worth) == (1.0, 1.0)


# --- numbers


def selected(random: np.random.Generator, count: int = 40, top: int = 8) -> tuple[Floats, NDArray[np.int64]]:
    """Scores (count,) and the best of them."""
    scores = random.standard_normal(count).astype(np.float32)
    return scores, np.argsort(-scores)[:top]


def test_the_worth_of_a_selection_is_one_of_the_best_and_zero_of_the_average(random: np.random.Generator) -> None:
    scores, best = selected(random)
    assert worth(scores, best, best) == 1
    assert worth(scores, best[::-1], best) == pytest.approx(1)  # the order is no matter
    assert worth(scores, np.arange(40), best) == pytest.approx(0, abs=1e-6)
    assert worth(scores, np.argsort(scores)[:8], best) < 0


def test_worth_is_the_share_of_the_advantage(random: np.random.Generator) -> None:
    scores, best = selected(random)
    for factor, shift in ((1.0, 0.0), (3.0, 100.0), (1e-3, -5.0)):  # of what the scores are measured in
        chosen = best.copy()
        chosen[0] = np.argsort(-scores)[8]
        moved = (scores * np.float32(factor) + np.float32(shift)).astype(np.float32)
        lost = (moved[best].mean() - moved[chosen].mean()) / (moved[best].mean() - moved.mean())
        assert worth(moved, chosen, best) == pytest.approx(1 - lost, abs=1e-3)


@pytest.mark.parametrize(
    "scores", [np.zeros(20), np.full(20, -3.0), 5 + 1e-6 * np.arange(20)], ids=["0", "same", "near"]
)
def test_of_tied_scores_every_selection_is_worth_the_same(scores: Floats) -> None:
    assert worth(scores.astype(np.float32), np.arange(4), np.arange(16, 20)) == 1


def test_a_selection_of_all_tokens_is_worth_one(random: np.random.Generator) -> None:
    scores, _ = selected(random)
    assert worth(scores, np.arange(40), np.arange(40)) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_give_a_cosine_that_is_none(value: float, random: np.random.Generator) -> None:
    wanted = random.standard_normal((3, 5)).astype(np.float32)
    broken = wanted.copy()
    broken[1, 2] = value
    assert math.isnan(loss_of([(wanted, wanted), (broken, wanted), (wanted, wanted)]).cosine)


def test_zeros_are_like_zeros_and_unlike_anything_else(random: np.random.Generator) -> None:
    zeros, other = np.zeros((2, 3), np.float32), random.standard_normal((2, 3)).astype(np.float32)
    assert loss_of([(zeros, zeros)]) == Loss(cosine=1, mean_cosine=1, relative=0)
    lost = loss_of([(zeros, other)])
    assert lost.cosine == 0
    assert lost.relative == pytest.approx(1)
    assert loss_of([(other, zeros)]).cosine == 0


def test_the_worst_and_the_mean_are_told(random: np.random.Generator) -> None:
    wanted = random.standard_normal((4, 5)).astype(np.float32)
    found = loss_of([(wanted, wanted), (2 * wanted, wanted), (-wanted, wanted)], agreement=0.5)
    assert found.cosine == pytest.approx(-1)
    assert found.mean_cosine == pytest.approx(1 / 3)
    assert found.relative == pytest.approx(2)
    assert found.agreement == 0.5


# --- what is recorded


def numbered(number: int) -> dict[str, NDArray[np.float32]]:
    return {"x": np.full(3, number, np.float32)}


@pytest.mark.parametrize("most", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 16, 17, 100, 1000])
def test_examples_are_few_and_lie_evenly_among_all_runs(most: int, count: int) -> None:
    examples = Examples(most)
    for number in range(count):
        examples.look("vision", numbered(number), numbered(-number))
        examples.look("refine", numbered(number), {})
    kept = [int(feeds["x"][0]) for feeds, _ in examples.graphs.get("vision", [])]
    assert [int(outputs["x"][0]) for _, outputs in examples.graphs.get("vision", [])] == [-number for number in kept]
    assert [int(feeds["x"][0]) for feeds, _ in examples.graphs.get("refine", [])] == kept
    assert min(count, -(-most // 2)) <= len(kept) <= most
    assert kept == list(range(0, count, kept[1] if len(kept) > 1 else max(1, count)))[: len(kept)]
    if len(kept) > 1:
        assert kept[-1] + kept[1] >= count  # to the end


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_sequences_are_as_few_and_whole(most: int, random: np.random.Generator) -> None:
    examples, lengths = Examples(most), random.integers(0, 5, 50)
    for number, length in enumerate(lengths):
        for step in range(length + 1):
            positions = np.array([[step]]) + (np.arange(3)[:, None] if step else 0)
            feeds: dict[str, NDArray[Any]] = {"inputs_embeds": numbered(number)["x"], "position_ids": positions}
            examples.look("decode", feeds, {"logits": numbered(step)["x"]})
            positions[:] = -1  # the caller's own
    assert 1 <= len(examples.sequences) <= most
    numbers = [int(sequence[0][0][0]) for sequence in examples.sequences]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 0 and (most == 1 or numbers[-1] > 25)
    for number, sequence in zip(numbers, examples.sequences, strict=True):
        assert [int(logits[0]) for _, _, logits in sequence] == list(range(lengths[number] + 1))
        assert {int(embeds[0]) for embeds, _, _ in sequence} == {number}
        assert all(positions.min() >= 0 for _, positions, _ in sequence)


def test_few_are_the_first_of_one_stage(recorded_examples: Examples, bundle: Bundle) -> None:
    few = recorded_examples.few("vision", 2)
    assert [*few.graphs] == ["vision"] and len(few.graphs["vision"]) == 2 and len(few.sequences) == 2
    assert few.graphs["vision"][1] is recorded_examples.graphs["vision"][1]
    assert loss(bundle, "vision", few).cosine > 1 - 1e-9
    assert loss(bundle, "decode", recorded_examples.few("decode", 1)).agreement == 1


def test_what_was_recorded_is_not_overwritten_by_later_runs(bundle: Bundle) -> None:
    examples, random = Examples(100), np.random.default_rng(7)
    with VideoQA.over(bundle, WatchingBackend(bundle, {}, examples.look, 1)) as qa:

        def play() -> None:
            seen = qa.video(random.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8))
            qa.ask(seen, QUESTIONS[0], GenerationOptions(max_new_tokens=3, do_sample=False))

        play()
        before = copy.deepcopy((examples.graphs, examples.sequences))
        for _ in range(2):
            play()
    for stage, pairs in before[0].items():
        for old, now in zip(pairs, examples.graphs[stage], strict=False):
            for past, present in zip(old, now, strict=True):
                assert all(np.array_equal(past[name], present[name]) for name in past)
    for step, again in zip(before[1][0], examples.sequences[0], strict=True):
        for number in range(3):
            assert np.array_equal(step[number], again[number])
