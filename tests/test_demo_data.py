"""The demo's data: scenes, questions, videos, token rows and the training shortcuts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from export.demo import tokenizer as demo_tokenizer
from export.demo.answer import generate
from export.demo.batches import LONG, answer_rows, clips, descriptions, prefix_ids, short_questions
from export.demo.crops import crops
from export.demo.glyphs import glyphs, split_indices
from export.demo.layout import load, save
from export.demo.model import LINVT, DemoModel, decoder_config
from export.demo.questions import KINDS, Question, all_texts, ask, describe
from export.demo.scenes import COLOURS, DIRECTIONS, masks, middle_times, random_scene, render
from export.demo.video import decode, encode, middle_indices, resize

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer.train_tokenizer()


@pytest.fixture
def scenes():
    rng = np.random.default_rng(5)
    return [random_scene(rng, glyphs("test")) for _ in range(60)]


def test_splits_share_no_drawing():
    chosen = np.concatenate([split_indices(split) for split in SPLITS])
    assert len(np.unique(chosen)) == len(chosen) == 1797


def test_every_split_draws_every_digit():
    for split in SPLITS:
        assert set(glyphs(split).values.tolist()) == set(range(10))


def test_a_seed_gives_the_same_batch_twice():
    first, second = (clips(np.random.default_rng([3, 1]), 3, 4) for _ in range(2))
    assert first.scenes == second.scenes
    assert torch.equal(first.frames, second.frames)
    assert torch.equal(crops(np.random.default_rng(2), 4).frames, crops(np.random.default_rng(2), 4).frames)


def test_digits_and_colours_of_a_scene_differ(scenes):
    for scene in scenes:
        assert len({digit.value for digit in scene.digits}) == len(scene.digits)
        assert len({digit.colour for digit in scene.digits}) == len(scene.digits)


def test_pictures_move_as_the_direction_says(scenes):
    times = np.linspace(0, 1, 11)
    for scene in scenes:
        for digit, layer in zip(scene.digits, masks(scene, glyphs("test"), times, 64), strict=True):
            seen = np.flatnonzero(layer.sum((1, 2)))
            first, last = (mass_centre(layer[index]) for index in (seen[0], seen[-1]))
            along = (last - first) @ np.asarray(DIRECTIONS[digit.direction])
            assert along > 8 if digit.direction != "still" else np.abs(last - first).max() < 1


def mass_centre(mask):
    rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]]
    return np.array([(columns * mask).sum(), (rows * mask).sum()]) / mask.sum()


def test_late_and_leaving_digits_show_it_in_four_frames(scenes):
    for scene in scenes:
        for digit in scene.digits:
            seen = digit.visible(middle_times(4))
            assert seen.sum() >= 2
            assert (not seen[0]) == digit.late
            assert (not seen[-1]) == digit.gone


def test_answers_are_true_to_the_scene(scenes):
    rng = np.random.default_rng(8)
    for scene in scenes:
        by_value = {str(digit.value): digit for digit in scene.digits}
        for kind in KINDS:
            question = ask(scene, kind, rng)
            if question is None:
                continue
            if kind in ("digit", "last", "leaves") and question.answer != "none":
                digit = by_value[question.answer]
                assert {"digit": digit.colour in question.text, "last": digit.late, "leaves": digit.gone}[kind]
            if kind == "count":
                assert question.answer == str(len(scene.digits))
            if kind == "has colour":
                named = next(colour for colour in COLOURS if colour in question.text)
                assert question.answer == ("yes" if named in describe(scene) else "no")


def test_yes_and_no_are_balanced(scenes):
    rng = np.random.default_rng(9)
    answers = [ask(scene, "has digit", rng).answer for scene in scenes for _ in range(20)]
    assert answers.count("yes") / len(answers) == pytest.approx(0.5, abs=0.06)


def test_all_texts_come_back_from_the_tokenizer(tokenizer):
    for text in (*sorted(set(all_texts()))[::7], "Was passiert? 何が"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() < 640


def test_the_fixed_system_text_is_short(tokenizer):
    assert len(tokenizer.encode(demo_tokenizer.SYSTEM).ids) <= 6


def test_rows_hold_the_prompt_tokenised_as_one_string(tokenizer):
    question = Question("colour", "what color is the 3", "blue")
    rows = answer_rows(tokenizer, [question])
    ids = torch.cat([prefix_ids(tokenizer)[0], rows.ids[0]]).tolist()
    whole = tokenizer.encode(demo_tokenizer.prompt(question.text, LINVT.queries) + "blue<|im_end|>").ids
    assert ids[: len(whole)] == whole
    told = rows.targets[0][rows.targets[0] >= 0].tolist()
    assert told == tokenizer.encode("blue<|im_end|>").ids


def test_h264_keeps_pictures_recognisable(scenes):
    video = render(scenes[0], glyphs("test"), middle_times(12), 128)
    back = decode(encode(video, crf=28))
    assert back.shape == video.shape
    error = np.abs(resize(back, 64).astype(int) - resize(video, 64)).mean()
    print(f"mean error {error:.2f} of 255")
    assert error < 6


def test_frames_come_from_the_middles_of_equal_segments():
    assert middle_indices(80, 8) == [4, 14, 24, 34, 44, 53, 63, 73]


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return DemoModel(decoder_config(tokenizer.get_vocab_size())).eval()


@torch.no_grad()
def test_training_shortcuts_change_no_number(model, tokenizer):
    rng = np.random.default_rng(4)
    batch = clips(rng, 2, 4)
    tokens = model.tokens(batch.frames)
    prefix = prefix_ids(tokenizer)
    for questions, length in ((short_questions(batch.scenes, 3, rng), 44), (descriptions(batch.scenes, rng), LONG)):
        rows = answer_rows(tokenizer, questions, length)
        fast = model(model.refine(tokens).visual, rows, prefix)
        slow = plain_logits(model, tokens.repeat_interleave(len(questions) // 2, 0), rows, prefix)
        difference = (fast - slow).abs().max()
        print(f"largest difference {difference:.1e}")
        assert difference < 1e-3


def plain_logits(model, tokens, rows, prefix):
    embed = model.language_model.embed
    video = model.linvt(tokens, embed(rows.text), rows.text_mask)
    ids = torch.cat((prefix.expand(len(rows.ids), -1), rows.ids), dim=1)
    states = embed(ids)
    start = prefix.shape[1] + 1
    states[:, start : start + LINVT.queries] = video
    logits = model.language_model(states, torch.arange(ids.shape[1])[None])
    return logits[:, prefix.shape[1] :]


def test_a_saved_checkpoint_answers_as_before(model, tokenizer, tmp_path):
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    tokens = model.tokens(clips(np.random.default_rng(6), 1, 4).frames).detach()
    save(model, tokenizer, tmp_path)
    loaded, words = load(tmp_path)
    said = generate(loaded, words, tokens, "Which digit is red?")
    assert said == generate(model, tokenizer, tokens, "Which digit is red?")
