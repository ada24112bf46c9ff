"""What a dry run says would fit can be asked for word by word, and then fits."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import calibration.__main__
import export.__main__
import export.build
from export.engine.admit import estimate_of
from export.engine.advice import LEAST_WORKSPACE
from export.engine.estimate import Estimate
from export.engine.lowered import lowered_stages
from export.engine.narrower import narrower
from export.engine.options import BuildOptions
from export.engine.shapes import ranges_of
from export.lower import release_of
from runtime.bundle import Bundle
from runtime.manifest import Manifest
from tests.calibrations import clips
from tests.conftest import GOLDEN

__all__ = ["clips"]

Captured = pytest.CaptureFixture[str]
OUTGROWS = "linvt-internvl2-a"  # its LLM is Qwen2, which leaves float16's range
STAYS = "internvl2-phi3-a"
QUICK = ("--method", "minmax", "--rounding", "rounded", "--min-cosine", "0")
GIVE = re.compile(r"give ((?:--\w+ [\w=,]+ )+)\((\d+) MiB")
RUNNING = re.compile(r"running: (\d+) together, (\d+) one at a time")


@dataclass(frozen=True)
class Made:
    """A bundle, the checkpoint it came from, and the float bundle it was quantised from, or itself."""

    bundle: Path
    checkpoint: Path
    source: Path


@pytest.fixture(scope="module")
def bundles(
    export_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, clips: Path
) -> dict[str, Made]:
    """Every kind of bundle that is advised differently."""
    outgrows, stays = GOLDEN / OUTGROWS, GOLDEN / STAYS
    wide = export_bundle(OUTGROWS, frames=8)
    narrow = tmp_path_factory.mktemp("quantised") / "int8"
    assert calibration.__main__.main([str(wide), str(clips), "-o", str(narrow), *QUICK]) == 0
    made = {
        "float32": (wide, outgrows),
        "bfloat16 inside float16": (export_bundle(OUTGROWS, frames=8, dtype="float16"), outgrows),
        "float16": (export_bundle(STAYS, linvt="none", dtype="float16"), stays),
    }
    found = {name: Made(bundle, checkpoint, bundle) for name, (bundle, checkpoint) in made.items()}
    return {**found, "int8": Made(narrow, outgrows, wide)}


KINDS = ["float32", "bfloat16 inside float16", "float16", "int8"]


def rehearse(capfd: Captured, bundle: Path, options: list[str]) -> tuple[int, str, str]:
    """Exit code, the lines of the table, and what was refused."""
    capfd.readouterr()
    code = export.build.main([str(bundle), "--dry-run", *options])
    table, errors = capfd.readouterr()
    lines = errors.splitlines() or [""]
    assert len(lines[-1]) < 600, lines
    return code, table, lines[-1] if code else ""


def advice_in(line: str) -> str:
    return line.partition("are free; ")[2].partition("; --force")[0]


def drawn_options(manifest: Manifest, random: np.random.Generator) -> list[str]:
    """Some sizes, each with a smallest, a best and a largest or some of them, and maybe a workspace."""
    frames, found = manifest.frames, []
    limits = {"tokens": (2, manifest.context, 1), "batch": (frames.group, 4 * frames.group, frames.group)}
    if manifest.linvt:
        limits |= {"frames": (frames.minimum, frames.maximum, 1), "text": (1, manifest.context, 1)}
    for key, (least, most, step) in limits.items():
        sizes = np.sort(random.integers(least // step, most // step, size=3, endpoint=True)) * step
        for option, size in zip(("--min", "--opt", "--max"), sizes, strict=True):
            if random.random() < 0.4:
                found += [option, f"{key}={size}"]
    if random.random() < 0.5:
        found += ["--workspace", str(int(10 ** random.uniform(0, 5)))]
    return found


@pytest.mark.parametrize("version", ["10.3", "11.4"])
@pytest.mark.parametrize("kind", KINDS)
def test_advice_that_is_followed_word_by_word_fits(
    bundles: dict[str, Made], kind: str, version: str, random: np.random.Generator, capfd: Captured
) -> None:
    bundle = bundles[kind].bundle
    for _ in range(2):
        options = [*drawn_options(Bundle.open(bundle).manifest, random), "--tensorrt", version]
        code, table, _ = rehearse(capfd, bundle, options)
        assert code == 0
        need = RUNNING.search(table)
        assert need
        limit = random.choice(["--device-memory", "--max-memory"])
        options += [limit, str(max(1, int(int(need[2]) * 10 ** random.uniform(-1.5, 0.1))))]
        code, table, line = rehearse(capfd, bundle, options)
        assert (code == 0) == ("fits into" in table), (options, line)
        if code == 0:
            continue
        advice = advice_in(line)
        if not advice.startswith("give"):
            assert advice.startswith(("no smaller size", "export with", "quantise")), line
            continue
        followed = GIVE.match(advice)
        assert followed, advice
        code, table, line = rehearse(capfd, bundle, [*options, *shlex.split(followed[1])])
        assert code == 0 and "fits into" in table, (options, advice, line)
        need = RUNNING.search(table)
        assert need and followed[2] == need[2 if "--low-memory" in advice else 1], (options, advice)


def estimate_for(bundle: Bundle, version: str, *, wide: bool = False) -> Estimate:
    options = BuildOptions(most={"tokens": min(300, bundle.manifest.context)})
    ranges = ranges_of(bundle.manifest, options)
    stages = lowered_stages(bundle, bundle.manifest.stages, release_of(version), ranges, plugin=True)
    return estimate_of(bundle, stages.values(), ranges, options, wide=wide)


def commands_of(advice: str, made: Made, clips: Path, output: Path) -> Iterator[int]:
    """Do what the words of an advice say; exit codes."""
    words, _, command = advice.partition(": ")
    if command:
        assert words in ("quantise it", "quantise the float bundle it was made of")
        python, m, module, *arguments = shlex.split(command)
        assert (python, m, module) == ("python", "-m", "calibration")
        places = {"BUNDLE": str(made.bundle), "FLOAT": str(made.source), "CLIPS": str(clips), "OTHER": str(output)}
        yield calibration.__main__.main([*(places.get(word, word) for word in arguments), *QUICK])
        return
    assert words.startswith("export with ")
    arguments = shlex.split(words.removeprefix("export with ").replace("CLIPS", str(clips)))
    quick = QUICK if "--calibration" in arguments else ()
    plain = () if Bundle.open(made.bundle).manifest.linvt else ("--linvt", "none")
    frames = ("--frames", str(Bundle.open(made.bundle).manifest.frames.default))
    yield export.__main__.main([str(made.checkpoint), "-o", str(output), *arguments, *quick, *plain, *frames])


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrower_bundle_that_is_advised_can_be_made_and_takes_no_more_than_was_said(
    bundles: dict[str, Made], kind: str, clips: Path, tmp_path: Path, capfd: Captured
) -> None:
    made = bundles[kind]
    bundle = Bundle.open(made.bundle)
    told = {
        version: list(narrower(bundle.manifest, lambda wide, at=version: estimate_for(bundle, at, wide=wide)))  # type: ignore[misc]
        for version in ("10.3", "11.4")
    }
    assert [change.precision for change in told["10.3"]] == {
        "float32": ["float16", "INT8", "INT4"],
        "int8": ["INT4"],
    }.get(kind, ["INT8", "INT4"])
    for index, change in enumerate(told["10.3"]):
        output = tmp_path / change.precision
        assert list(commands_of(change.advice, made, clips, output)) == [0], capfd.readouterr().err
        for version, changes in told.items():
            found, expected = estimate_for(Bundle.open(output), version), changes[index].estimate
            for real, said in zip(found.stages, expected.stages, strict=True):
                assert real.kept <= said.kept * 1.02 and real.activations <= said.activations * 1.02, (real, said)
                assert said.weights.total <= 1.2 * real.weights.total, (real, said)


def test_an_llm_that_cannot_be_calibrated_as_it_is_is_exported_again(bundles: dict[str, Made]) -> None:
    bundle = Bundle.open(bundles["bfloat16 inside float16"].bundle)
    assert bundle.manifest.stages["decode"].compute == "bfloat16"
    advised = [
        change.advice for change in narrower(bundle.manifest, lambda wide: estimate_for(bundle, "10.3", wide=wide))
    ]
    assert advised == [f"export with --dtype float32 --calibration CLIPS --precision {n}" for n in ("int8", "int4")]


def test_less_scratch_memory_is_advised_before_anything_else(bundles: dict[str, Made], capfd: Captured) -> None:
    bundle = bundles["float32"].bundle
    code, _, line = rehearse(capfd, bundle, ["--workspace", "1000000", "--device-memory", "7000"])
    assert code == 1 and advice_in(line).startswith("give --workspace 3906 (")


def test_scratch_memory_is_not_advised_below_what_products_want(bundles: dict[str, Made], capfd: Captured) -> None:
    for asked in (LEAST_WORKSPACE, 1):
        options = ["--workspace", str(asked), "--device-memory", "20"]
        code, _, line = rehearse(capfd, bundles["float32"].bundle, options)
        assert code == 1 and advice_in(line).startswith("give --max"), line


def test_sizes_that_were_asked_for_come_down_with_the_largest(bundles: dict[str, Made], capfd: Captured) -> None:
    bundle = bundles["float32"].bundle
    for option in ("--opt", "--min"):
        code, _, line = rehearse(capfd, bundle, [option, "tokens=2048", "--device-memory", "60", "--workspace", "1"])
        assert code == 1 and advice_in(line).startswith(f"give --max tokens=1024 {option} tokens=1024 ("), line


def test_memory_to_make_do_with_counts_where_no_device_is(bundles: dict[str, Made], capfd: Captured) -> None:
    bundle = bundles["float32"].bundle
    code, _, line = rehearse(capfd, bundle, ["--max-memory", "30"])
    assert code == 1 and "30 MiB are free" in line
    code, table, _ = rehearse(capfd, bundle, ["--max-memory", "1000"])
    assert code == 0 and "fits into 1000 MiB" in table
    code, table, _ = rehearse(capfd, bundle, ["--max-memory", "1000", "--device-memory", "900"])
    assert code == 0 and "fits into 900 MiB" in table


def test_what_is_forced_is_not_said_to_fit(bundles: dict[str, Made], capfd: Captured) -> None:
    code, table, _ = rehearse(capfd, bundles["float32"].bundle, ["--max-memory", "30", "--force"])
    assert code == 0 and table.endswith("--force would build it, but it does not fit into 30 MiB\n")
