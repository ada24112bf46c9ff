"""Every TensorRT from 10.3 on has rules; others are refused."""

from __future__ import annotations

import pytest

from calibration.trt_rules import RELEASES
from export.lower import release_of
from runtime.errors import OptionError


@pytest.mark.parametrize(
    ("version", "opset", "lacks"),
    [
        ("10.3", 20, {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}),
        ("10.3.0.26", 20, {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}),
        ("10.13.3.9", 20, {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}),
        ("10.14", 20, {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}),
        ("10.15.1", 24, set()),
        ("10.16.1.11", 24, set()),
        ("11.4.0.106", 24, set()),
        ("11.4.1+cuda13", 24, set()),
    ],
)
def test_a_version_has_the_rules_of_its_release(version: str, opset: int, lacks: set[str]) -> None:
    release, newest = release_of(version), release_of(list(RELEASES)[-1])
    assert (release.version, release.opset, release.note) == (version, opset, "")
    assert newest.operators.keys() - release.operators.keys() == lacks


def test_a_newer_version_has_the_newest_rules_and_says_so() -> None:
    release, newest = release_of("12.0.1"), release_of("11.4")
    assert release.operators == newest.operators and release.opset == newest.opset
    assert release.note == "TensorRT 12.0.1 is newer than the newest rules; those of 11.4 are applied"


@pytest.mark.parametrize("version", ["8.6", "10", "10.2.0", "ten", "", "10.x", "10.3x", "-1.0", "10.3\n", "٣.٤"])
def test_a_version_without_rules_is_refused_in_one_line(version: str) -> None:
    with pytest.raises(OptionError, match=r"^TensorRT '.*expected a version from 10\.3 on, such as 10\.3, 10\.13"):
        release_of(version)
