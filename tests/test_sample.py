"""Options resolve or are refused with a reason; tokens are chosen as Hugging Face transformers does."""

import dataclasses
import time

import msgspec
import numpy as np
import pytest

from runtime.errors import BackendError, OptionError
from runtime.options import GenerationDefaults, GenerationOptions, Sampling
from runtime.sample import Sampler

DRAWING = {"do_sample": True, "top_k": 0}


def sampling(**changes: object) -> Sampling:
    return GenerationOptions(**changes).resolve(GenerationDefaults())  # type: ignore[arg-type]


def logits_of(size: int, seed: int, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def probabilities_of_transformers(logits: np.ndarray, generated: list[int], chosen: Sampling) -> np.ndarray:
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    processors = hf.LogitsProcessorList()
    if chosen.repetition_penalty != 1.0:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(chosen.repetition_penalty))
    if chosen.temperature != 1.0:
        processors.append(hf.TemperatureLogitsWarper(chosen.temperature))
    if chosen.top_k != 0:
        processors.append(hf.TopKLogitsWarper(chosen.top_k))
    if chosen.top_p < 1.0:
        processors.append(hf.TopPLogitsWarper(chosen.top_p))
    ids = torch.tensor([generated], dtype=torch.long)
    scores = processors(ids, torch.from_numpy(logits.copy())[None])
    return scores.softmax(dim=-1)[0].double().numpy()


def sampler_after(generated: list[int], chosen: Sampling, size: int) -> Sampler:
    """A sampler that has generated exactly ``generated``: each id was the only likely one."""
    sampler = Sampler(chosen)
    for token in generated:
        certain = np.full(size, -1e30, np.float32)
        certain[token] = 1e30
        assert sampler.next(certain) == token
    return sampler


# --- options


def test_what_the_user_leaves_out_comes_from_the_bundle() -> None:
    defaults = GenerationDefaults(do_sample=True, temperature=0.6, max_new_tokens=7)
    resolved = GenerationOptions(temperature=0.3, seed=5).resolve(defaults)
    assert resolved == Sampling(
        max_new_tokens=7,
        do_sample=True,
        temperature=0.3,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        seed=5,
        ignore_eos=False,
    )


def test_false_and_zero_override_as_any_other_value() -> None:
    defaults = GenerationDefaults(do_sample=True, top_k=20)
    resolved = GenerationOptions(do_sample=False, top_k=0).resolve(defaults)
    assert (resolved.do_sample, resolved.top_k) == (False, 0)


def test_defaults_are_those_of_hugging_face() -> None:
    hf = pytest.importorskip("transformers")
    ours, theirs = GenerationDefaults(), hf.GenerationConfig()
    effective = theirs._get_default_generation_params() if theirs.top_k is None else theirs.to_dict()
    for name in ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty"):
        assert getattr(ours, name) == effective[name]


def test_options_and_results_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampling().top_k = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        GenerationDefaults().top_k = 3  # type: ignore[misc]


REFUSED = [
    ("temperature", 0, "above 0"),
    ("temperature", -1.0, "above 0"),
    ("temperature", float("nan"), "finite"),
    ("temperature", float("inf"), "finite"),
    ("temperature", "0.5", "number"),
    ("top_p", 0.0, "above 0"),
    ("top_p", 1.01, "at most 1"),
    ("top_p", float("nan"), "at most 1"),
    ("top_k", -1, "at least 0"),
    ("top_k", 2.5, "integer"),
    ("top_k", True, "integer"),
    ("repetition_penalty", 0.0, "above 0"),
    ("repetition_penalty", float("inf"), "finite"),
    ("max_new_tokens", 0, "at least 1"),
    ("do_sample", 1, "true or false"),
]


@pytest.mark.parametrize(("name", "value", "expected"), REFUSED)
def test_an_option_out_of_range_is_refused_by_name_value_and_range(name: str, value: object, expected: str) -> None:
    with pytest.raises(OptionError) as caught:
        sampling(**{name: value})
    message = str(caught.value)
    assert name in message
    assert repr(value) in message
    assert expected in message
    assert "\n" not in message
    with pytest.raises(ValueError, match=name):
        GenerationDefaults(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [("seed", -1), ("seed", 1.0), ("ignore_eos", None)])
def test_options_that_only_users_have_are_checked_too(name: str, value: object) -> None:
    with pytest.raises(OptionError, match=name):
        sampling(**{name: value})


@pytest.mark.parametrize("document", [b'{"temperature": 0}', b'{"topk": 3}', b'{"max_new_tokens": "9"}'])
def test_a_manifest_with_impossible_defaults_is_refused(document: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(document, type=GenerationDefaults)


def test_options_that_have_no_effect_can_be_named() -> None:
    given = GenerationOptions(temperature=0.5, top_p=0.9, max_new_tokens=4, seed=1)
    assert given.ignored(GenerationDefaults()) == ("temperature", "top_p", "seed")
    assert given.ignored(GenerationDefaults(do_sample=True)) == ()
    assert GenerationOptions().ignored(GenerationDefaults()) == ()


# --- greedy


def test_greedy_takes_the_largest_and_the_lowest_id_on_ties() -> None:
    logits = logits_of(1000, seed=0)
    logits[[40, 700]] = logits.max() + 1
    assert Sampler(sampling()).next(logits) == 40


def test_without_sampling_temperature_top_k_and_top_p_are_ignored() -> None:
    for seed in range(20):
        logits = logits_of(300, seed)
        plain = Sampler(sampling()).next(logits)
        assert Sampler(sampling(temperature=50.0, top_k=3, top_p=0.1)).next(logits) == plain
        assert Sampler(sampling()).probabilities(logits).argmax() == plain


def test_greedy_with_a_penalty_follows_transformers_over_many_steps() -> None:
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    processor = hf.RepetitionPenaltyLogitsProcessor(1.3)
    sampler, generated = Sampler(sampling(repetition_penalty=1.3)), []
    for step in range(60):
        logits = logits_of(40, seed=step)
        ids = torch.tensor([generated], dtype=torch.long)
        expected = int(processor(ids, torch.from_numpy(logits.copy())[None]).argmax())
        generated.append(sampler.next(logits))
        assert generated[-1] == expected


def test_logits_are_left_as_they_were() -> None:
    logits = logits_of(50, seed=4)
    before = logits.copy()
    sampler = Sampler(sampling(repetition_penalty=2.0, do_sample=True, temperature=0.5, top_p=0.5))
    sampler.next(logits)
    sampler.next(logits)
    np.testing.assert_array_equal(logits, before)
    assert sampler.probabilities(logits).sum() == pytest.approx(1)


# --- drawing

COMBINATIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 1e-6},
    {"repetition_penalty": 1.2},
    {"repetition_penalty": 0.8},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1},
    {"temperature": 1.7, "top_k": 7, "top_p": 0.5, "repetition_penalty": 1.5},
]


