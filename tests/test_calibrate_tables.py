"""A given scale table is checked before a clip is played, and what is refused or not used is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calibration.__main__ import main
from calibration.options import QuantizeOptions
from calibration.quantize import quantized_bundle
from calibration.report import SCALES
from calibration.scales import weights_hash
from runtime.bundle import Bundle
from tests import calibrations
from tests.calibrations import QUICK, failure
from tests.commands import Captured

Edit = Callable[[dict[str, Any]], object]

clips = calibrations.clips


@pytest.fixture(scope="module")
def table(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The demo's, of its stages but the LLM."""
    options = QuantizeOptions(llm="float", method="minmax", frames=4, min_cosine=0.9)
    bundle = quantized_bundle("demo-float", clips, tmp_path_factory.mktemp("quantized") / "bundle", options)
    found: dict[str, Any] = json.loads((bundle / SCALES).read_text())
    return found


def stored(table: dict[str, Any], folder: Path, edit: Edit) -> list[str]:
    """Arguments that give an edited copy."""
    changed = json.loads(json.dumps(table))
    edit(changed["stages"])
    (folder / "table.json").write_text(json.dumps(changed))
    return [*QUICK, "--scales", str(folder / "table.json")]


def smoothed(stages: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return next((name, entry) for name, entry in stages["vision"]["tensors"].items() if entry["smooth"])


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda stages: stages["vision"].update(weights="0" * 64), "of the stage 'vision' than demo-float has"),
        (
            lambda stages: stages["vision"]["tensors"].update(no_such=smoothed(stages)[1]),
            "an entry for 'no_such', which",
        ),
        (lambda stages: smoothed(stages)[1].update(smooth=[1]), "smooths with 1 exponents, and the activation has"),
        (lambda stages: smoothed(stages)[1].update(threshold=-1.0), "threshold is -1, expected above 0"),
        (
            lambda stages: smoothed(stages)[1].update(method="gptq"),
            "is of method 'gptq', which is one of 4-bit weights",
        ),
        (lambda stages: stages.clear(), "has no entry that is of use, expected some for a stage that"),
        (lambda stages: [stage["tensors"].clear() for stage in stages.values()], "has no entry that is of use"),
    ],
    ids=["weights", "unknown", "length", "threshold", "method", "no stages", "no entries"],
)
def test_a_table_that_does_not_fit_is_refused_before_a_clip_is_played(
    capfd: Captured, tmp_path: Path, clips: Path, table: dict[str, Any], edit: Edit, said: str
) -> None:
    steps: list[str] = []
    line = failure(capfd, tmp_path, clips, *stored(table, tmp_path, edit), steps=steps)
    assert said in line and str(tmp_path / "table.json") in line and steps == [], line


def test_entries_that_a_run_has_no_use_for_are_named(
    capfd: Captured, tmp_path: Path, clips: Path, table: dict[str, Any]
) -> None:
    """Of an LLM that stays in floating point."""
    decode = {
        "weights": weights_hash(Bundle.open("demo-float"), "decode"),
        "tensors": {"a": smoothed(table["stages"])[1]},
    }
    words = stored(table, tmp_path, lambda stages: stages.update(decode=decode))
    assert main(["demo-float", str(clips), "-o", str(tmp_path / "out"), *words, "--min-cosine", "0.9"]) == 0
    assert "decode: does not become W8A8; the scale table's 1 entries are not used\n" in capfd.readouterr().err
    assert json.loads((tmp_path / "out" / SCALES).read_text())["stages"].keys() == {"vision", "refine", "aggregate"}


def test_the_new_table_tells_the_true_layers_of_an_edited_entry(
    tmp_path: Path, clips: Path, table: dict[str, Any]
) -> None:
    name, entry = smoothed(table["stages"])
    words = stored(table, tmp_path, lambda stages: smoothed(stages)[1].update(layers=["foo"], largest=1e9, error=0.5))
    assert main(["demo-float", str(clips), "-o", str(tmp_path / "out"), *words, "--min-cosine", "0.9"]) == 0
    assert json.loads((tmp_path / "out" / SCALES).read_text())["stages"]["vision"]["tensors"][name] == entry
