"""What one TensorRT release's ONNX parser takes: opset, operators and their dtypes, from ``calibration.trt_rules``.

Any version from 10.3 on has rules: those of the newest documented release that is not newer. Looks at no graph.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from calibration.trt_rules import OPERATORS, RELEASES, is_known, newest_opset, ordered
from kernels.spec import PLUGIN_BEFORE_BODY_SINCE
from runtime.errors import OptionError

__all__ = ["Release", "release_of"]

VERSION = re.compile(r"\d{1,4}(\.\d{1,4}){1,3}(?=\Z|[.+-])", re.ASCII)  # "10.3", "10.13.3.9", "10.3.0.26-1+cuda12.5"
OLDEST, NEWEST = next(iter(RELEASES)), list(RELEASES)[-1]
# Of TopK. ``addTopK`` and ``ITopKLayer::setInput`` of NvInfer.h hold, where from 10.0 to 11.1 K goes up to 3840 and
# larger ones fail: onnx-tensorrt's operators.md says "less than 3840", but its importer looks at no K.
LARGEST_K = 3840
PAD_AXES_SINCE = (10, 4)  # as a tensor; docs/Changelog.md of onnx-tensorrt


@dataclass(frozen=True)
class Release:
    """What one release takes.

    Attributes:
        version: as it was asked for, e.g. "10.3.0".
        rules: the same for ``calibration.trt_rules``, e.g. "10.3".
        opset: newest opset of ONNX; ``target_opset`` says it of a graph.
        operators: dtypes of what each operator works on.
        largest_k: of TopK.
        constant_pad_axes: whether the axes of Pad have to be constants.
        body_first: whether a function body is inlined even where a plugin of that name is registered.
        note: set where rules of an older release stand in, because none are known for this one.
    """

    version: str
    rules: str
    opset: int
    operators: Mapping[str, frozenset[ir.DataType]]
    largest_k: int
    constant_pad_axes: bool
    body_first: bool
    note: str = ""


def release_of(version: str) -> Release:
    """The rules of a version as TensorRT spells it: "10.3", "10.3.0.26", "11.4.1".

    Raises:
        OptionError: no version, or one before 10.3.
    """
    found = VERSION.match(version)
    numbers = ordered(found.group())[:2] if found else ()
    if not found or numbers < ordered(OLDEST):
        raise OptionError(
            f"TensorRT {version!r:.40}: expected a version from {OLDEST} on, such as {', '.join(RELEASES)}"
        )
    short = ".".join(map(str, numbers))
    newer = numbers > ordered(NEWEST)
    return Release(
        version=version,
        rules=short,
        opset=newest_opset(short),
        operators={name: dtypes for name, dtypes in OPERATORS.items() if is_known(name, short)},
        largest_k=LARGEST_K,
        constant_pad_axes=numbers < PAD_AXES_SINCE,
        body_first=numbers < PLUGIN_BEFORE_BODY_SINCE,
        note=f"TensorRT {version} is newer than the newest rules; those of {NEWEST} are applied" if newer else "",
    )
