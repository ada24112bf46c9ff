"""A LinVT checkpoint answers as the original code recorded it, in the chat layout and in that of its training data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtime import GenerationOptions, VideoQA
from runtime.answer import Stopwatch
from runtime.embedding import prompt_rows
from runtime.seen import visuals_of
from tests.conftest import Recorded

NAME = "linvt-internvl2-a"
GREEDY = GenerationOptions(max_new_tokens=16, ignore_eos=True)
LAYOUTS = {  # options of the export -> the arrays recorded for it
    "chat": ({}, "chat_greedy_ids", "chat_logits_last8"),
    "training": (
        {"layout": "training", "text_input": "released_slice"},
        "greedy_ids",
        "logits",
    ),
    "training, question alone": ({"layout": "training"}, "question_greedy_ids", "question_logits_last8"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frames_and_question_give_the_recorded_answer(
    layout: str, export_bundle: Callable[..., Path], recorded: Callable[[str], Recorded]
) -> None:
    options, ids, logits = LAYOUTS[layout]
    arrays = recorded(NAME)
    with VideoQA.open(export_bundle(NAME, **options)) as qa:
        video = qa.video(arrays["frames_u8"])
        question = str(arrays["question"])
        prompt = qa.prompt(question, visuals_of(video, qa.bundle.manifest))
        visual = qa.visual_rows(prompt, video, Stopwatch())
        rows = prompt_rows(qa.table.rows, prompt, qa.bundle.manifest.prompt, visual)
        found = qa.backend.decoder(len(rows)).step(rows, prompt.position_ids)
        difference = float(np.abs(found - arrays[logits][0, -1]).max())
        print(f"largest difference {difference:.2e}")
        assert difference < 1e-4
        assert list(qa.ask(video, question, GREEDY).token_ids) == arrays[ids].tolist()
