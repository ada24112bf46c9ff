"""Training and validation batches: clips as pictures with labels, and questions as token rows.

Everything follows from a seed: the same seed gives the same batch. A share of the clips goes through a real H.264
encoder and decoder. Does not train.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from export.demo.glyphs import Glyphs, Split, glyphs
from export.demo.labels import label_clip
from export.demo.model import LINVT, VISION, Rows
from export.demo.questions import KINDS, Question, ask
from export.demo.scenes import Scene, masks, middle_times, paint, random_scene, render
from export.demo.tokenizer import prompt, token_id
from export.demo.video import decode, encode, resize

__all__ = ["LONG", "SHORT", "Clips", "answer_rows", "clips", "descriptions", "prefix_ids", "short_questions"]

SIDE = VISION.image_size
ENCODED, SCALED = 0.35, 0.15  # shares of clips that go through H.264, through a resize only
SHORT_KINDS = tuple(kind for kind in KINDS if kind != "describe")
SHARES = np.array([14, 12, 14, 16, 6, 14, 7, 9, 8], float)  # how often each short kind is asked
TEXT, SHORT, LONG = 14, 44, 60  # padded lengths: a question, a row with a short answer, with a description


class Clips(NamedTuple):
    """B scenes as frames (B, T, 64, 64, 3) uint8 and the targets of ``labels``, batched."""

    scenes: list[Scene]
    frames: Tensor
    digit: Tensor
    colour: Tensor
    facts: Tensor
    weight: Tensor


def clips(rng: np.random.Generator, count: int, frames: int, split: Split = "train") -> Clips:
    """Random clips of ``frames`` pictures taken near the middles of equal segments."""
    source = glyphs(split)
    scenes, pictures, labels = [], [], []
    for _ in range(count):
        scene = random_scene(rng, source)
        times = middle_times(frames) + rng.uniform(-0.25, 0.25) / frames
        layers = masks(scene, source, times, SIDE)
        scenes.append(scene)
        pictures.append(shot(rng, scene, source, times, layers))
        labels.append(label_clip(scene, layers))
    stacked = [torch.from_numpy(np.stack(parts)) for parts in zip(*labels, strict=True)]
    return Clips(scenes, torch.from_numpy(np.stack(pictures)), *stacked)


def shot(
    rng: np.random.Generator,
    scene: Scene,
    source: Glyphs,
    times: NDArray[np.float64],
    layers: NDArray[np.float32],
) -> NDArray[np.uint8]:
    """The scene as the model sees it: painted at 64, or larger and resized, or encoded too."""
    kind = rng.random()
    if kind > ENCODED + SCALED:
        return paint(scene, layers)
    large = render(scene, source, times, 2 * SIDE)
    if kind < ENCODED:
        large = decode(encode(large, crf=int(rng.integers(18, 33)), preset="veryfast"))
    return resize(large, SIDE)


def prefix_ids(tokenizer: Tokenizer) -> Tensor:
    """The fixed start of every prompt, up to <img>: (1, P)."""
    ids = tokenizer.encode(prompt("", 1)).ids
    return torch.tensor([ids[: ids.index(token_id(tokenizer, "<img>"))]])


def answer_rows(tokenizer: Tokenizer, questions: list[Question], length: int = SHORT) -> Rows:
    """Token rows of questions with their answers, padded to fixed lengths."""
    image, end = token_id(tokenizer, "<img>"), token_id(tokenizer, "<|im_end|>")
    text = np.full((len(questions), TEXT), end)
    ids = np.full((len(questions), length), end)
    targets = np.full((len(questions), length), -100)
    mask = np.zeros((len(questions), TEXT), bool)
    alone = tokenizer.encode_batch([question.text for question in questions])
    prompts = tokenizer.encode_batch([prompt(question.text, LINVT.queries) for question in questions])
    answers = tokenizer.encode_batch([question.answer for question in questions])
    for row, (words, whole, answer) in enumerate(zip(alone, prompts, answers, strict=True)):
        start = whole.ids[whole.ids.index(image) :]
        told = [*answer.ids, end]
        text[row, : len(words.ids)], mask[row, : len(words.ids)] = words.ids, True
        ids[row, : len(start) + len(answer.ids)] = [*start, *answer.ids]
        targets[row, len(start) - 1 : len(start) + len(answer.ids)] = told
    parts = (torch.from_numpy(part) for part in (text, mask[:, None, None], ids, targets))
    return Rows(*parts)


def short_questions(scenes: list[Scene], asked: int, rng: np.random.Generator) -> list[Question]:
    """``asked`` questions with short answers about every scene."""
    questions: list[Question] = []
    chances = SHARES / SHARES.sum()
    for scene in scenes:
        found: list[Question] = []
        while len(found) < asked:
            question = ask(scene, str(rng.choice(SHORT_KINDS, p=chances)), rng)
            found += [question] if question else []
        questions += found
    return questions


def descriptions(scenes: list[Scene], rng: np.random.Generator) -> list[Question]:
    """One request for a description of every scene."""
    asked = (ask(scene, "describe", rng) for scene in scenes)
    return [question for question in asked if question]
