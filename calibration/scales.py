"""The scale table: what a calibration run found out, in a file that can be read, edited and used again.

JSON: provenance, then per stage the threshold of every quantised activation, how it was chosen, and the exponents of
its smoothing factors. A threshold t becomes the scale t / 127. The table names the weights it was made for, by hash.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from runtime.bundle import Bundle
from runtime.errors import CalibrationError
from runtime.manifest import JSON_ERRORS

__all__ = [
    "LEAST_SCALE",
    "ClipRecord",
    "ScaleTable",
    "StageScales",
    "TensorScale",
    "check_weights",
    "encode_table",
    "read_table",
    "weights_hash",
]

FORMAT = "linvt-scales"
VERSION = 1
LARGEST_FILE = 2**26  # bytes; a model of 7 billion parameters needs about 4 million
LEAST_SCALE, MOST_SCALE = 1e-30, 2.7e36  # below what means something, above subnormals; float32's largest number / 127
MOST_EXPONENT = 30
LIST = re.compile(rb"\[\n[-\d,\s]+\]")  # of integers, indented; inside a string there is no line break


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
        if not LEAST_SCALE <= self.threshold / 127 <= MOST_SCALE:
            raise ValueError(
                f"threshold is {self.threshold:g}, expected above 0, {127 * LEAST_SCALE:g} to {127 * MOST_SCALE:g}"
            )
        if beyond := [exponent for exponent in self.smooth if abs(exponent) > MOST_EXPONENT]:
            raise ValueError(f"smooth has the exponent {beyond[0]}, expected -{MOST_EXPONENT} to {MOST_EXPONENT}")


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


class RawStage(msgspec.Struct):
    """A stage whose entries were not looked at yet."""

    tensors: dict[str, msgspec.Raw]


class RawTable(msgspec.Struct):
    """A table of them."""

    stages: dict[str, RawStage]


class Header(msgspec.Struct):
    """The two fields that every version has."""

    format: str
    version: int


def weights_hash(bundle: Bundle, stage: str) -> str:
    """SHA-256 of a stage's weights, or of its graph where they are all inside."""
    file = bundle.manifest.stages[stage].file
    files = bundle.manifest.files
    return files.get(f"{file}.data", files[file]).sha256


def encode_table(table: ScaleTable) -> bytes:
    """The table as indented JSON that is the same for equal tables; a list of exponents is one line."""
    indented = msgspec.json.format(msgspec.json.encode(table, order="deterministic"), indent=1)
    return LIST.sub(lambda found: b"[" + b" ".join(found[0][1:-1].split()) + b"]", indented) + b"\n"


def read_table(path: Path) -> ScaleTable:
    """Read a table, whatever model it is of.

    Raises:
        CalibrationError: unreadable, not a table, or of another version.
    """
    data = table_bytes(path)
    try:
        header = msgspec.json.decode(data, type=Header)
        if (header.format, header.version) != (FORMAT, VERSION):
            raise CalibrationError(
                f"{path} has format {header.format!r:.40} version {header.version}, expected {FORMAT!r} version "
                f"{VERSION}; calibrate again"
            )
        return msgspec.json.decode(data, type=ScaleTable)
    except JSON_ERRORS as error:
        raise CalibrationError(
            f"{path} is not a scale table: {named_fault(data) or str(error)[:200]}; correct it, or take the "
            "scales.json of a bundle that was calibrated"
        ) from error


def named_fault(data: bytes) -> str:
    """The first entry that does not fit, by name, and why; empty where no entry is to blame."""
    try:
        stages = msgspec.json.decode(data, type=RawTable).stages
    except JSON_ERRORS:
        return ""
    for stage, found in stages.items():
        for name, entry in found.tensors.items():
            try:
                msgspec.json.decode(entry, type=TensorScale)
            except JSON_ERRORS as error:
                return f"{stage!r:.40}, entry {name!r:.80}: {error!s:.200}"
    return ""


def table_bytes(path: Path) -> bytes:
    """What the file holds."""
    try:
        size = path.stat().st_size
        if not path.is_file() or size > LARGEST_FILE:
            found = f"has {size} bytes" if path.is_file() else "is not a file"
            raise CalibrationError(
                f"{path} {found}; expected a scale table, a file of at most {LARGEST_FILE} bytes such as the "
                "scales.json of a bundle that was calibrated"
            )
        return path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"cannot read the scale table {path}: {error.strerror}; check the path") from error


def check_weights(path: Path, table: ScaleTable, bundle: Bundle, called: Path | str) -> None:
    """The table was made for the weights of this bundle, which errors call ``called``.

    Raises:
        CalibrationError: it was made for other weights.
    """
    for name, stage in table.stages.items():
        if name not in bundle.manifest.stages or stage.weights != weights_hash(bundle, name):
            raise CalibrationError(
                f"{path} was made for other weights of the stage {name!r:.40} than {called} has; calibrate again"
            )
