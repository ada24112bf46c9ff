"""Every form of LinVT, recorded, released or the paper's, in float32 or narrow weights, is its module as a graph."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from export.convert import ExportOptions, bundle_from_checkpoint
from export.linvt import LinVT
from export.linvt.layout import linvt_keys
from export.linvt.svr import SVR
from export.stages import Stage, aggregate_stage, refine_stage
from export.trace import onnx_from_stage
from runtime.bundle import Bundle
from runtime.linvt import LinVTConfig, paper, released
from runtime.manifest import FrameSpec
from tests.conftest import GOLDEN
from tests.graphs import Recorded, assert_close, run, session

WITH_LINVT = "linvt-internvl2-a"


# --- LinVT alone: the recorded module fixtures, and forms that were never released


def module_of(name: str, **changes: Any) -> LinVT:
    """A recorded LinVT module; ``changes`` overrides its choices."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    sizes = {"heads": config["num_heads"], "layers": config["num_layers"], "top_k": config["top_k"]}
    linvt = LinVT(released(config["embed_size"], queries=config["num_video_query_token"], **(sizes | changes)))
    linvt.load_state_dict(load_file(GOLDEN / name / "model.safetensors"))
    return linvt.requires_grad_(False).eval()


def opened(stage: Stage) -> ort.InferenceSession:
    model = onnx_from_stage(stage)
    onnx.checker.check_model(proto := ir.to_proto(model), full_check=True)
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def frames_of(config: LinVTConfig, tokens: int, maximum: int = 64) -> FrameSpec:
    least = config.min_frames(tokens)
    return FrameSpec(least, max(least, min(16, maximum)), maximum, tokens)


@cache
def recorded_refine(name: str, top_k: int) -> ort.InferenceSession:
    linvt = module_of(name, top_k=top_k)
    return opened(refine_stage(linvt, frames_of(linvt.config, 16)))


@pytest.mark.parametrize("name", ["linvt-a", "linvt-c"])
def test_the_recorded_modules_come_out_of_the_graphs(name: str, recorded: Recorded) -> None:
    arrays, linvt = recorded(name), module_of(name)
    found = run(recorded_refine(name, linvt.config.top_k), tokens=arrays["visual_tokens"])
    assert_close(found["scores"], arrays["scores"], "scores")
    np.testing.assert_array_equal(found["indices"], arrays["topk_indices"])
    assert_close(found["visual"], arrays["pooled_tokens"], "visual")
    aggregate = opened(aggregate_stage(linvt, 512))
    found = run(aggregate, visual=arrays["pooled_tokens"], text=arrays["text_embeddings"])
    assert_close(found["tokens"], arrays["final_output"], "tokens")


@pytest.mark.parametrize("top_k", [27, 3, 2, 1])
def test_other_numbers_of_kept_tokens_come_out_too(top_k: int, recorded: Recorded) -> None:
    arrays = recorded("linvt-c")
    found = run(recorded_refine("linvt-c", top_k), tokens=arrays["visual_tokens"])
    np.testing.assert_array_equal(found["indices"], arrays[f"k{top_k}_topk_indices"])
    assert_close(found["visual"], arrays[f"k{top_k}_pooled_tokens"], "visual")


def test_equal_frames_give_equal_values_whichever_token_stands_first(recorded: Recorded) -> None:
    arrays = recorded("linvt-c")
    found = run(recorded_refine("linvt-c", 26), tokens=arrays["dup_visual_tokens"])
    assert_close(found["scores"], arrays["dup_scores"], "scores")
    assert_close(found["scores"][0][found["indices"][0]], arrays["dup_topk_scores"][0], "kept scores")
    assert_close(found["visual"], arrays["dup_pooled_tokens"], "visual")


PAPER = paper(32, tokens_per_frame=4, max_frames=9, heads=4, layers=2, top_k=10, queries=6)
FORMS = {
    "paper": PAPER,
    "paper, residual, by position": msgspec.structs.replace(PAPER, residual="add", order="position"),
    "released, by position": released(32, heads=4, layers=2, top_k=10, queries=6, order="position"),
    "one frame suffices": msgspec.structs.replace(PAPER, top_k=4, pool_scales=(1, 2)),
    "one number of frames": msgspec.structs.replace(PAPER, top_k=10, max_frames=3),
    "one frame only": msgspec.structs.replace(PAPER, top_k=2, max_frames=1),
}


def random_linvt(config: LinVTConfig, seed: int = 0) -> LinVT:
    torch.manual_seed(seed)
    linvt = LinVT(config)
    for parameter in linvt.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return linvt.requires_grad_(False).eval()


@cache
def form_refine(form: str) -> tuple[LinVT, FrameSpec, ort.InferenceSession]:
    config = FORMS[form]
    linvt, spec = random_linvt(config), frames_of(config, 4, config.max_frames or 64)
    return linvt, spec, opened(refine_stage(linvt, spec))


def pooled_at(svr: SVR, tokens: torch.Tensor, indices: NDArray[np.int64]) -> NDArray[Any]:
    """What pooling gives for a selection in which close scores may have changed places."""
    placed = svr.place(tokens)
    chosen = svr.attend(placed) if svr.config.select_from == "refined" else placed
    return svr.pool(chosen.flatten(1, 2), torch.from_numpy(indices)).numpy()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_its_module_at_every_frame_count(form: str) -> None:
    linvt, spec, refine = form_refine(form)
    for frames in sorted({spec.minimum, min(spec.minimum + 1, spec.maximum), spec.maximum}):
        tokens = torch.randn(1, frames, 4, 32)
        expected = linvt.svr(tokens)
        found = run(refine, tokens=tokens.numpy())
        indices, scores = found["indices"][0], expected.scores.numpy()[0]
        assert_close(found["scores"][0], scores, f"{frames} frames: scores")
        assert_close(np.sort(scores[indices]), np.sort(scores)[-len(indices) :], f"{frames} frames: kept", 1e-6)
        assert_close(found["visual"], pooled_at(linvt.svr, tokens, found["indices"]), f"{frames} frames: visual")
        steps = np.diff(indices) if linvt.config.order == "position" else 1e-6 - np.diff(scores[indices])
        assert np.all(steps > 0), "the order of the kept tokens"


