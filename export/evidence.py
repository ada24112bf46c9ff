"""``evidence.json``: what a comparison with PyTorch found, kept inside the bundle it is about.

It names the bundle by the hash of its manifest, so that evidence cannot be carried to another bundle.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from dataclasses import asdict, dataclass
from typing import Any, Literal

import msgspec

from calibration.parity import STAGES, Row, Tolerance
from calibration.write import replace_file
from runtime.bundle import EVIDENCE, Bundle
from runtime.version import __version__

__all__ = ["Case", "Comparison", "write_evidence"]


@dataclass(frozen=True)
class Case:
    """One question: what was compared, and the two answers.

    Attributes:
        source: the video's name, or the pictures' names.
        kind: what it is.
        frames: of the video, or how many pictures.
    """

    source: str
    kind: Literal["video", "image"]
    question: str
    frames: int
    answer: str
    reference_answer: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Comparison:
    """All cases; true when all are within tolerance.

    Attributes:
        reference: whose code each stage of the PyTorch side is.
        tolerance: the widest that held for any stage; a row has its own limit.
    """

    bundle: str
    checkpoint_fingerprint: str
    reference: dict[str, str]
    backend: str
    tolerance: Tolerance
    cases: tuple[Case, ...]

    def __bool__(self) -> bool:
        return all(row.passed for case in self.cases for row in case.rows)

    @property
    def first_departure(self) -> Row | None:
        """The earliest on the data's way, in whichever case, that is outside its tolerance."""
        failed = [row for case in self.cases for row in case.rows if not row.passed]
        return min(failed, key=lambda row: STAGES.index(row.stage), default=None)

    def content(self) -> dict[str, Any]:
        """What ``evidence.json`` and ``--json`` hold."""
        departure = self.first_departure
        content = {
            "passed": bool(self),
            "first_departure": f"{departure.stage} {departure.value} ({departure.scope})" if departure else None,
            **asdict(self),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "machine": f"{platform.system()} {platform.machine()}",
            "versions": {
                "linvt-edge": __version__,
                **{name: importlib.metadata.version(name) for name in ("torch", "onnxruntime", "numpy")},
            },
        }
        plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(content))  # NaN becomes null
        return plain


def write_evidence(bundle: Bundle, comparison: Comparison) -> None:
    """Write the result into the bundle, whole or not at all.

    Raises:
        OutputError: the bundle's folder cannot be written.
    """
    data = msgspec.json.format(msgspec.json.encode(comparison.content()), indent=1) + b"\n"
    replace_file(bundle.folder / EVIDENCE, data)
