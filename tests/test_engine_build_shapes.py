"""Optimisation profiles follow the manifest where nothing is asked, and progress tells how far a build is."""

from __future__ import annotations

import io
import signal

import msgspec
import numpy as np
import pytest

from export.engine.options import BuildOptions, numbers
from export.engine.progress import Phases, Progress, monitor
from export.engine.shapes import CHAT, MOST_TOKENS, Range, chosen_stages, profiles_of, ranges_of
from runtime.bundle import Bundle
from runtime.kv_cache import ANSWER_ROOM
from runtime.manifest import FrameSpec, Manifest
from tests.trt.bindings import VERSIONS
from tests.trt.double import Double


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Bundle.open("demo-float").manifest


def test_sizes_follow_the_bundle_where_none_are_asked_for(manifest: Manifest) -> None:
    ranges = ranges_of(manifest, BuildOptions())
    frames = manifest.frames
    assert ranges.frames == Range(frames.minimum, frames.default, frames.maximum)
    assert ranges.batch == Range(1, 4, 4)
    assert (ranges.tokens.least, ranges.tokens.most) == (1, manifest.context)
    assert ranges.text == Range(1, 32, manifest.context)


def test_a_long_context_is_not_built_for_unless_asked(manifest: Manifest) -> None:
    long = msgspec.structs.replace(manifest, context=32768)
    assert ranges_of(long, BuildOptions()).tokens.most == 2048
    text = ranges_of(long, BuildOptions()).text
    assert text is not None and text.most == 512
    assert ranges_of(long, BuildOptions(most={"tokens": 32768})).tokens.most == 32768


def test_the_usual_video_a_question_and_an_answer_fit_without_linvt(
    manifest: Manifest, random: np.random.Generator
) -> None:
    usual = int(random.integers(100, 400))
    frames = FrameSpec(minimum=1, default=usual, maximum=512, tokens=manifest.frames.tokens)
    seen = usual * frames.tokens  # 1600 to 6400 rows
    stages = {stage: manifest.stages[stage] for stage in ("vision", "decode")}
    plain = msgspec.structs.replace(manifest, linvt=None, frames=frames, context=32768, stages=stages)
    found = ranges_of(plain, BuildOptions()).tokens
    assert found == Range(1, seen + CHAT, max(MOST_TOKENS, seen + CHAT + ANSWER_ROOM))
    cache = profiles_of(plain, "decode", ranges_of(plain, BuildOptions()))[1]["past_key.0"]
    assert seen + CHAT + ANSWER_ROOM <= cache.best[2] or cache.best[2] == cache.most[2] == found.most
    narrow = msgspec.structs.replace(plain, context=seen)
    assert ranges_of(narrow, BuildOptions()).tokens == Range(1, seen, seen)


def test_the_best_size_moves_into_a_narrower_range(manifest: Manifest, random: np.random.Generator) -> None:
    most = int(random.integers(2, 140))
    tokens = ranges_of(manifest, BuildOptions(most={"tokens": most})).tokens
    assert tokens == Range(1, most, most)
    least = int(random.integers(200, 500))
    assert ranges_of(manifest, BuildOptions(least={"tokens": least})).tokens == Range(least, least, manifest.context)


def test_batches_are_whole_groups_and_sets_are_counted_in_groups(manifest: Manifest) -> None:
    grouped = msgspec.structs.replace(manifest, frames=FrameSpec(minimum=7, default=23, maximum=96, tokens=16, group=3))
    ranges = ranges_of(grouped, BuildOptions())
    assert ranges.batch == Range(3, 3, 3)
    tokens = profiles_of(grouped, "refine", ranges)[0]["tokens"]
    assert (tokens.least[1], tokens.best[1], tokens.most[1]) == (3, 8, 32)


