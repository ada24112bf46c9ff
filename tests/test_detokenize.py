"""Streamed text is never cut inside a character and adds up to what decoding everything at once gives."""

import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from runtime.detokenize import Detokenizer

GOLDEN = Path(__file__).parent / "golden"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
SENTENCES = [
    "A cat runs.",
    "  two  spaces\n\nand\ttabs ",
    "你是一个有用的助手。日本語も",
    "naïve café — ½ €",
    "👩‍👩‍👧 family, 🇩🇪 flag, 😀",
    f"a real {REPLACEMENT} in the text{REPLACEMENT}",
    "e\u0301 decomposed, \u200d, \x00",
]


def byte_level(name: str) -> Tokenizer:
    return Tokenizer.from_file(str(GOLDEN / name / "tokenizer.json"))


def sentencepiece(*decoder: decoders.Decoder) -> Tokenizer:
    """A Llama-like tokenizer: ▁ for spaces, unknown characters as byte tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "▁c", "at", "▁cat", "▁a", *"acnrstu.é你", REPLACEMENT]
    merges = [("▁", "▁"), ("▁", "c"), ("a", "t"), ("▁c", "at"), ("▁", "a")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(list(decoder))
    tokenizer.add_special_tokens(["<unk>", "<s>", AddedToken("<|end|>", rstrip=True)])
    return tokenizer


TOKENIZERS = {
    "byte-level, whole model": byte_level("linvt-internvl2-a"),
    "byte-level, backbone": byte_level("internvl2-qwen2-a"),
    "sentencepiece, llama": sentencepiece(
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ),
    "sentencepiece, metaspace": sentencepiece(decoders.ByteFallback(), decoders.Metaspace()),
    "sentencepiece, no strip": sentencepiece(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
}

every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What every push gave, then what the flush gave."""
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def whole(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


@every_tokenizer
def test_pieces_of_any_ids_add_up_to_the_whole_text(tokenizer: Tokenizer) -> None:
    random = np.random.default_rng(20)
    for _ in range(2000):
        # ids beyond the vocabulary stand for the unused rows a model may have
        ids = random.integers(0, tokenizer.get_vocab_size() + 8, random.integers(0, 40)).tolist()
        assert "".join(streamed(tokenizer, ids)) == whole(tokenizer, ids), ids


@every_tokenizer
def test_pieces_of_damaged_text_add_up_to_the_whole_text(tokenizer: Tokenizer) -> None:
    random = np.random.default_rng(21)
    for _ in range(500):
        ids = tokenizer.encode(" ".join(random.permutation(SENTENCES)[:3])).ids
        for _ in range(random.integers(0, 6)):  # a token lost or one too many
            at = int(random.integers(len(ids)))
            ids[at : at + 1] = random.choice(ids, random.integers(0, 3)).tolist()
        assert "".join(streamed(tokenizer, ids)) == whole(tokenizer, ids), ids


@every_tokenizer
@pytest.mark.parametrize("sentence", SENTENCES)
def test_text_that_is_sound_never_shows_a_replacement_character(tokenizer: Tokenizer, sentence: str) -> None:
    ids = tokenizer.encode(sentence, add_special_tokens=False).ids
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == whole(tokenizer, ids)
    assert "".join(pieces).count(REPLACEMENT) == sentence.count(REPLACEMENT)


def test_byte_level_text_comes_out_with_the_last_byte_of_each_character() -> None:
    tokenizer = TOKENIZERS["byte-level, whole model"]
    ids = tokenizer.encode("😀x😀y").ids
    detokenizer, seen = Detokenizer(tokenizer), []
    for i, token in enumerate(ids):
        seen.append(detokenizer.push(token))
        sound = whole(tokenizer, ids[: i + 1]).rstrip(REPLACEMENT)
        assert "".join(seen) == sound
    assert detokenizer.flush() == ""


def test_a_run_of_byte_tokens_comes_out_when_it_ends() -> None:
    tokenizer = TOKENIZERS["sentencepiece, llama"]
    ids = [tokenizer.token_to_id(piece) for piece in ("▁cat", "<0xE5>", "<0xA5>", "<0xBD>", "s")]
    assert streamed(tokenizer, ids) == ["cat", "", "", "", "好s", ""]
    assert streamed(tokenizer, ids[:-1]) == ["cat", "", "", "", "好"]
    assert streamed(tokenizer, ids[:3]) == ["cat", "", "", REPLACEMENT * 2]


def test_words_keep_the_space_before_them_and_the_text_loses_only_its_first() -> None:
    tokenizer = TOKENIZERS["sentencepiece, llama"]
    ids = [tokenizer.token_to_id(piece) for piece in ("▁cat", "▁a", "t", "▁", "▁cat")]
    assert streamed(tokenizer, ids) == ["cat", " a", "t", " ", " cat", ""]


@every_tokenizer
def test_special_tokens_and_ids_without_a_token_give_no_text(tokenizer: Tokenizer) -> None:
    words = tokenizer.encode("cat", add_special_tokens=False).ids
    special = [id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    mixed = [*special, words[0], special[-1], 10**6, *words[1:], special[0]]
    assert "".join(streamed(tokenizer, mixed)) == whole(tokenizer, words)


def test_a_special_token_inside_a_character_does_not_break_it() -> None:
    tokenizer = TOKENIZERS["sentencepiece, llama"]
    ids = [tokenizer.token_to_id(piece) for piece in ("<0xE5>", "<|end|>", "<0xA5>", "<s>", "<0xBD>", "a")]
    assert "".join(streamed(tokenizer, ids)) == "好a" == whole(tokenizer, ids)


def test_nothing_in_nothing_out_and_a_second_flush_is_empty() -> None:
    tokenizer = TOKENIZERS["byte-level, backbone"]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.flush() == ""
    for token in tokenizer.encode("😀").ids[:2]:
        assert detokenizer.push(token) == ""
    assert detokenizer.flush() == REPLACEMENT
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("content", ["a", "invalid"])
def test_the_time_grows_with_the_number_of_tokens_and_not_faster(content: str) -> None:
    tokenizer = TOKENIZERS["byte-level, backbone"]
    token = tokenizer.encode("a" if content == "a" else "😀").ids[0]
    start = time.perf_counter()
    pieces = streamed(tokenizer, [token] * 20_000)
    seconds = time.perf_counter() - start
    print(f"20000 x {content}: {seconds:.2f} s")
    assert "".join(pieces) == whole(tokenizer, [token] * 20_000)
    assert seconds < 5  # quadratic time would be about 40 s
