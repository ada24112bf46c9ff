"""Training batches of every stage, made one step ahead in a second process.

While the vision tower does not learn, the second process runs it too, so that two cores share a step without waiting
for each other inside it. A batch follows from the seed, the stage and the step alone.
Does not train.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from export.demo.batches import LONG, Clips, answer_rows, clips, descriptions, short_questions
from export.demo.crops import Crops, crops
from export.demo.model import DemoModel, Rows, decoder_config

__all__ = ["STAGES", "Batch", "Feed"]

STAGES = ("crops", "frames", "clips", "questions")
# frames per clip: (probability, clips, questions per clip); about 130 frames and 96 questions a batch
SHAPES = {
    4: (0.10, 24, 4),
    6: (0.12, 20, 5),
    8: (0.50, 16, 6),
    12: (0.13, 11, 9),
    16: (0.12, 8, 12),
    32: (0.03, 4, 24),
}


class Batch(NamedTuple):
    """Pictures with labels; patch features where the tower is fixed; short and long question rows."""

    pictures: Clips | Crops
    features: Tensor | None
    rows: tuple[Rows, Rows] | None


@dataclass(frozen=True)
class Maker:
    """Makes batches; lives in the second process."""

    model: DemoModel
    tokenizer: Tokenizer

    def make(self, seed: int, stage: str, step: int, fixed: bool) -> Batch:
        """The batch of a step; with patch features if the tower is ``fixed``."""
        rng = np.random.default_rng([seed, STAGES.index(stage), step])
        if stage == "crops":
            return Batch(crops(rng, 192), None, None)
        if stage == "frames":
            return Batch(clips(rng, 24, 4), None, None)
        frames = int(rng.choice(list(SHAPES), p=[chance for chance, _, _ in SHAPES.values()]))
        _, count, asked = SHAPES[frames]
        pictures = clips(rng, count, frames)
        rows = None
        if stage == "questions":
            short = answer_rows(self.tokenizer, short_questions(pictures.scenes, asked, rng))
            rows = short, answer_rows(self.tokenizer, descriptions(pictures.scenes, rng), LONG)
        return Batch(pictures, self.features(pictures) if fixed else None, rows)

    @torch.no_grad()
    def features(self, pictures: Clips) -> Tensor:
        """Patch features (B * T, patches, E)."""
        return self.model.patches(pictures.frames)


class Feed:
    """A context manager that owns the second process; ``model`` is copied when it starts."""

    def __init__(self, model: DemoModel, tokenizer: Tokenizer, seed: int) -> None:
        start = (pickle.dumps(model.state_dict()), tokenizer.to_str())
        self.seed = seed
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=begin, initargs=start)

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def batches(self, stage: str, first: int, last: int, thaw: int) -> Iterator[Batch]:
        """The batches of steps ``first`` to ``last``; the tower learns from step ``thaw`` on."""
        waiting = [self.pool.submit(work, self.seed, stage, step, step < thaw) for step in range(first, last)[:2]]
        for step in range(first, last):
            batch: Batch = pickle.loads(waiting.pop(0).result())
            if step + 2 < last:
                waiting.append(self.pool.submit(work, self.seed, stage, step + 2, step + 2 < thaw))
            yield batch


makers: list[Maker] = []  # the second process's one


def begin(weights: bytes, tokenizer: str) -> None:
    """Set up the second process."""
    torch.set_num_threads(1)
    words = Tokenizer.from_str(tokenizer)
    model = DemoModel(decoder_config(words.get_vocab_size()))
    model.load_state_dict(pickle.loads(weights))
    makers.append(Maker(model.eval(), words))


def work(seed: int, stage: str, step: int, fixed: bool) -> bytes:
    """One batch, pickled by value."""
    return pickle.dumps(makers[0].make(seed, stage, step, fixed))