def test_positions_on_three_axes_follow_the_sequence(manifest: Manifest) -> None:
    decode = manifest.stages["decode"]
    inputs = tuple(
        msgspec.structs.replace(spec, shape=(3, 1, "sequence")) if spec.name == "position_ids" else spec
        for spec in decode.inputs
    )
    axes = msgspec.structs.replace(manifest.positions, axes=3)
    stages = {**manifest.stages, "decode": msgspec.structs.replace(decode, inputs=inputs)}
    three = msgspec.structs.replace(manifest, positions=axes, stages=stages)
    prefill, step = profiles_of(three, "decode", ranges_of(three, BuildOptions(most={"tokens": 100})))
    assert prefill["position_ids"].most == (3, 1, 100) and step["position_ids"].most == (3, 1, 1)


def test_an_axis_that_the_manifest_fixes_stays_fixed(manifest: Manifest) -> None:
    refine = manifest.stages["refine"]
    fixed = msgspec.structs.replace(refine.inputs[0], shape=(1, 8, 16, 160))
    stages = {**manifest.stages, "refine": msgspec.structs.replace(refine, inputs=(fixed,))}
    shapes = profiles_of(
        msgspec.structs.replace(manifest, stages=stages), "refine", ranges_of(manifest, BuildOptions())
    )[0]["tokens"]
    assert shapes.least == shapes.best == shapes.most == (1, 8, 16, 160)


def test_a_cache_written_in_place_has_one_size_in_both_profiles(manifest: Manifest) -> None:
    ranges = ranges_of(manifest, BuildOptions(most={"tokens": 320}))
    for profile in profiles_of(manifest, "decode", ranges, in_place=True):
        assert profile["past_key.0"].least == profile["past_key.0"].most == (1, 2, 320, 40)
    grows = profiles_of(manifest, "decode", ranges)[1]["past_key.0"]
    assert (grows.least[2], grows.most[2]) == (1, 320) and 1 < grows.best[2] <= 320


def test_stages_are_built_in_the_order_of_a_video_however_they_are_named(manifest: Manifest) -> None:
    assert chosen_stages(manifest, ("decode", "vision")) == ("vision", "decode")


def test_numbers_are_read_with_their_keys() -> None:
    assert numbers("frames=32, tokens=1024") == {"frames": 32, "tokens": 1024}


def test_a_percentage_counts_phases_within_phases() -> None:
    phases = Phases()
    phases.start("Building", None, 4)
    phases.step("Building", 1)  # two of four
    phases.start("Timing", "Building", 10)
    phases.step("Timing", 4)  # half of the third
    assert phases.line() == "Building 62 %"
    phases.finish("Timing")
    assert phases.line() == "Building 50 %"
    phases.finish("Building")
    phases.step("Building", 3)  # late, from another thread
    assert phases.line() == ""


def test_a_terminal_sees_the_percentage_and_a_file_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal  # type: ignore[method-assign, misc]
        monkeypatch.setattr("sys.stderr", stream)
        progress = Progress()
        progress.show("vision: Building 5 %")
        progress.say("vision: built")
        assert ("5 %" in stream.getvalue()) == terminal
        assert stream.getvalue().endswith("vision: built\n")


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_the_monitor_is_tensorrts_own_and_stops_a_build(version: str) -> None:
    with Double(version=version) as double:
        phases, shown = Phases(), []
        stop = [False]
        watch = monitor(double.trt, phases, shown.append, lambda: stop[0])
        assert isinstance(watch, double.trt.IProgressMonitor)
        watch.phase_start("Building", None, 2)
        assert watch.step_complete("Building", 0) is True
        stop[0] = True
        assert watch.step_complete("Building", 1) is False
        assert shown == ["Building 50 %", "Building 100 %"]


def test_a_signal_waits_for_the_end_of_the_block() -> None:
    progress, reached = Progress(), []
    with pytest.raises(KeyboardInterrupt), progress.holding_signals():
        signal.raise_signal(signal.SIGINT)
        reached.append(progress.stopped)
    assert reached == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