@pytest.mark.parametrize("changes", COMBINATIONS, ids=str)
@pytest.mark.parametrize("size", [2, 97, 3000])
def test_probabilities_equal_those_of_transformers(size: int, changes: dict[str, float]) -> None:
    chosen = sampling(**{**DRAWING, **changes})
    for seed in range(5):
        logits = logits_of(size, seed)
        generated = np.random.default_rng(seed).integers(0, size, 12).tolist()
        ours = sampler_after(generated, chosen, size).probabilities(logits)
        theirs = probabilities_of_transformers(logits, generated, chosen)
        difference = float(np.abs(ours - theirs).max())
        print(f"size {size}, {changes}: largest difference {difference:.1e}")
        assert difference <= 1e-6
        np.testing.assert_array_equal(ours > 0, theirs > 0)


def test_only_generated_tokens_are_penalised_not_the_first_step() -> None:
    logits = logits_of(100, seed=1)
    penalised, plain = Sampler(sampling(**DRAWING, repetition_penalty=9.0)), Sampler(sampling(**DRAWING))
    np.testing.assert_array_equal(penalised.probabilities(logits), plain.probabilities(logits))


def test_top_k_keeps_all_that_tie_with_the_last_one() -> None:
    logits = np.array([1, 3, 2, 2, 2, 0], np.float32)
    kept = Sampler(sampling(do_sample=True, top_k=2)).probabilities(logits) > 0
    np.testing.assert_array_equal(kept, [False, True, True, True, True, False])


@pytest.mark.parametrize("spread", [0.0, 0.01, 6.0])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
def test_top_p_over_a_large_vocabulary_keeps_the_smallest_sufficient_set(spread: float, top_p: float) -> None:
    logits = logits_of(150_000, seed=3, spread=spread)
    kept = Sampler(sampling(**DRAWING, top_p=top_p)).probabilities(logits) > 0
    plain = Sampler(sampling(**DRAWING)).probabilities(logits)
    mass = plain[kept].sum()
    assert mass >= top_p - 1e-9
    assert mass - plain[kept].min() <= top_p + 1e-9
    if not kept.all():
        assert plain[kept].min() >= plain[~kept].max()


def test_draws_are_distributed_as_the_probabilities() -> None:
    stats = pytest.importorskip("scipy.stats")
    chosen = sampling(do_sample=True, temperature=1.3, top_k=12, top_p=0.9, seed=11)
    logits = logits_of(500, seed=8, spread=1.5)
    sampler = Sampler(chosen)
    expected = sampler.probabilities(logits) * 20_000
    counts = np.bincount([sampler.next(logits) for _ in range(20_000)], minlength=500)
    possible = expected > 0
    assert possible.sum() > 5
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-4


def drawn(seed: int | None, count: int = 40) -> list[int]:
    sampler = Sampler(sampling(**DRAWING, seed=seed))
    return [sampler.next(logits_of(200, seed=step)) for step in range(count)]


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others() -> None:
    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    assert drawn(None) != drawn(None)


def test_a_tiny_temperature_becomes_greedy_and_a_huge_penalty_stays_finite() -> None:
    logits = logits_of(400, seed=5, spread=30)
    cold = Sampler(sampling(**DRAWING, temperature=1e-300, repetition_penalty=1e300, seed=0))
    first = cold.next(logits)
    assert first == logits.argmax()
    assert cold.probabilities(logits).sum() == pytest.approx(1.0)
    assert cold.next(logits) != first


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(("bad", "word"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
def test_logits_that_are_not_finite_end_the_answer_with_a_reason(do_sample: bool, bad: float, word: str) -> None:
    sampler = Sampler(sampling(do_sample=do_sample))
    logits = logits_of(64, seed=6)
    sampler.next(logits)
    logits[[3, 9]] = bad
    with pytest.raises(BackendError) as caught:
        sampler.next(logits)
    assert f"{word} logits (2 of 64) for token 2 of the answer" in str(caught.value)


@pytest.mark.parametrize("changes", [{}, {"do_sample": True}, {**DRAWING, "top_p": 0.9}], ids=str)
def test_a_large_vocabulary_costs_milliseconds(changes: dict[str, object]) -> None:
    sampler = Sampler(sampling(**changes, repetition_penalty=1.1))
    logits = logits_of(151_655, seed=2, spread=5)
    sampler.next(logits)
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        sampler.next(logits)
        taken.append(1e3 * (time.perf_counter() - start))
    print(f"{changes}: {min(taken):.2f} ms a token")
    assert min(taken) < 100  # generous: the machine is shared
