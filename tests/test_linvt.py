"""LinVT in PyTorch is the released module, number for number, and the paper's form keeps its promises."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from export.linvt import LinVT, LinVTConfig, paper
from export.linvt.svr import over_frames, over_positions
from tests.conftest import GOLDEN, Recorded

Load = Callable[[str], Recorded]

SIZES = {"tokens_per_frame": 9, "max_frames": 12, "heads": 4, "layers": 2, "top_k": 14, "queries": 5}


def module_of(name: str, **changes: object) -> LinVT:
    """The fixture's module with its weights; ``changes`` override its configuration."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    sizes = {
        "heads": config["num_heads"],
        "layers": config["num_layers"],
        "top_k": config["top_k"],
        "queries": config["num_video_query_token"],
    }
    linvt = LinVT(LinVTConfig(config["embed_size"], **(sizes | changes)))  # type: ignore[arg-type]
    linvt.load_state_dict(load_file(GOLDEN / name / "model.safetensors"))  # strict: names and shapes are the released
    return linvt.eval()


def fresh(config: LinVTConfig) -> LinVT:
    """A module with random weights large enough for scores to differ."""
    linvt = LinVT(config)
    with torch.no_grad():
        for parameter in linvt.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return linvt.eval()


def tensors(arrays: Recorded, *names: str) -> list[torch.Tensor]:
    return [torch.tensor(arrays[name]) for name in names]


def largest(found: torch.Tensor, expected: np.ndarray) -> float:  # type: ignore[type-arg]
    difference = float(np.abs(found.detach().numpy() - expected).max())
    print(f"largest difference {difference:.2e}")
    return difference


@pytest.mark.parametrize("name", ["linvt-a", "linvt-c"])
def test_every_recorded_stage_is_reproduced(name: str, recorded: Load) -> None:
    arrays, linvt = recorded(name), module_of(name)
    visual, text = tensors(arrays, "visual_tokens", "text_embeddings")
    with torch.no_grad():
        refined = visual
        for index, layer in enumerate(linvt.svr.attention_network.layers):
            refined = layer(refined)
            assert largest(refined, arrays[f"svr_layer{index}_out"]) < 1e-4
        assert largest(linvt.svr.attend(visual), arrays["svr_attention_out"]) < 1e-4
        selection = linvt.svr(visual)
        assert largest(selection.scores, arrays["scores"]) < 1e-4
        np.testing.assert_array_equal(selection.indices.numpy(), arrays["topk_indices"])
        assert largest(selection.visual, arrays["pooled_tokens"]) < 1e-4
        scales = np.concatenate([arrays[f"pooled_scale{scale}"] for scale in (1, 2, 4)], axis=1)
        assert largest(selection.visual, scales) < 1e-4
        query = linvt.query_tokens
        for index, layer in enumerate(linvt.tta.layers_vt):
            query = layer(query, selection.visual, text, None)
            assert largest(query, arrays[f"tta_layer{index}_query"]) < 1e-4
        assert largest(linvt(visual, text), arrays["final_output"]) < 1e-4


@pytest.mark.parametrize("name", ["linvt-a", "linvt-c"])
def test_every_attention_inside_a_layer_is_the_recorded_one(name: str, recorded: Load) -> None:
    arrays, linvt = recorded(name), module_of(name)
    visual, text = tensors(arrays, "visual_tokens", "text_embeddings")
    with torch.no_grad():
        layer = linvt.svr.attention_network.layers[0]
        first = over_frames(layer.spatial_attention, visual)
        assert largest(first[0], arrays["svr_layer0_first_mha_raw"]) < 1e-4
        second = over_positions(layer.temporal_attention, first)
        assert largest(second[0].transpose(0, 1), arrays["svr_layer0_second_mha_raw"]) < 1e-4
        pooled = linvt.svr(visual).visual
        query = linvt.query_tokens
        for index, layer in enumerate(linvt.tta.layers_vt):
            after_self = layer.norm_self(query + layer.self_attention(query))
            assert largest(after_self, arrays[f"tta_layer{index}_after_self"]) < 1e-4
            after_visual = layer.norm_cross_v(after_self + layer.visual_cross_attention(after_self, pooled))
            assert largest(after_visual, arrays[f"tta_layer{index}_after_visual_cross"]) < 1e-4
            query = layer(query, pooled, text, None)


@pytest.mark.parametrize("name", ["linvt-a", "linvt-c"])
def test_without_multi_scale_only_the_selected_tokens_remain(name: str, recorded: Load) -> None:
    arrays, linvt = recorded(name), module_of(name, pool_scales=(1,))
    with torch.no_grad():
        found = linvt(*tensors(arrays, "visual_tokens", "text_embeddings"))
    assert largest(found, arrays["final_output_no_multi_scale"]) < 1e-4


@pytest.mark.parametrize("top_k", [27, 3, 2, 1])
def test_windows_that_do_not_fit_are_dropped_and_scales_that_do_not_fit_are_skipped(top_k: int, recorded: Load) -> None:
    arrays, linvt = recorded("linvt-c"), module_of("linvt-c", top_k=top_k)
    visual, text = tensors(arrays, "visual_tokens", "text_embeddings")
    with torch.no_grad():
        selection = linvt.svr(visual)
        np.testing.assert_array_equal(selection.indices.numpy(), arrays[f"k{top_k}_topk_indices"])
        assert largest(selection.visual, arrays[f"k{top_k}_pooled_tokens"]) < 1e-4
        assert largest(linvt(visual, text), arrays[f"k{top_k}_final_output"]) < 1e-4
    assert selection.visual.shape[1] == linvt.config.pooled_tokens


