"""A scale table is written and read without a bit of difference, may be edited by hand, and is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from calibration.scales import (
    LARGEST_FILE,
    ClipRecord,
    ScaleTable,
    StageScales,
    TensorScale,
    check_weights,
    encode_table,
    read_table,
    weights_hash,
)
from runtime.bundle import Bundle
from runtime.errors import CalibrationError

Edit = Callable[[dict[str, Any]], object]

CHANNELS = 896


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open("demo-float")


def scale_of(random: np.random.Generator, channels: int = 0) -> TensorScale:
    return TensorScale(
        threshold=float(random.lognormal(0, 5)),
        method=str(random.choice(["minmax", "mse"])),
        largest=float(random.lognormal(0, 5)),
        error=float(random.random()),
        layers=("a.weight", "b [1,\n 2] weight"),
        smooth=tuple(random.integers(-10, 11, channels).tolist()),
    )


@pytest.fixture
def table(bundle: Bundle, random: np.random.Generator) -> ScaleTable:
    stages = {
        stage: StageScales(
            weights_hash(bundle, stage),
            {name: scale_of(random, channels) for name, channels in (("rms_norm", CHANNELS), ("mul", 1), ("add", 0))},
        )
        for stage in ("vision", "decode")
    }
    return ScaleTable(
        method="auto",
        clips=(ClipRecord("a/ä.mp4", "0" * 64, 8), ClipRecord("[\n1,\n2]", "1" * 64, 9)),
        questions=("What is [1,\n2]?", "[1,  2]"),
        versions={"numpy": "2", "linvt-edge": "0.1"},
        stages=stages,
    )


@pytest.fixture
def path(table: ScaleTable, tmp_path: Path) -> Path:
    path = tmp_path / "scales.json"
    path.write_bytes(encode_table(table))
    return path


def edited(path: Path, edit: Edit) -> Path:
    """The table changed as a text editor would."""
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    return path


def tensor(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["stages"]["decode"]["tensors"]["rms_norm"]
    return found


def table_for(path: Path, bundle: Bundle) -> ScaleTable:
    """A table that is read, and is of the bundle."""
    found = read_table(path)
    check_weights(path, found, bundle, "the bundle of these tests")
    return found


def refused(path: Path, bundle: Bundle) -> str:
    with pytest.raises(CalibrationError) as caught:
        table_for(path, bundle)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text and len(text) < 600, text
    return text


# --- what is written


def test_a_table_comes_back_as_it_was_written(table: ScaleTable, path: Path, bundle: Bundle) -> None:
    found = table_for(path, bundle)
    assert found == table
    assert encode_table(found) == path.read_bytes()


def test_equal_tables_are_equal_bytes_whatever_their_order(table: ScaleTable) -> None:
    turned = msgspec.structs.replace(table, stages=dict(reversed([*table.stages.items()])))
    assert [*turned.stages] != [*table.stages]
    assert encode_table(turned) == encode_table(table)


def test_a_list_of_exponents_is_one_line_and_everything_else_has_its_own(table: ScaleTable, path: Path) -> None:
    lines = path.read_text().splitlines()
    exponents = table.stages["vision"].tensors["rms_norm"].smooth
    assert sum(line.strip() == f'"smooth": {[*exponents]}' for line in lines) == 1
    assert sum('"smooth": [' in line for line in lines) == 6
    assert any(line.strip().startswith('"threshold": ') and line.endswith(",") for line in lines)
    assert len(lines) < 130
    assert lines[1].strip() == '"format": "linvt-scales",'


# --- what a user may change


def test_thresholds_and_smoothing_are_edited_by_hand(path: Path, bundle: Bundle) -> None:
    def edit(document: dict[str, Any]) -> None:
        tensor(document).update(threshold=2, smooth=[], method="by hand")
        document["stages"]["vision"]["tensors"]["mul"]["smooth"] = [-3]
        del document["stages"]["vision"]["tensors"]["add"]
        document["clips"] = []

    found = table_for(edited(path, edit), bundle)
    changed = found.stages["decode"].tensors["rms_norm"]
    assert (changed.threshold, changed.smooth, changed.method) == (2.0, (), "by hand")
    assert found.stages["vision"].tensors["mul"].smooth == (-3,)
    assert "add" not in found.stages["vision"].tensors


def test_a_table_of_some_stages_is_taken(path: Path, bundle: Bundle) -> None:
    assert [*table_for(edited(path, lambda document: document["stages"].pop("vision")), bundle).stages] == ["decode"]


def test_a_bundle_with_the_same_weights_and_another_manifest_takes_it(path: Path, bundle: Bundle) -> None:
    other = dataclasses.replace(
        bundle, manifest=msgspec.structs.replace(bundle.manifest, provenance={}), identity="0" * 64
    )
    assert table_for(path, other)


# --- what is refused


@pytest.mark.parametrize(
    "threshold", ["NaN", "Infinity", "-Infinity", "1e400", "-1", "0", "1e-40", "1e39", "true", '"1"']
)
def test_a_threshold_that_gives_no_scale_is_refused(threshold: str, path: Path, bundle: Bundle) -> None:
    text = edited(path, lambda document: tensor(document).update(threshold=123.25)).read_text()
    assert text.count("123.25") == 1
    assert table_for(path, bundle)
    path.write_text(text.replace("123.25", threshold))
    assert "is not a scale table" in refused(path, bundle)


@pytest.mark.parametrize(
    "edit",
    [
        lambda document: tensor(document).update(smooth=[0, 31]),
        lambda document: tensor(document).update(smooth=[-(10**30)]),
        lambda document: tensor(document).update(smooth=[0.5]),
        lambda document: tensor(document).update(smooth=None),
        lambda document: tensor(document).update(treshold=1),
        lambda document: tensor(document).pop("threshold"),
        lambda document: tensor(document).pop("layers"),
        lambda document: document.update(comment="mine"),
        lambda document: document["stages"]["decode"].pop("weights"),
        lambda document: document.update(stages=[]),
        lambda document: document.pop("format"),
        lambda document: document.update(version="1"),
    ],
    ids=[
        "exponent",
        "huge exponent",
        "fraction",
        "null",
        "unknown field of a tensor",
        "no threshold",
        "no layers",
        "unknown field",
        "no weights",
        "a list of stages",
        "no format",
        "version in quotes",
    ],
)
def test_fields_that_do_not_fit_are_refused(edit: Edit, path: Path, bundle: Bundle) -> None:
    assert "is not a scale table" in refused(edited(path, edit), bundle)


def test_the_refusal_says_what_is_wrong(path: Path, bundle: Bundle) -> None:
    assert "threshold is -0.5, expected above 0" in refused(
        edited(path, lambda document: tensor(document).update(threshold=-0.5)), bundle
    )
    assert "unknown field `treshold`" in refused(
        edited(path, lambda document: tensor(document).update(threshold=1, treshold=1)), bundle
    )


@pytest.mark.parametrize("fault", [{"threshold": -1}, {"threshold": "1"}, {"smooth": [99]}, {"error": None}], ids=str)
def test_the_refusal_names_the_entry(fault: dict[str, Any], path: Path, bundle: Bundle) -> None:
    text = refused(edited(path, lambda document: tensor(document).update(fault)), bundle)
    assert "'decode', entry 'rms_norm': " in text and "[...]" not in text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a scale table"),
        (b"\0" * 4096, "is not a scale table"),
        (b"{'format': 1}", "is not a scale table"),
        (b"[]", "is not a scale table"),
        (b'{"format": "\xff"}', "is not a scale table"),
        (b"[" * 100_000, "is not a scale table"),
        (b'{"format": "linvt-scales", "version": 1, "stages": ' + b'{"a":' * 50_000, "is not a scale table"),
        (b'{"format": "linvt-bundle", "version": 1}', "has format 'linvt-bundle' version 1, expected"),
        (b'{"format": "linvt-scales", "version": 2, "new": {}}', "version 2, expected 'linvt-scales' version 1"),
    ],
    ids=["empty", "zeros", "not JSON", "list", "not UTF-8", "deep", "deep stages", "a manifest", "another version"],
)
def test_a_file_that_is_no_table_is_refused(data: bytes, message: str, bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(data)
    assert message in refused(path, bundle)


def test_a_file_of_a_hundred_megabytes_is_refused_without_being_read(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    assert f"has 100000000 bytes; expected a scale table, a file of at most {LARGEST_FILE}" in refused(path, bundle)


def test_a_path_that_is_no_file_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    assert "is not a file" in refused(tmp_path, bundle)
    assert "is not a file" in refused(tmp_path / "pipe", bundle)
    assert "No such file" in refused(tmp_path / "none.json", bundle)
    assert "cannot read" in refused(tmp_path / "loop", bundle)


@pytest.mark.parametrize(
    "edit",
    [
        lambda document: document["stages"]["vision"].update(weights="0" * 64),
        lambda document: document["stages"]["vision"].update(weights=document["stages"]["decode"]["weights"]),
        lambda document: document["stages"].update(tower=document["stages"].pop("vision")),
    ],
    ids=["other weights", "another stage's", "unknown stage"],
)
def test_a_table_of_another_model_is_refused(edit: Edit, path: Path, bundle: Bundle) -> None:
    text = refused(edited(path, edit), bundle)
    assert "was made for other weights of the stage" in text and "than the bundle of these tests has" in text
    assert str(bundle.folder) not in text
