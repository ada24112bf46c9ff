"""``quantization.json``: what a quantised bundle lost against the float one, kept inside it.

Figures only; ``measure`` and ``accuracy`` make them.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any, Literal

import msgspec

from calibration.measure import Loss, floored
from runtime.version import __version__

__all__ = ["REPORT", "SCALES", "Accuracy", "Report", "StageReport", "encode_report", "versions"]

REPORT = "quantization.json"
SCALES = "scales.json"
NAMED = 4  # layers left in float that a line names


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Labelled questions answered rightly by both bundles.

    Attributes:
        about_held_out: how many of those asked are about clips that did not calibrate.
    """

    asked: int
    about_held_out: int
    right_float: int
    right_quantized: int

    @property
    def drop(self) -> float:
        """Percentage points lost; negative where the quantised bundle is better."""
        return 100 * (self.right_float - self.right_quantized) / self.asked

    def __str__(self) -> str:
        """The two in one line."""
        return (
            f"labelled answers: {self.right_float} of {self.asked} right in floating point, {self.right_quantized} "
            f"quantised, {self.drop:.2f} percentage points lost"
        )


class StageReport(msgspec.Struct, frozen=True, kw_only=True):
    """One stage.

    Attributes:
        floats: layers left in floating point, with the damage each group does alone.
        float_bytes: what is left in floating point, in bytes.
        size_ratio: graph and weights over the float32 stage's.
        tensorrt: what each release needs before it takes the graph.
    """

    weights: Literal["int8", "int4"]
    activations: Literal["int8", "float"]
    loss: Loss
    layers: int
    floats: dict[str, float]
    methods: dict[str, int]
    quantized_bytes: int
    float_bytes: int
    size_ratio: float
    tensorrt: dict[str, str]

    def __str__(self) -> str:
        """The stage in one line."""
        loss = self.loss
        parts = [f"{self.weights}, {self.layers} layers", f"cosine {floored(loss.cosine, 5)}"]
        if loss.overlap is not None and loss.worth is not None:
            parts.append(f"selection overlap {loss.overlap:.1%} and worth {floored(100 * loss.worth, 1)}%")
        if loss.agreement is not None:
            parts.append(f"{loss.agreement:.1%} of tokens agree")
        parts.append(f"{self.size_ratio:.3f} of float32's size")
        if self.floats:
            more = ", ..." if len(self.floats) > NAMED else ""
            parts.append(f"{len(self.floats)} layers left in float: {', '.join([*self.floats][:NAMED])}{more}")
        return ", ".join(parts)


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The whole run.

    Attributes:
        skipped: clips that were left out, with the reason.
        embedding: smallest cosine of a row of the token embedding table with what it was; left out where it is as it
            was.
        measured_on: clips that the stages' losses are of.
        held_out: whether none of these calibrated.
    """

    source: str
    calibrated_on: int
    measured_on: tuple[str, ...]
    held_out: bool
    skipped: dict[str, str]
    options: dict[str, Any]
    stages: dict[str, StageReport]
    accuracy: Accuracy | None
    versions: dict[str, str]
    machine: str
    embedding: float | None = None


def encode_report(report: Report) -> bytes:
    """The report as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(report, order="deterministic"), indent=1) + b"\n"


def versions() -> dict[str, str]:
    """What did the work."""
    names = ("numpy", "onnx", "onnx-ir", "onnxruntime")
    return {"linvt-edge": __version__, **{name: importlib.metadata.version(name) for name in names}}
