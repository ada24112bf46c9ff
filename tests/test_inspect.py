"""``runtime.inspect`` shows what is inside a bundle and what was proven about it, within which tolerance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import runtime.inspect
from runtime.bundle import Bundle
from tests.bundles import forge, replaced
from tests.commands import Captured, refused


def test_inspect_shows_what_is_inside(linvt_bundle: Path, plain_bundle: Path, capfd: Captured) -> None:
    assert runtime.inspect.main([str(linvt_bundle)]) == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    for said in ("internvl2", "top_k=12", "16 by default, 3 to 512", "context 32768", "evidence    none", "past_key.0"):
        assert said in output
    places = [output.index(f"\n  {stage} ") for stage in ("vision", "refine", "aggregate", "decode")]
    assert places == sorted(places)
    assert runtime.inspect.main([str(plain_bundle)]) == 0
    assert "none: frame tokens go straight to the LLM" in capfd.readouterr().out


def test_inspect_json_is_the_manifest_and_the_evidence(linvt_bundle: Path, capfd: Captured) -> None:
    assert runtime.inspect.main([str(linvt_bundle), "--json"]) == 0
    content = json.loads(capfd.readouterr().out)
    assert content == {"manifest": json.loads((linvt_bundle / "bundle.json").read_bytes()), "evidence": None}


def test_inspect_says_what_was_proven(linvt_bundle: Path, tmp_path: Path, capfd: Captured) -> None:
    bundle = forge(linvt_bundle, tmp_path / "bundle")
    tolerance = {"absolute": 1e-4, "relative": 2e-3}
    evidence: dict[str, Any] = {"bundle": Bundle.open(bundle).identity, "passed": True, "cases": [{}, {}]}
    evidence["tolerance"] = tolerance
    departed = evidence | {"passed": False, "first_departure": "refine (local)"}
    for content, said in (
        (evidence, "passed: 2 cases against PyTorch, within 0.0001 + 0.002 of the largest value"),
        (departed, "FAILED at refine (local): 2 cases"),
        (evidence | {"bundle": "0"}, "of another state of this bundle; compare again"),
    ):
        (bundle / "evidence.json").write_text(json.dumps(content))
        assert runtime.inspect.main([str(bundle)]) == 0
        assert said in capfd.readouterr().out


UNREADABLE = [b"", b"[]", b"{}", b'{"bundle": "\xff"}', b'{"a":' * 10**5, b'{"cases": 5}']
UNREADABLE += [b'{"bundle": "0", "passed": true, "cases": []}']  # all but the tolerance


@pytest.mark.parametrize("content", UNREADABLE)
def test_evidence_that_cannot_be_read(linvt_bundle: Path, tmp_path: Path, capfd: Captured, content: bytes) -> None:
    bundle = forge(linvt_bundle, tmp_path / "bundle")
    (bundle / "evidence.json").write_bytes(content)
    for form in ([], ["--json"]):
        assert "evidence.json is not readable" in refused(capfd, [str(bundle), *form], main=runtime.inspect.main)


def test_inspect_keeps_a_bundles_words_off_the_terminals_controls(
    linvt_bundle: Path, tmp_path: Path, capfd: Captured
) -> None:
    bundle = forge(linvt_bundle, tmp_path / "bundle", edit=replaced("family", "\x1b[31mred\nline"))
    assert runtime.inspect.main([str(bundle)]) == 0
    assert "family      \\x1b[31mred\\nline" in capfd.readouterr().out
