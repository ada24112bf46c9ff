"""``--dtype``: which stages compute in 16 bits, what is said and refused, and how such bundles answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

import export.__main__
import export.convert
import runtime.inspect
from export.convert import ExportOptions, bundle_from_checkpoint, stage_dtype
from export.llm.qwen2 import OVERFLOWS
from export.precision import DTYPES, narrowed
from export.stages import Stage
from runtime import GenerationOptions, VideoQA
from runtime.bundle import Bundle
from runtime.errors import BackendError, CheckpointError
from tests.checkpoints import copied, rewrite
from tests.commands import Captured
from tests.conftest import GOLDEN, Recorded
from tests.families import FIXTURES
from tests.narrow import opened, session, share

Load = Callable[[str], Recorded]

# --- which dtype a stage computes in


def test_llms_that_leave_float16_say_so_with_a_source() -> None:
    said = {fixture.name: opened(fixture)[1].llm.overflows for fixture in FIXTURES}
    leaving = {"internvl2-qwen2-a", "qwen2vl-a", "aquila-a", "molmo-a", "mipha-a"}
    assert {name for name, reason in said.items() if reason} == leaving
    for name in leaving:
        assert re.fullmatch(r"[^\n]{,60} \(\S+/\S+#\d+, \S+/\S+#\d+\)", said[name])


def test_only_an_llm_known_to_leave_float16_gets_bfloat16_instead() -> None:
    notes: list[str] = []
    for fixture in FIXTURES:
        backbone = opened(fixture)[1]
        for dtype in DTYPES:
            asked: Any = dtype
            swaps = dtype == "float16" and bool(backbone.llm.overflows)
            assert stage_dtype("decode", asked, backbone, notes.append) == ("bfloat16" if swaps else dtype)
            assert stage_dtype("vision", asked, backbone, notes.append) == dtype
            assert stage_dtype("aggregate", asked, backbone, notes.append) == dtype
            assert stage_dtype("refine", asked, backbone, notes.append) == "float32"
    assert len(notes) == sum(bool(opened(fixture)[1].llm.overflows) for fixture in FIXTURES)


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (7e4, "float16", "weight weight of vision reaches 7e+04, which float16 cannot hold; use --dtype bfloat16"),
        (
            -3.4e38,
            "bfloat16",
            "weight weight of vision reaches -3.4e+38, which bfloat16 cannot hold; use --dtype float32",
        ),
    ],
)
def test_weights_outside_the_range_are_refused(value: float, dtype: str, said: str) -> None:
    linear = nn.Linear(3, 2, bias=False)
    linear.weight.data[1, 2] = value
    with pytest.raises(CheckpointError) as caught:
        narrowed(Stage("vision", linear, (torch.zeros(1, 3),), ("x",), ("y",), ({},)), DTYPES[dtype])
    assert str(caught.value) == said


def test_what_float32_does_not_refuse_is_not_refused_for_its_range() -> None:
    linear = nn.Linear(3, 2, bias=False)
    linear.weight.data[:] = torch.tensor([[65504.0, float("nan"), 0.0], [1.0, float("inf"), -65504.0]])
    narrowed(Stage("vision", linear, (torch.zeros(1, 3),), ("x",), ("y",), ({},)), torch.float16)
    assert linear.weight.dtype == torch.float16 and linear.weight[0, 0] == 65504


# --- bundles


def test_an_export_that_cannot_be_narrow_writes_nothing(tmp_path: Path) -> None:
    checkpoint = copied(GOLDEN / "internvl2-internlm2-a", tmp_path / "checkpoint")
    rewrite(checkpoint, lambda tensors: tensors["mlp1.1.weight"].__setitem__((0, 0), 1e6))
    with pytest.raises(CheckpointError, match=r"reaches 1e\+06.*use --dtype bfloat16$"):
        bundle_from_checkpoint(
            ExportOptions(str(checkpoint), tmp_path / "bundles" / "one", linvt="none", dtype="float16")
        )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_float16_bundle_answers_with_half_the_cache(
    export_bundle: Callable[..., Path], recorded: Load, capfd: Captured
) -> None:
    arrays = recorded("internvl2-internlm2-a")
    bundle = export_bundle("internvl2-internlm2-a", linvt="none", dtype="float16")
    with VideoQA.open(bundle) as qa:
        answer = qa.ask(
            qa.video(arrays["frames_u8"]),
            str(arrays["question"]).splitlines()[-1],
            GenerationOptions(max_new_tokens=16, ignore_eos=True, do_sample=False, repetition_penalty=1.0),
        )
        manifest = qa.bundle.manifest
        decoder: Any = qa.backend.decoder(64)
        decoder.step(arrays["inputs_embeds"][0, :3], np.arange(3)[None])
        values = 2 * manifest.layers * manifest.heads_kv * 64 * manifest.head_dim
        assert sum(value.tensor_size_in_bytes() for value in decoder.cache.values()) == 2 * values
    assert list(answer.token_ids) == arrays["greedy_ids"].tolist()
    assert runtime.inspect.main([str(bundle)]) == 0
    assert capfd.readouterr().out.count("computes in float16, stored in float16") == 2


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A bundle of LinVT and Qwen2 for which float16 was asked, and what was said about it."""
    notes: list[str] = []
    options = ExportOptions(
        str(GOLDEN / "linvt-internvl2-a"), tmp_path_factory.mktemp("mixed") / "bundle", dtype="float16"
    )
    return bundle_from_checkpoint(options, note=notes.append), notes