def test_equal_frames_tie_and_the_values_do_not_depend_on_who_wins(recorded: Load) -> None:
    arrays, linvt = recorded("linvt-c"), module_of("linvt-c")
    visual, text = tensors(arrays, "dup_visual_tokens", "text_embeddings")
    with torch.no_grad():
        selection = linvt.svr(visual)
        assert largest(selection.visual, arrays["dup_pooled_tokens"]) < 1e-4
        assert largest(linvt(visual, text), arrays["dup_final_output"]) < 1e-4


def test_weights_that_no_formula_reads_change_nothing(recorded: Load) -> None:
    arrays, linvt = recorded("linvt-a"), module_of("linvt-a")
    inputs = tensors(arrays, "visual_tokens", "text_embeddings")
    with torch.no_grad():
        before = linvt(*inputs)
        aggregator = linvt.tta.layer_linagg.linear_aggregator
        for dead in (aggregator.wv.weight, aggregator.dense.weight):
            dead.normal_()
        for layer in linvt.tta.layers_vt:
            layer.self_attention.in_proj_weight[: 2 * linvt.config.width].normal_()
        assert torch.equal(linvt(*inputs), before)


def test_the_released_form_does_not_see_the_order_of_frames_positions_or_words() -> None:
    linvt = module_of("linvt-a")  # released weights collapse scores where they are small; the fixture's are not
    visual, text = torch.randn(1, 6, 9, 64), torch.randn(1, 7, 64)
    with torch.no_grad():
        expected = linvt(visual, text)
        for shuffled in (
            (visual[:, torch.randperm(6)], text),
            (visual[:, :, torch.randperm(9)], text),
            (visual, text[:, torch.randperm(7)]),
        ):
            torch.testing.assert_close(linvt(*shuffled), expected, atol=1e-3, rtol=1e-3)


def test_the_paper_form_sees_the_order_of_frames() -> None:
    linvt = fresh(paper(32, **SIZES))
    visual, text = torch.randn(1, 6, 9, 32), torch.randn(1, 7, 32)
    with torch.no_grad():
        assert not torch.allclose(linvt(visual, text), linvt(visual.flip(1), text), atol=1e-3)


def test_the_paper_form_hands_on_input_tokens_not_attended_ones() -> None:
    linvt = fresh(paper(32, **SIZES))
    visual = torch.randn(1, 6, 9, 32)
    with torch.no_grad():
        selection = linvt.svr(visual)
        placed = linvt.svr.place(visual).flatten(1, 2)[0]
    torch.testing.assert_close(selection.visual[0, : linvt.config.top_k], placed[selection.indices[0]])


def test_the_result_is_linear_in_the_visual_tokens_once_weights_are_chosen() -> None:
    """Every channel group of the result lies in the convex hull of the pooled tokens: within their extremes."""
    linvt = fresh(paper(32, **SIZES))
    visual, text = torch.randn(1, 6, 9, 32), torch.randn(1, 7, 32)
    with torch.no_grad():
        pooled, result = linvt.svr(visual).visual, linvt(visual, text)
    assert (result <= pooled.amax(1, keepdim=True) + 1e-5).all()
    assert (result >= pooled.amin(1, keepdim=True) - 1e-5).all()


def test_tokens_in_order_of_position_are_the_same_tokens() -> None:
    config = paper(32, **SIZES)
    linvt = fresh(config)
    scores = torch.randn(1, 54)
    by_score = linvt.svr.select(scores)
    linvt.svr.config = LinVTConfig(**{**{f: getattr(config, f) for f in config.__struct_fields__}, "order": "position"})
    by_position = linvt.svr.select(scores)
    assert torch.equal(by_position, by_score.sort().values)


@pytest.mark.parametrize("form", ["released", "paper"])
def test_clips_of_a_batch_do_not_mix_and_padded_words_do_not_count(form: str) -> None:
    linvt = module_of("linvt-a") if form == "released" else fresh(paper(64, **SIZES))
    visual, text = torch.randn(3, 6, 9, 64), torch.randn(3, 7, 64)
    mask = torch.ones(3, 1, 1, 7, dtype=torch.bool)
    mask[1, ..., 4:] = False
    with torch.no_grad():
        together = linvt(visual, text, mask)
        alone = [linvt(visual[i : i + 1], text[i : i + 1, : 4 if i == 1 else 7]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_gradients_reach_every_weight_that_is_read() -> None:
    linvt = LinVT(paper(32, **SIZES, residual="add"))
    selection = linvt.svr(torch.randn(2, 6, 9, 32))
    loss = linvt.aggregate(selection.visual, torch.randn(2, 7, 32)).square().sum() + selection.scores.square().sum()
    loss.backward()
    still = {name for name, parameter in linvt.named_parameters() if parameter.grad is None}
    dead = "linVT.tta_module.layer_linagg.linear_aggregator."
    assert still == {dead + end for end in ("wv.weight", "wv.bias", "dense.weight", "dense.bias")}


@pytest.mark.parametrize(
    "changes", [{"heads": 3}, {"top_k": 0}, {"pool_scales": (32,)}, {"positions": "absolute"}, {"layers": -1}]
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"LinVT|scale|positions"):
        LinVTConfig(32, **({"top_k": 14} | changes))  # type: ignore[arg-type]
