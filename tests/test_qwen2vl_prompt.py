"""Qwen2-VL's prompts are the recorded and the published ones, token for token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from export.families.base import Route
from runtime.template import compiled, rendered
from tests.conftest import Recorded
from tests.qwen2vl import ABSENT, FOLDER, backbone_of, copied, edit

QUESTION = "What is happening in this video? Describe the frames."


@pytest.fixture(scope="module")
def arrays(recorded: Callable[[str], Recorded]) -> Recorded:
    return recorded(FOLDER.name)


def render(layout: str, messages: list[dict[str, Any]], route: Route = "images", **counts: int) -> str:
    prompt = backbone_of(route=route).prompt
    variables = {"frames": 0, "tokens": 0, "images": 0, "image_tokens": 0, **counts}
    return rendered(
        compiled(prompt.layouts[layout].template),
        messages=messages,
        add_generation_prompt=True,
        system=prompt.system,
        visual_token=prompt.layouts[layout].visual_token,
        image_token=prompt.image_token,
        **variables,
    )


def asking(*kinds: str) -> list[dict[str, Any]]:
    parts: list[dict[str, str]] = [{"type": kind} for kind in kinds]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


@pytest.mark.parametrize(
    ("prefix", "layout", "route", "kinds", "counts"),
    [
        ("", "frames", "images", ["video"], {"frames": 4, "tokens": 6}),
        ("video.", "frames", "video", ["video"], {"frames": 2, "tokens": 6}),
        ("linvt.", "video", "images", ["video"], {"frames": 4, "tokens": 8}),
        ("linvt.", "video", "video", ["video"], {"frames": 2, "tokens": 8}),
        ("", "frames", "images", ["image"] * 4, {"images": 4, "image_tokens": 6}),
        ("", "video", "images", ["image"] * 4, {"images": 4, "image_tokens": 6}),
        ("", "frames", "video", ["image"] * 4, {"images": 4, "image_tokens": 6}),
    ],
)
def test_a_prompt_is_the_recorded_one(
    arrays: Recorded, prefix: str, layout: str, route: Route, kinds: list[str], counts: dict[str, int]
) -> None:
    text = render(layout, asking(*kinds), route, **counts)
    assert text == bytes(arrays[f"{prefix}prompt_text"]).decode()
    encoding = Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(text, add_special_tokens=False)
    assert encoding.ids == arrays[f"{prefix}input_ids"][0].tolist()


def test_a_question_without_pictures_is_the_recorded_one(arrays: Recorded) -> None:
    text = render("frames", [{"role": "user", "content": "How many people are there?"}])
    assert text == bytes(arrays["text.prompt_text"]).decode()


@pytest.mark.parametrize("system", ["", "Answer briefly."])
def test_a_conversation_goes_on_as_in_the_published_template(system: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages: list[dict[str, Any]] = [
        *([{"role": "system", "content": system}] if system else []),
        *asking("image"),
        {"role": "assistant", "content": "Two cats."},
        {"role": "user", "content": [{"type": "text", "text": "And  here?\n"}, {"type": "video"}]},
        {"role": "assistant", "content": [{"type": "text", "text": " Nothing. "}]},
        {"role": "user", "content": "Sure?"},
    ]
    template = json.loads((FOLDER / "chat_template.json").read_text())["chat_template"]
    expected = render_jinja_template([messages], chat_template=template, add_generation_prompt=True)[0][0]
    found = render("video", messages, tokens=1, images=1, image_tokens=1)
    assert found == expected


def test_tokens_are_spelled_as_the_tokenizer_spells_the_ids(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_text((FOLDER / file).read_text().replace("<|video_pad|>", "<|film|>"))
    prompt = backbone_of(folder).prompt
    assert prompt.layouts["video"].visual_token == "<|film|>"
    assert {"<|film|>", "<|image_pad|>", "<|vision_start|>", "<|im_end|>"} <= set(prompt.reserved)


def test_tokens_are_spelled_as_published_where_no_file_lists_them(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "tokenizer.json").unlink()
    edit(folder, "tokenizer_config.json", "added_tokens_decoder", ABSENT)
    assert backbone_of(folder).prompt == backbone_of().prompt
