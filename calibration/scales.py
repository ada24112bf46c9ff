"""The scale table: what a calibration run found out, in a file that can be read, edited and used again.

JSON: provenance, then per stage the threshold of every quantised activation, how it was chosen, and the exponents of
its smoothing factors. A threshold t becomes the scale t / 127. The table names the weights it was made for, by hash.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from calibration.write import replace_file
from runtime.bundle import Bundle
from runtime.errors import CalibrationError
from runtime.manifest import JSON_ERRORS

__all__ = ["ClipRecord", "ScaleTable", "StageScales", "TensorScale", "read_table", "weights_hash", "write_table"]

FORMAT = "linvt-scales"
VERSION = 1
LARGEST_FILE = 2**28  # bytes


class TensorScale(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One activation, and the layers that read it.

    Attributes:
        threshold: magnitudes above it are clipped; the scale is a 127th of it.
        method: how it was chosen: minmax, percentile, entropy, mse, or by hand.
        largest: largest magnitude that was seen.
        error: relative error of the layers' outputs on sampled rows.
        smooth: log2 of the factor by which every channel was divided; empty for none.
        layers: weights that are multiplied with it.
    """

    threshold: float
    method: str
    largest: float
    error: float
    layers: tuple[str, ...]
    smooth: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold / 127 >= 1e-30):
            raise ValueError(f"threshold is {self.threshold}, expected a finite number above 0")
        if any(abs(exponent) > 30 for exponent in self.smooth):
            raise ValueError("an exponent in smooth is beyond 30")


class StageScales(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stage.

    Attributes:
        weights: SHA-256 of the stage's weight file in the bundle that was calibrated.
        tensors: by name of the activation.
    """

    weights: str
    tensors: dict[str, TensorScale]


class ClipRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A clip that was used."""

    name: str
    sha256: str
    frames: int


class ScaleTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole table."""

    format: str = FORMAT
    version: int = VERSION
    method: str
    clips: tuple[ClipRecord, ...]
    questions: tuple[str, ...]
    versions: dict[str, str]
    stages: dict[str, StageScales]


def weights_hash(bundle: Bundle, stage: str) -> str:
    """SHA-256 of a stage's weights, or of its graph where they are all inside."""
    file = bundle.manifest.stages[stage].file
    files = bundle.manifest.files
    return files.get(f"{file}.data", files[file]).sha256


def write_table(path: Path, table: ScaleTable) -> None:
    """Write the table, whole or not at all."""
    replace_file(path, encode_table(table))


def encode_table(table: ScaleTable) -> bytes:
    """The table as indented JSON; lists of exponents stay on one line."""
    builtins: dict[str, Any] = msgspec.to_builtins(table)
    for stage in builtins["stages"].values():
        for tensor in stage["tensors"].values():
            tensor["smooth"] = msgspec.Raw(msgspec.json.encode(tensor["smooth"]))
    return msgspec.json.format(msgspec.json.encode(builtins, order="deterministic"), indent=1) + b"\n"


def read_table(path: Path, bundle: Bundle) -> ScaleTable:
    """Read a table and check that it was made for this bundle's weights.

    Raises:
        CalibrationError: unreadable, not a table, of another version or of another model.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise CalibrationError(f"{path} has more than {LARGEST_FILE} bytes; expected a scale table")
        table = msgspec.json.decode(path.read_bytes(), type=ScaleTable)
    except OSError as error:
        raise CalibrationError(f"cannot read the scale table {path}: {error.strerror}; check the path") from error
    except JSON_ERRORS as error:
        raise CalibrationError(
            f"{path} is not a scale table: {error!s:.200}; make one with python -m calibration BUNDLE CLIPS"
        ) from error
    if (table.format, table.version) != (FORMAT, VERSION):
        raise CalibrationError(
            f"{path} has format {table.format!r:.40} version {table.version}, expected {FORMAT!r} version {VERSION}; "
            "calibrate again"
        )
    for name, stage in table.stages.items():
        if name not in bundle.manifest.stages or stage.weights != weights_hash(bundle, name):
            raise CalibrationError(
                f"{path} was made for other weights of the stage {name!r:.40} than {bundle.folder} has; calibrate again"
            )
    return table
