"""Engines of a bundle, built in a double of TensorRT, what ONNX Runtime answers, and what the double was asked."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from runtime import GenerationOptions, VideoQA
from runtime.bundle import bundle_path
from tests.trt.double import Double

SIZES = "tokens=512,frames=16"
QUESTIONS = ("How many digits are there?", "Which digit is red, and where is it?")
TWO_SETS, IN_PLACE = "10.3.0", "11.4.0.106"  # versions whose engines cannot and can write the KV cache in place
TO_HOST = "cudaMemcpyAsync cudaMemcpyDeviceToHost"


def with_engines(source: Path, target: Path, version: str, *options: str, sizes: str = SIZES) -> Path:
    """A copy of a bundle with engines for the double's device, built by the command."""
    import export.build

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("engines"))
    with Double(version=version):
        assert export.build.main([str(target), "--max", sizes, *options]) == 0
    return target


class Built:
    """Bundles with engines of one TensorRT, each built once; no test may change them."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self.folders = folders
        self.done: dict[object, Path] = {}

    def __call__(self, version: str, source: str | Path = "demo-float", **options: Any) -> Path:
        key = (version, source, *options.items())
        if key not in self.done:
            target = self.folders.mktemp("built") / "bundle"
            self.done[key] = with_engines(bundle_path(source), target, version, **options)
        return self.done[key]


def tokens(count: int) -> GenerationOptions:
    """Options of an answer of so many tokens."""
    return GenerationOptions(max_new_tokens=count, do_sample=False, ignore_eos=True)


def on_the_cpu(bundle: Path, source: Any, questions: Sequence[str] = QUESTIONS, count: int = 12) -> list[Any]:
    """Token ids of ONNX Runtime's answers."""
    with VideoQA.open(bundle, backend="cpu") as qa:
        seen = qa.images(source) if isinstance(source, list) else qa.video(source)
        return [qa.ask(seen, question, tokens(count)).token_ids for question in questions]


def engines_of(bundle: Path) -> Path:
    """The one folder of engines."""
    (folder,) = (bundle / "engines").iterdir()
    return folder


def edited_record(bundle: Path, stage: str, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change what is noted about an engine."""
    path = engines_of(bundle) / f"{stage}.json"
    record = json.loads(path.read_bytes())
    edit(record)
    path.write_text(json.dumps(record))


def counted(double: Double, since: int = 0) -> Counter[str]:
    """Calls by name; copies by kind."""
    found: Counter[str] = Counter()
    for call in double.calls[since:]:
        kind = call.arguments.get("kind")
        found[f"{call.name} {kind.name}" if kind is not None and hasattr(kind, "name") else call.name] += 1
    return found
