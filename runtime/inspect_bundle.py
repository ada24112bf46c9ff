"""What is inside a bundle, what was proven about it, and which engines it has; in words or as one object.

Opens no graph and no engine.
"""

# ruff: noqa: T201  a command prints

from __future__ import annotations

from collections.abc import Iterator
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any

import msgspec

from runtime.bundle import EVIDENCE, Bundle
from runtime.cli import ascii_json, printable
from runtime.errors import BundleError
from runtime.inspect_engines import engine_lines, engine_sets
from runtime.manifest import JSON_ERRORS, STAGES, Manifest, QuantizedSpec, TensorSpec

__all__ = ["read_evidence", "show"]

HALF_STEP = Decimal("0.0000005")  # of a stage's cosine in the manifest, which has six digits


class Tolerance(msgspec.Struct):
    """How far the bundle was allowed to be from PyTorch."""

    absolute: float
    relative: float


class Evidence(msgspec.Struct):
    """The fields of ``evidence.json`` that are put into words here."""

    bundle: str
    passed: bool
    cases: list[Any]
    tolerance: Tolerance
    first_departure: str | None = None


def show(path: str, as_json: bool, verify: bool) -> int:
    """Check the bundle and print it."""
    bundle = Bundle.open(path, verify=verify)
    evidence = read_evidence(bundle)
    engines = engine_sets(bundle)
    if as_json:
        content = {"manifest": bundle.manifest, "evidence": evidence}
        print(ascii_json({**content, "engines": engines} if engines else content))
    else:
        words = [*lines(bundle, evidence), *(line for found in engines for line in engine_lines(found))]
        print("\n".join(map(printable, words)))
    return 0


def lines(bundle: Bundle, evidence: dict[str, Any] | None) -> Iterator[str]:
    """The bundle in words."""
    manifest = bundle.manifest
    yield f"{bundle.folder}"
    yield f"  family      {manifest.family}, {megabytes(manifest):.1f} MB in {len(manifest.files) + 1} files"
    yield f"  linvt       {linvt_line(manifest)}"
    frames = manifest.frames
    yield (
        f"  frames      {frames.default} by default, {frames.minimum} to {frames.maximum}, "
        f"{frames.tokens} tokens each, {manifest.preprocess.size[1]} x {manifest.preprocess.size[0]} pixels"
    )
    yield f"  llm         width {manifest.width}, {manifest.layers} layers, context {manifest.context} tokens"
    yield f"  generation  {fields(manifest.generation)}"
    yield f"  evidence    {evidence_line(bundle, evidence)}"
    for name in sorted(manifest.stages, key=STAGES.index):
        stage = manifest.stages[name]
        size = sum(spec.size for file, spec in manifest.files.items() if file.startswith(stage.file))
        yield f"  {name:<11} {size / 1e6:.1f} MB, computes in {stage.compute}, stored in {stage.storage}"
        if stage.quantized:
            yield f"    quantised {quantized_line(stage.quantized)}"
        yield f"    in        {tensors(stage.inputs)}"
        yield f"    out       {tensors(stage.outputs)}"
    for key, value in manifest.provenance.items():
        yield f"  {key:<23} {value}"


def quantized_line(spec: QuantizedSpec) -> str:
    """How a stage was quantised in one line."""
    block = f" in blocks of up to {spec.block}" if spec.block else ""
    left = f"; left in float: {', '.join(spec.floats)}" if spec.floats else ""
    least = Decimal(str(spec.cosine)) - HALF_STEP  # may be the smallest that was measured, rounded up
    least = least.quantize(Decimal("0.00001"), ROUND_FLOOR)
    return (
        f"{spec.layers} layers, weights {spec.weights}{block}, activations {spec.activations}; cosine with the float "
        f"stage at least {least}, {spec.size_ratio:.3f} of float32's size{left}"
    )


def megabytes(manifest: Manifest) -> float:
    """Size of all listed files."""
    return sum(spec.size for spec in manifest.files.values()) / 1e6


def linvt_line(manifest: Manifest) -> str:
    """LinVT's choices in one line."""
    return fields(manifest.linvt) if manifest.linvt else "none: frame tokens go straight to the LLM"


def fields(record: msgspec.Struct) -> str:
    """name=value of every field."""
    return ", ".join(f"{name}={value}" for name, value in msgspec.structs.asdict(record).items())


def tensors(specs: tuple[TensorSpec, ...]) -> str:
    """Graph inputs or outputs; the KV cache's layers as one."""
    shown = [spec for spec in specs if not spec.name.startswith(("past_", "present_")) or spec.name.endswith(".0")]
    return "; ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in shown)


def read_evidence(bundle: Bundle) -> dict[str, Any] | None:
    """What the comparison with PyTorch wrote; None where none was made."""
    path: Path = bundle.folder / EVIDENCE
    try:
        evidence = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        msgspec.convert(evidence, Evidence)
        return evidence
    except FileNotFoundError:
        return None
    except (OSError, *JSON_ERRORS) as error:
        raise BundleError(
            f"{path} is not readable: {error!s:.200}; make it again with python -m export.compare"
        ) from error


def evidence_line(bundle: Bundle, evidence: dict[str, Any] | None) -> str:
    """Whether the bundle was proven equal to PyTorch."""
    if evidence is None:
        return "none; make it with 'python -m export.compare BUNDLE CHECKPOINT'"
    found = msgspec.convert(evidence, Evidence)
    if found.bundle != bundle.identity:
        return "of another state of this bundle; compare again"
    verdict = "passed" if found.passed else f"FAILED at {found.first_departure}"
    allowed = f"{found.tolerance.absolute:g} + {found.tolerance.relative:g} of the largest value"
    return f"{verdict}: {len(found.cases)} cases against PyTorch, within {allowed}"
