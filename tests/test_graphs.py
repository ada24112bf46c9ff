"""A bundle's graphs keep their contract of names, shapes and standard ONNX, and say what the original code said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from runtime.bundle import Bundle
from tests.graphs import Recorded, assert_close, run, session

ROOT = Path(__file__).parents[1]
WITH_LINVT, PLAIN = "linvt-internvl2-a", "internvl2-qwen2-a"
FULL = ("aggregate", "decode", "refine", "vision")


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