def test_each_stage_has_its_dtype_and_the_llms_is_explained(mixed: tuple[Path, list[str]]) -> None:
    bundle, notes = mixed
    assert {name: stage.compute for name, stage in Bundle.open(bundle).manifest.stages.items()} == {
        "vision": "float16",
        "refine": "float32",
        "aggregate": "float16",
        "decode": "bfloat16",
    }
    assert notes == [f"decode computes in bfloat16, not float16: {OVERFLOWS}"]
    refine = onnx.load(bundle / "refine.onnx", load_external_data=False)
    assert {weight.data_type for weight in refine.graph.initializer} <= {TensorProto.FLOAT, TensorProto.INT64}


def test_a_narrow_tta_is_near_what_was_recorded(mixed: tuple[Path, list[str]], recorded: Load) -> None:
    arrays = recorded("linvt-internvl2-a")
    for graph in ("aggregate.onnx", "aggregate.opset23.onnx"):
        feeds = {"visual": arrays["linvt_pooled_tokens"], "text": arrays["question_text_embeddings"]}
        (tokens,) = session(mixed[0] / graph).run(["tokens"], feeds)
        assert share(tokens, arrays["question_linvt_final_output"], graph) < 1e-2


def test_a_bfloat16_llm_is_refused_on_the_cpu_and_the_other_stages_run(
    mixed: tuple[Path, list[str]], recorded: Load
) -> None:
    with VideoQA.open(mixed[0]) as qa:
        video = qa.video(recorded("linvt-internvl2-a")["frames_u8"])
        with pytest.raises(BackendError) as caught:
            qa.ask(video, "What happens?")
    assert str(caught.value) == (
        "decode.onnx computes in bfloat16, which ONNX Runtime cannot on the CPU; use --backend cuda, or "
        "export with --dtype float32"
    )


def test_inspect_shows_what_each_stage_computes_in(mixed: tuple[Path, list[str]], capfd: Captured) -> None:
    assert runtime.inspect.main([str(mixed[0])]) == 0
    shown = re.findall(r"^  (\w+) .* MB, computes in (\w+), stored in (\w+)$", capfd.readouterr().out, re.MULTILINE)
    assert shown == [
        ("vision", "float16", "float16"),
        ("refine", "float32", "float32"),
        ("aggregate", "float16", "float16"),
        ("decode", "bfloat16", "bfloat16"),
    ]
    assert runtime.inspect.main([str(mixed[0]), "--json"]) == 0
    decode = json.loads(capfd.readouterr().out)["manifest"]["stages"]["decode"]
    assert {tensor["dtype"] for tensor in decode["inputs"] if tensor["name"].startswith("past_")} == {"bfloat16"}


def test_the_command_asks_for_the_dtype_and_prints_what_was_done_otherwise(
    monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    def fake(options: ExportOptions, progress: Callable[[str], None], note: Callable[[str], None]) -> None:
        note(f"asked for {options.dtype}, done otherwise")

    monkeypatch.setattr(export.convert, "bundle_from_checkpoint", fake)
    assert export.__main__.main(["checkpoint", "-o", "bundle", "--dtype", "float16"]) == 0
    assert "asked for float16, done otherwise" in capfd.readouterr().err.splitlines()