def test_the_paper_s_aggregation_is_its_module_at_every_question_length() -> None:
    linvt = random_linvt(PAPER)
    aggregate = opened(aggregate_stage(linvt, 128))
    linvt = random_linvt(PAPER)  # the stage takes dead weights out of the one it was given
    visual = torch.randn(1, PAPER.pooled_tokens, 32)
    for length in (1, 2, 128):
        text = torch.randn(1, length, 32)
        found = run(aggregate, visual=visual.numpy(), text=text.numpy())["tokens"]
        assert_close(found, linvt.aggregate(visual, text).numpy(), f"{length} rows of text")


def test_tied_scores_stand_in_the_order_of_the_video() -> None:
    linvt, _, refine = form_refine("released, by position")
    alike = np.tile(np.random.default_rng(0).standard_normal(32).astype(np.float32), (1, 5, 4, 1))
    found = run(refine, tokens=alike)
    assert np.ptp(found["scores"]) < 1e-6
    assert len(found["indices"][0]) == linvt.config.top_k and np.all(np.diff(found["indices"][0]) > 0)
    assert_close(found["visual"], linvt.svr(torch.from_numpy(alike)).visual.numpy(), "visual")


# --- whole checkpoints of other forms


@pytest.fixture(scope="module")
def paper_bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LinVT]:
    """A checkpoint in bfloat16 with the paper's LinVT in its config keys, exported; and that LinVT in float32."""
    folder = tmp_path_factory.mktemp("paper") / "checkpoint"
    shutil.copytree(GOLDEN / WITH_LINVT, folder, ignore=shutil.ignore_patterns("expected.npz"))
    config = paper(48, tokens_per_frame=4, max_frames=8, heads=4, layers=2, top_k=7, queries=5, residual="add")
    torch.manual_seed(5)
    linvt = LinVT(config)
    tensors = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "linVT" not in name}
    tensors |= linvt.state_dict()
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text()) | linvt_keys(config)
    (folder / "config.json").write_text(json.dumps(content))
    linvt.load_state_dict({name: tensors[name].float() for name in linvt.state_dict()})
    bundle = bundle_from_checkpoint(ExportOptions(str(folder), folder.parent / "bundle"))
    return bundle, linvt.requires_grad_(False).eval()


def test_a_checkpoint_says_in_its_keys_that_it_is_the_paper_s(paper_bundle: tuple[Path, LinVT]) -> None:
    bundle, linvt = paper_bundle
    manifest = Bundle.open(bundle).manifest
    assert manifest.linvt == linvt.config
    assert (manifest.frames.minimum, manifest.frames.default, manifest.frames.maximum) == (2, 8, 8)
    refine, aggregate = session(bundle, "refine"), session(bundle, "aggregate")
    for frames in (2, 3, 8):
        tokens = torch.randn(1, frames, 4, 48)
        expected = linvt.svr(tokens)
        found = run(refine, tokens=tokens.numpy())
        np.testing.assert_array_equal(found["indices"], expected.indices.numpy())
        assert_close(found["visual"], expected.visual.numpy(), f"{frames} frames: visual")
        text = torch.randn(1, frames, 48)
        found = run(aggregate, visual=expected.visual.numpy(), text=text.numpy())
        assert_close(found["tokens"], linvt.aggregate(expected.visual, text).numpy(), f"{frames} rows: tokens")


def test_a_narrow_checkpoint_makes_a_bundle_of_half_the_size(
    paper_bundle: tuple[Path, LinVT], linvt_bundle: Path
) -> None:
    bundle, _ = paper_bundle
    manifest = Bundle.open(bundle).manifest
    assert {stage.storage for stage in manifest.stages.values()} == {"bfloat16"}
    assert {stage.compute for stage in manifest.stages.values()} == {"float32"}
    for name in ("vision.onnx.data", "decode.onnx.data", "embedding.safetensors"):
        narrow, wide = (folder.joinpath(name).stat().st_size for folder in (bundle, linvt_bundle))
        assert narrow < 0.56 * wide, name


def test_narrow_weights_give_the_bits_of_their_float32_form(paper_bundle: tuple[Path, LinVT]) -> None:
    bundle, _ = paper_bundle
    narrow, wide = (onnx.load(bundle / "vision.onnx") for _ in range(2))
    stored = {weight.name: weight for weight in wide.graph.initializer}
    for node in [node for node in wide.graph.node if node.op_type == "Cast" and node.input[0] in stored]:
        array = onnx.numpy_helper.to_array(stored[node.input[0]]).astype(np.float32)
        wide.graph.initializer.append(onnx.numpy_helper.from_array(array, node.output[0]))
        wide.graph.node.remove(node)
    assert len(wide.graph.node) < len(narrow.graph.node)
    pixel_values = np.random.default_rng(0).standard_normal((3, 3, 56, 56)).astype(np.float32)
    results = [
        ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, {"pixel_values": pixel_values}
        )[0]
        for model in (narrow, wide)
    ]
    np.testing.assert_array_equal(*results)
