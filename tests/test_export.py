"""A checkpoint becomes a bundle: graphs that say what the original code said, and commands that refuse in one line."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
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

from export import convert
from export.__main__ import main
from export.convert import ExportOptions, bundle_from_checkpoint
from export.linvt import LinVT
from export.linvt.layout import linvt_keys
from export.linvt.svr import SVR
from export.stages import Stage, aggregate_stage, refine_stage
from export.trace import onnx_from_stage
from runtime.bundle import Bundle
from runtime.linvt import LinVTConfig, paper, released
from runtime.manifest import FrameSpec

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[1]
WITH_LINVT, PLAIN = "linvt-internvl2-a", "internvl2-qwen2-a"
FULL = ("aggregate", "decode", "refine", "vision")

Arrays = dict[str, NDArray[Any]]
Recorded = Callable[[str], Arrays]


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch, linvt_bundle: Path) -> None:
    """Export as always, but take each graph from the bundle that was traced before."""

    def loaded(stage: Stage) -> ir.Model:
        return ir.load(linvt_bundle / f"{stage.name}.onnx")

    monkeypatch.setattr(convert, "onnx_from_stage", loaded)


def session(bundle: Path, stage: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(bundle / f"{stage}.onnx", options, providers=["CPUExecutionProvider"])


def run(opened: ort.InferenceSession, **feeds: NDArray[Any]) -> Arrays:
    names = [output.name for output in opened.get_outputs()]
    return dict(zip(names, opened.run(names, feeds), strict=True))


def assert_close(found: NDArray[Any], expected: NDArray[Any], what: str, limit: float = 1e-4) -> None:
    assert found.shape == expected.shape, what
    difference = float(np.abs(found - expected).max())
    print(f"{what}: {difference:.1e}")
    assert difference <= limit, what


# --- the graphs' contract


def dimensions(values: Any) -> dict[str, tuple[str, list[int | str]]]:
    return {
        value.name: (
            onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type),
            [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


def test_the_names_and_shapes_are_the_contract_s(linvt_bundle: Path) -> None:
    graphs = {stage: onnx.load(linvt_bundle / f"{stage}.onnx", load_external_data=False).graph for stage in FULL}
    cache: list[int | str] = [1, 2, "capacity", 12]
    layers = [f"{part}.{layer}" for layer in range(2) for part in ("key", "value")]
    assert {stage: dimensions(graph.input) for stage, graph in graphs.items()} == {
        "vision": {"pixel_values": ("FLOAT", ["frames", 3, 56, 56])},
        "refine": {"tokens": ("FLOAT", [1, "frames", 4, 48])},
        "aggregate": {"visual": ("FLOAT", [1, 21, 48]), "text": ("FLOAT", [1, "text", 48])},
        "decode": {
            "inputs_embeds": ("FLOAT", [1, "sequence", 48]),
            "position_ids": ("INT64", [1, "sequence"]),
            "write_index": ("INT64", [1]),
            **{f"past_{layer}": ("FLOAT", cache) for layer in layers},
        },
    }
    outputs = {stage: dimensions(graph.output) for stage, graph in graphs.items()}
    assert outputs.pop("refine") == {
        "visual": ("FLOAT", [1, 21, 48]),
        "indices": ("INT64", [1, 12]),
        "scores": ("FLOAT", [1, "4*frames"]),
    }
    assert outputs == {
        "vision": {"tokens": ("FLOAT", ["frames", 4, 48])},
        "aggregate": {"tokens": ("FLOAT", [1, 8, 48])},
        "decode": {"logits": ("FLOAT", [1, 420]), **{f"present_{layer}": ("FLOAT", cache) for layer in layers}},
    }


@pytest.mark.parametrize("stage", FULL)
def test_a_graph_is_standard_onnx_and_one_node_of_ours_with_a_body(linvt_bundle: Path, stage: str) -> None:
    path = linvt_bundle / f"{stage}.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 24
    foreign = [(node.domain, node.op_type) for node in model.graph.node if node.domain]
    assert foreign == ([("linvt", "GatherPool")] if stage == "refine" else [])
    assert [(body.domain, body.name) for body in model.functions] == foreign
    assert not {node.domain for body in model.functions for node in body.node} - {""}


def test_no_weight_is_transposed_while_running(linvt_bundle: Path) -> None:
    for stage in FULL:
        graph = onnx.load(linvt_bundle / f"{stage}.onnx", load_external_data=False).graph
        weights = {weight.name for weight in graph.initializer}
        assert not [node.name for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]


def test_dead_weights_are_not_in_the_graphs(linvt_bundle: Path) -> None:
    model = onnx.load(linvt_bundle / "aggregate.onnx", load_external_data=False)
    names = [weight.name for weight in model.graph.initializer]
    assert not [name for name in names if "linear_aggregator.wv" in name or "linear_aggregator.dense" in name]
    packed = [weight for weight in model.graph.initializer if "self_attention.in_proj_weight" in weight.name]
    assert {tuple(weight.dims) for weight in packed} == {(48, 48)}


def test_a_bundle_holds_nothing_of_the_machine_that_made_it(linvt_bundle: Path) -> None:
    traces = [b"/tmp", b"/root", b"/home", b"site-packages", str(ROOT).encode(), b"stack_trace", b".py"]
    for path in linvt_bundle.iterdir():
        found = [trace for trace in traces if trace in path.read_bytes()]
        assert not found, f"{path.name} holds {found}"


def test_the_bundle_opens_and_lists_all_its_files(linvt_bundle: Path, plain_bundle: Path) -> None:
    for bundle, stages in ((linvt_bundle, FULL), (plain_bundle, ("decode", "vision"))):
        manifest = Bundle.open(bundle, verify=True).manifest
        assert tuple(sorted(manifest.stages)) == stages
        assert set(manifest.files) | {"bundle.json"} == {path.name for path in bundle.iterdir()}


# --- the graphs' numbers


def test_vision_is_the_original_s(linvt_bundle: Path, plain_bundle: Path, recorded: Recorded) -> None:
    for name, bundle in ((WITH_LINVT, linvt_bundle), (PLAIN, plain_bundle)):
        arrays, vision = recorded(name), session(bundle, "vision")
        assert_close(run(vision, pixel_values=arrays["pixel_values"])["tokens"], arrays["visual_tokens"], name)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
def test_vision_takes_any_number_of_frames(linvt_bundle: Path, recorded: Recorded, frames: int) -> None:
    arrays = recorded(WITH_LINVT)
    found = run(session(linvt_bundle, "vision"), pixel_values=arrays["pixel_values"][:frames])["tokens"]
    assert_close(found, arrays["visual_tokens"][:frames], f"{frames} frames")


def test_refine_and_aggregate_are_the_original_s(linvt_bundle: Path, recorded: Recorded) -> None:
    arrays = recorded(WITH_LINVT)
    found = run(session(linvt_bundle, "refine"), tokens=arrays["visual_tokens"][None])
    assert_close(found["scores"], arrays["linvt_scores"], "scores")
    np.testing.assert_array_equal(found["indices"], arrays["linvt_topk_indices"])
    assert_close(found["visual"], arrays["linvt_pooled_tokens"], "visual")
    aggregate = session(linvt_bundle, "aggregate")
    for text, expected in (("text_embeddings", "linvt_final_output"), ("question_text_embeddings",) * 2):
        expected = expected if expected.startswith("linvt") else "question_linvt_final_output"
        found = run(aggregate, visual=arrays["linvt_pooled_tokens"], text=arrays[text])
        assert_close(found["tokens"], arrays[expected], expected)


@pytest.mark.parametrize("name", [WITH_LINVT, PLAIN])
@pytest.mark.parametrize("extra", [0, 1, 64])
def test_decode_is_the_original_s_in_one_step_and_in_many(
    linvt_bundle: Path, plain_bundle: Path, recorded: Recorded, name: str, extra: int
) -> None:
    decode = session({WITH_LINVT: linvt_bundle, PLAIN: plain_bundle}[name], "decode")
    arrays = recorded(name)
    embeds, logits = arrays["inputs_embeds"], arrays["logits"][0]
    length = embeds.shape[1]
    pasts = {value.name: value.shape for value in decode.get_inputs() if value.name.startswith("past_")}
    caches = {past: np.zeros((1, shape[1], length + extra, shape[3]), np.float32) for past, shape in pasts.items()}
    at = 0
    for rows in (length - 20, 1, 1, 17, 1):  # prefill, single tokens, a second prefill
        found = run(
            decode,
            inputs_embeds=embeds[:, at : at + rows],
            position_ids=np.arange(at, at + rows)[None],
            write_index=np.array([at]),
            **caches,
        )
        caches = {past: found[past.replace("past", "present")] for past in caches}
        at += rows
        assert_close(found["logits"][0], logits[at - 1], f"logits after {at} of {length} rows")
    assert at == length


def test_every_prefix_of_the_prompt_has_the_original_s_logits(linvt_bundle: Path, recorded: Recorded) -> None:
    arrays, decode = recorded(WITH_LINVT), session(linvt_bundle, "decode")
    embeds = arrays["inputs_embeds"]
    caches = {f"past_{part}.{i}": np.zeros((1, 2, 160, 12), np.float32) for part in ("key", "value") for i in range(2)}
    for rows in range(1, embeds.shape[1] + 1, 9):
        feeds = {"inputs_embeds": embeds[:, :rows], "position_ids": np.arange(rows)[None], "write_index": np.array([0])}
        assert_close(run(decode, **feeds, **caches)["logits"], arrays["logits"][:, rows - 1], f"prefix of {rows}")


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


# --- the command


def test_the_command_writes_the_same_bytes_and_only_its_steps(linvt_bundle: Path, tmp_path: Path) -> None:
    """In a process of its own, from a sharded copy, into a folder with an odd name."""
    checkpoint = tmp_path / WITH_LINVT
    shutil.copytree(GOLDEN / WITH_LINVT, checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(tensors)
    for file, part in {"a.safetensors": names[::2], "b.safetensors": names[1::2]}.items():
        save_file({name: tensors[name] for name in part}, checkpoint / file)
    done = subprocess.run(
        [sys.executable, "-m", "export", str(checkpoint), "-o", str(tmp_path / "ein Bündel 🎬") + "/"],
        cwd=ROOT,
        env=os.environ | {"PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0 and done.stdout == ""
    steps = [line.split()[1] for line in done.stderr.splitlines()[:-1]]
    assert steps == ["checkpoint", "vision", "refine", "aggregate", "decode", "embedding", "manifest"]
    assert done.stderr.splitlines()[-1].startswith("wrote ")
    written = tmp_path / "ein Bündel 🎬"
    assert sorted(path.name for path in written.iterdir()) == sorted(path.name for path in linvt_bundle.iterdir())
    for path in written.iterdir():
        assert path.read_bytes() == (linvt_bundle / path.name).read_bytes(), path.name


@pytest.mark.usefixtures("untraced")
def test_linvt_weights_of_their_own_make_the_same_graphs(tmp_path: Path, linvt_bundle: Path) -> None:
    tensors = load_file(GOLDEN / WITH_LINVT / "model.safetensors")
    linvt = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("linVT.", "query_tokens"))}
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / WITH_LINVT, checkpoint)
    save_file(tensors, checkpoint / "model.safetensors")
    save_file(linvt, tmp_path / "linvt.safetensors")
    assert main([str(checkpoint), "-o", str(tmp_path / "b"), "--linvt", str(tmp_path / "linvt.safetensors")]) == 0
    manifests = [Bundle.open(bundle).manifest for bundle in (tmp_path / "b", linvt_bundle)]
    assert manifests[0].linvt == manifests[1].linvt
    assert manifests[0].provenance["linvt"] == "linvt.safetensors"


@pytest.mark.usefixtures("untraced")
def test_options_reach_the_manifest(tmp_path: Path) -> None:
    options = ["--frames", "7", "--layout", "training", "--text-input", "released_slice"]
    assert main([str(GOLDEN / WITH_LINVT), "-o", str(tmp_path / "b"), *options]) == 0
    manifest = Bundle.open(tmp_path / "b").manifest
    assert (manifest.frames.minimum, manifest.frames.default, manifest.prompt.text_input) == (3, 7, "released_slice")
    assert "loop.last" in (tmp_path / "b" / "chat_template.jinja").read_text()


REFUSED = {
    "unknown checkpoint": (["no-such-folder", "-o", "b"], 1, "is not a checkpoint"),
    "no output": ([WITH_LINVT], 2, "--output"),
    "odd layout": ([WITH_LINVT, "-o", "b", "--layout", "sideways"], 2, "--layout"),
    "frames": ([WITH_LINVT, "-o", "b", "--frames", "1"], 1, "--frames 1 is outside what the model takes: 3 to 512"),
    "frames in words": ([WITH_LINVT, "-o", "b", "--frames", "many"], 2, "--frames"),
    "no linvt": ([PLAIN, "-o", "b"], 1, "give --linvt WEIGHTS, or --linvt none"),
    "other linvt": ([PLAIN, "-o", "b", "--linvt", f"{WITH_LINVT}/model.safetensors"], 1, "belong to another LLM"),
    "existing": ([WITH_LINVT, "-o", "taken"], 1, "exists; choose another --output or give --force"),
    "not a bundle": ([WITH_LINVT, "-o", "taken", "--force"], 1, "is not a bundle"),
    "below a file": ([WITH_LINVT, "-o", "taken/file/b"], 1, "cannot write"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_line_and_a_code(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, code, reason = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    for name in (WITH_LINVT, PLAIN):
        Path(name).symlink_to(GOLDEN / name)
    Path("taken").mkdir()
    Path("taken/file").touch()
    before = sorted(tmp_path.iterdir())
    try:
        found = main(arguments)
    except SystemExit as end:
        found = end.code  # type: ignore[assignment]
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("export: ")]
    assert found == code and out == ""
    assert len(lines) == 1 and lines[0].startswith("linvt-export: ") and reason in lines[0]
    assert err.splitlines()[-1] == lines[0]
    assert sorted(tmp_path.iterdir()) == before


STEPS = ("checkpoint", "vision", "refine", "aggregate", "decode", "embedding", "manifest")


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_an_interruption_at_any_step_leaves_what_was_there(
    step: str, force: bool, tmp_path: Path, linvt_bundle: Path
) -> None:
    target = tmp_path / "bundle"
    if force:
        shutil.copytree(linvt_bundle, target)
    before = {path: path.read_bytes() for path in target.rglob("*")}

    def interrupt(begun: str) -> None:
        if begun == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundle_from_checkpoint(ExportOptions(str(GOLDEN / WITH_LINVT), target, force=force), interrupt)
    assert {path: path.read_bytes() for path in target.rglob("*")} == before
    assert list(tmp_path.iterdir()) == ([target] if force else [])


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 100 kB: every graph's weights are larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("untraced", "small_disk")
def test_a_disk_that_is_full_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN / WITH_LINVT), "-o", str(tmp_path / "b")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"linvt-export: cannot write {tmp_path / 'b'}: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("untraced")
def test_an_embedding_table_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors import SafetensorError

    def full(*arguments: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(convert, "save_file", full)
    assert main([str(GOLDEN / WITH_LINVT), "-o", str(tmp_path / "b")]) == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


# --- optimum-cli


def optimum_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """Run ``optimum-cli`` with our register file in the place where optimum looks for such files."""
    optimum = pytest.importorskip("optimum.commands.optimum_cli")
    from export.optimum_command import REGISTER_COMMANDS

    monkeypatch.setattr(optimum, "load_optimum_namespace_cli_commands", lambda: REGISTER_COMMANDS)
    monkeypatch.setattr(sys, "argv", ["optimum-cli", *arguments])
    try:
        optimum.main()
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.usefixtures("untraced")
def test_optimum_lists_and_runs_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], linvt_bundle: Path
) -> None:
    assert optimum_cli(monkeypatch, "export", "--help") == 0
    assert "linvt" in capsys.readouterr().out
    arguments = ("export", "linvt", "--model", str(GOLDEN / WITH_LINVT), str(tmp_path / "b"))
    assert optimum_cli(monkeypatch, *arguments) == 0
    assert (tmp_path / "b" / "bundle.json").read_bytes() == (linvt_bundle / "bundle.json").read_bytes()
    capsys.readouterr()
    assert optimum_cli(monkeypatch, *arguments) == 1
    assert [line[:21] for line in capsys.readouterr().err.splitlines()] == [f"linvt-export: {tmp_path}"[:21]]


def test_the_wheel_puts_the_register_file_where_optimum_looks() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '"export/optimum_command.py" = "optimum/commands/register/register_linvt.py"' in text
