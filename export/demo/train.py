"""Train the demo model from nothing on the CPU: ``python -m export.demo.train OUT``.

Four stages with fixed step counts and seeds: the vision tower on crops and on frames, connector and SVR on clips,
everything on questions. Progress goes to stdout, and the last line is JSON. ``OUT`` becomes the checkpoint that
answered most validation questions; a run that was cut short goes on from ``OUT.state``.
Does not measure on the test split: ``evaluate`` does.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from export.demo.batches import LONG, SHORT, Clips, answer_rows, clips, descriptions, prefix_ids, short_questions
from export.demo.crops import Crops
from export.demo.feed import STAGES, Batch, Feed
from export.demo.layout import save
from export.demo.model import DemoModel, Rows, decoder_config
from export.demo.pretrain import Heads, patch_loss, token_loss
from export.demo.questions import KINDS, Question
from export.demo.tokenizer import train_tokenizer
from runtime.cli import guarded

__all__ = ["Plan", "main", "train"]

VALIDATION = 16  # batches of 8 clips


@dataclass(frozen=True)
class Plan:
    """How long each stage is, in steps, and how fast it learns."""

    crops: int = 1500
    frames: int = 300
    clips: int = 250
    questions: int = 1200
    rate: float = 1e-3
    frozen: float = 0.875  # share of the question stage with a fixed vision tower
    every: int = 150  # steps between validations and saved states
    seed: int = 1


class Trainer:
    """The model, its helper heads and the current optimizer; one method per kind of step."""

    def __init__(self, plan: Plan, out: Path) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.out = plan, out
        self.tokenizer: Tokenizer = train_tokenizer()
        self.prefix = prefix_ids(self.tokenizer)
        self.model = DemoModel(decoder_config(self.tokenizer.get_vocab_size()))
        self.heads = Heads()
        self.stages = {name: getattr(plan, name) for name in STAGES}
        self.best = -1.0
        self.started = time.monotonic()

    @property
    def state(self) -> Path:
        """Where a run keeps what it needs to go on."""
        return self.out.with_name(self.out.name + ".state")

    def run(self) -> None:
        """All stages, from the saved state where there is one."""
        saved = torch.load(self.state, weights_only=True) if self.state.exists() else None
        for stage, steps in self.stages.items():
            optimizer = self.optimizer()
            first = 0
            if saved is not None:
                if stage != saved["stage"]:
                    continue
                self.model.load_state_dict(saved["model"])
                self.heads.load_state_dict(saved["heads"])
                optimizer.load_state_dict(saved["optimizer"])
                first, self.best, saved = saved["step"], saved["best"], None
            self.run_stage(stage, first, steps, optimizer)
        self.state.unlink(missing_ok=True)

    def optimizer(self) -> torch.optim.AdamW:
        """Two groups: the vision tower and the rest."""
        tower = list(self.model.vision_model.parameters())
        inside = {id(parameter) for parameter in tower}
        parameters = [*self.model.parameters(), *self.heads.parameters()]
        rest = [parameter for parameter in parameters if id(parameter) not in inside]
        groups = [{"params": tower, "name": "tower"}, {"params": rest, "name": "rest"}]
        return torch.optim.AdamW(groups, lr=self.plan.rate, betas=(0.9, 0.98), weight_decay=0.03)

    def run_stage(self, stage: str, first: int, steps: int, optimizer: torch.optim.AdamW) -> None:
        """Steps ``first`` to ``steps`` of one stage."""
        means: dict[str, list[float]] = defaultdict(list)
        trained = [*self.model.parameters(), *self.heads.parameters()]
        thaw = {"clips": steps, "questions": math.ceil(self.plan.frozen * steps)}.get(stage, 0)
        with Feed(self.model, self.tokenizer, self.plan.seed) as feed:
            for step, batch in enumerate(feed.batches(stage, first, steps, thaw), first):
                self.set_rates(optimizer, step, steps, step >= thaw)
                loss, hits = self.loss(batch)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                means["loss"].append(float(loss.detach()))
                for name, value in hits.items():
                    means[name].append(value)
                if (step + 1) % 25 == 0:
                    self.report(stage, step + 1, means)
                if (step + 1) % self.plan.every == 0 or step + 1 == steps:
                    self.keep(stage, step + 1, optimizer)

    def set_rates(self, optimizer: torch.optim.AdamW, step: int, steps: int, thaw: bool) -> None:
        """Warm-up, constant, and a cosine over the last 60 % of the stage; a fixed tower has no rate."""
        part = step / steps
        decay = 1.0 if part < 0.4 else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (part - 0.4) / 0.6))
        rate = self.plan.rate * min(1.0, (step + 1) / 60) * decay
        for group in optimizer.param_groups:
            group["lr"] = rate if thaw or group["name"] == "rest" else 0.0

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss of one batch, by what it holds."""
        pictures, features, rows = batch
        if isinstance(pictures, Crops):
            return patch_loss(self.heads, self.model.crop_patches(pictures.frames, pictures.places), pictures)
        if features is None:
            features = self.model.patches(pictures.frames)
            if rows is None:
                return patch_loss(self.heads, features, pictures)
        tokens = self.model.connector(features).unflatten(0, pictures.frames.shape[:2])
        refined = self.model.refine(tokens)
        direct, hits = token_loss(self.heads, refined, pictures)
        if rows is None:
            return direct, hits
        short, right = self.answer_loss(refined.visual, rows[0])
        told, exact = self.answer_loss(refined.visual, rows[1])
        return short + 0.5 * told + 0.4 * direct, {**hits, "short": right, "describe": exact}

    def answer_loss(self, visual: Tensor, rows: Rows) -> tuple[Tensor, float]:
        """Cross entropy of the answers' tokens, and the share of answers right from end to end."""
        logits = self.model(visual, rows, self.prefix)
        asked = rows.targets >= 0
        loss = functional.cross_entropy(logits[asked], rows.targets[asked])
        return loss, float(whole(logits, rows).float().mean())

    def report(self, stage: str, step: int, means: dict[str, list[float]]) -> None:
        """One line of progress."""
        values = " ".join(f"{name} {np.mean(value):.3f}" for name, value in means.items())
        minutes = (time.monotonic() - self.started) / 60
        print(f"{stage} {step}/{self.stages[stage]} {minutes:.1f} min {values}", flush=True)  # noqa: T201
        means.clear()

    def keep(self, stage: str, step: int, optimizer: torch.optim.AdamW) -> None:
        """Validate, save the checkpoint where it is the best so far, and save the state."""
        if stage == "questions":
            right = self.validate()
            mean = float(np.mean(list(right.values())))
            lines = " ".join(f"{kind} {value:.3f}" for kind, value in right.items())
            print(f"validation {step} mean {mean:.4f} {lines}", flush=True)  # noqa: T201
            if mean >= self.best:
                self.best = mean
                save(self.model, self.tokenizer, self.out)
        saved = {
            "stage": stage,
            "step": step,
            "best": self.best,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        partial = self.state.with_name(self.state.name + ".partial")
        torch.save(saved, partial)
        partial.replace(self.state)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Share of right answers per kind on validation clips of 8 frames."""
        hits: dict[str, list[bool]] = defaultdict(list)
        for batch, questions in validation_batches():
            visual = self.model.refine(self.model.tokens(batch.frames)).visual
            for asked, length in questions:
                rows = answer_rows(self.tokenizer, asked, length)
                right = whole(self.model(visual, rows, self.prefix), rows)
                for question, hit in zip(asked, right.tolist(), strict=True):
                    hits[question.kind].append(hit)
        return {kind: float(np.mean(hits[kind])) for kind in KINDS}


def whole(logits: Tensor, rows: Rows) -> Tensor:
    """Rows (R,) whose every answer token is the likeliest: exactly those that greedy decoding gets right."""
    return ((logits.argmax(-1) == rows.targets) | (rows.targets < 0)).all(-1)


def validation_batches() -> Iterator[tuple[Clips, list[tuple[list[Question], int]]]]:
    """Always the same clips and questions, made from validation drawings."""
    for index in range(VALIDATION):
        rng = np.random.default_rng([999, index])
        batch = clips(rng, 8, 8, "validation")
        short = short_questions(batch.scenes, 12, rng)
        yield batch, [(short, SHORT), (descriptions(batch.scenes, rng), LONG)]


def train(out: Path, plan: Plan) -> dict[str, object]:
    """Run the plan and say what came out."""
    trainer = Trainer(plan, out)
    trainer.run()
    minutes = (time.monotonic() - trainer.started) / 60
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return {
        "checkpoint": str(out),
        "validation": round(trainer.best, 4),
        "parameters": parameters,
        "minutes": round(minutes, 1),
        **asdict(plan),
    }


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, print one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m export.demo.train", description="Train the demo model.")
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=Plan.questions, help="steps of the question stage")
    parser.add_argument("--crop-steps", type=int, default=Plan.crops)
    parser.add_argument("--frame-steps", type=int, default=Plan.frames)
    parser.add_argument("--clip-steps", type=int, default=Plan.clips)
    parser.add_argument(
        "--threads", type=int, default=1, help="of the training process; a second process makes the batches"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    plan = Plan(given.crop_steps, given.frame_steps, given.clip_steps, given.steps)
    sys.stdout.write(json.dumps(train(given.out, plan)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(guarded("linvt-demo-train", main))
