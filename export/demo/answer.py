"""Answers from a demo checkpoint in PyTorch, the slow and obvious way: what a bundle is measured against.

Every question runs the whole prompt again for every new token. No KV cache and none of training's shortcuts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from export.demo.layout import load
from export.demo.model import LINVT, VISION, DemoModel
from export.demo.tokenizer import prompt, token_id
from export.demo.video import decode, middle_indices, resize

__all__ = ["FRAMES", "Answer", "Watch", "watch_with_torch"]

Answer = Callable[[str], str]  # question -> answer
Watch = Callable[[Path], Answer]  # video file -> what answers questions about it

FRAMES = 8
MOST_TOKENS = 32


def watch_with_torch(folder: Path, frames: int = FRAMES) -> Watch:
    """Load a checkpoint folder."""
    model, tokenizer = load(folder)

    def watch(path: Path) -> Answer:
        video = decode(path.read_bytes())
        tokens = tokens_from_frames(model, video[middle_indices(len(video), frames)])
        return lambda question: generate(model, tokenizer, tokens, question)

    return watch


@torch.no_grad()
def tokens_from_frames(model: DemoModel, frames: NDArray[np.uint8]) -> Tensor:
    """Frames (T, H, W, 3) -> (1, T, N, D)."""
    return model.tokens(torch.from_numpy(resize(frames, VISION.image_size))[None])


@torch.no_grad()
def generate(model: DemoModel, tokenizer: Tokenizer, tokens: Tensor, question: str) -> str:
    """Greedy answer to a question about frame tokens (1, T, N, D)."""
    embed = model.language_model.embed
    text = embed(torch.tensor([tokenizer.encode(question).ids]))
    ids = tokenizer.encode(prompt(question, LINVT.queries)).ids
    first = ids.index(token_id(tokenizer, "<IMG_CONTEXT>"))
    video = model.linvt(tokens, text)
    end, answer = token_id(tokenizer, "<|im_end|>"), list[int]()
    for _ in range(MOST_TOKENS):
        states = embed(torch.tensor([ids + answer]))
        states[:, first : first + LINVT.queries] = video
        logits = model.language_model(states, torch.arange(states.shape[1])[None])
        token = int(logits[0, -1].argmax())
        if token == end:
            break
        answer.append(token)
    return str(tokenizer.decode(answer)).strip()
