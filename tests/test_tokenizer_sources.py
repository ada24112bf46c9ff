"""A published SentencePiece model becomes the same tokenizer; what the family's code adds comes on top."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from export.checkpoint import Checkpoint, TensorFiles
from export.families import backbone_from_checkpoint
from export.families.base import PromptFacts
from export.sentencepiece import Kind, SentencePiece
from export.tokenizer import tokenizer_from_checkpoint
from runtime.errors import CheckpointError
from tests.checkpoints import ABSENT, edit_json
from tests.conftest import GOLDEN

spm = pytest.importorskip("sentencepiece")

INTERNLM2, PHI3 = "internvl2-internlm2-a", "internvl2-phi3-a"
PIECES = 420
UNUSED = [f"[UNUSED_TOKEN_{number}]" for number in range(141, 147)]
WORDS = ["the", "video", "shows", "a", "person", "walking", "return", "x1", "1234", "你好", "世界", "naïve", "haha"]
WORDS += ["...", "----", "indent", "<0x0A>"]
RUNS = ["a", "-", "ha", " ", "="]
SCRAPS = ["the ", "video", "haha", "aaa", "----", "  ", "    ", "\n", "\t", "é", "你", "世界", "🎉", "\u3000", "<0x0A>"]
SCRAPS += ["\u0301", "<img", "|>", "1", ".", " ", "x1", "[UNUSED", "q", "\u00a0", "\u2581", "<0x0"]
Make = Callable[..., Path]


def run(random: np.random.Generator) -> str:
    """One scrap several times."""
    return str(random.choice(RUNS)) * int(random.integers(1, 12))


def trained(random: np.random.Generator, **options: Any) -> bytes:
    """A small BPE model with Llama's first ids."""

    def lines() -> Iterator[str]:
        for _ in range(500):
            words = [*random.choice(WORDS, size=8), "".join(random.choice(list("abcdefgh"), size=5)), run(random)]
            yield "".join(str(random.choice(["", "  ", "\t"])) + f" {word}" for word in words)

    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": PIECES,
        "byte_fallback": True,
        "character_coverage": 0.99,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    }
    spm.SentencePieceTrainer.train(sentence_iterator=lines(), model_writer=model, minloglevel=2, **(settings | options))
    return model.getvalue()


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "normalized": False, "special": True, **flags}


def shipped(name: str) -> list[str]:
    """Tokens that a fixture adds to its pieces."""
    return list(json.loads((GOLDEN / name / "added_tokens.json").read_text()))


def facts(name: str) -> PromptFacts:
    return backbone_from_checkpoint(Checkpoint.open(GOLDEN / name)).prompt


@pytest.fixture
def make(tmp_path: Path, random: np.random.Generator) -> Make:
    """Write a tokenizer as InternVL2-2B or 4B is published, with ``changes`` to its settings."""

    def write(name: str, model: bytes | None = None, **changes: Any) -> Path:
        first = PIECES - len(UNUSED) if name == INTERNLM2 else PIECES
        settings: dict[str, Any] = {
            "bos_token": "<s>",
            "unk_token": "<unk>",
            "tokenizer_class": "InternLM2Tokenizer" if name == INTERNLM2 else "LlamaTokenizer",
            "added_tokens_decoder": {
                **{str(id_): token(content) for id_, content in enumerate(("<unk>", "<s>", "</s>"))},
                **{str(id_): token(content) for id_, content in enumerate(shipped(name), first)},
            },
        }
        options: dict[str, Any] = {"user_defined_symbols": UNUSED, "add_dummy_prefix": False}
        (tmp_path / "tokenizer.model").write_bytes(model or trained(random, **(options if name == INTERNLM2 else {})))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | changes))
        if name == INTERNLM2 and model is None:
            at_the_end(tmp_path / "tokenizer.model")
        return tmp_path

    return write


def at_the_end(path: Path) -> None:
    """Move the unused pieces behind the others, where InternLM2 has them."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    pieces = list(model.pieces)
    del model.pieces[:]
    model.pieces.extend(sorted(pieces, key=lambda piece: piece.type == Kind.USER_DEFINED))
    path.write_bytes(model.SerializeToString())


def converted(folder: Path, name: str) -> Tokenizer:
    tokenizer = tokenizer_from_checkpoint(Checkpoint(folder, {}, TensorFiles({})), facts(name))
    return Tokenizer.from_str(tokenizer.to_str())


def refusal(folder: Path, name: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        converted(folder, name)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


class Slow:
    """The published Python tokenizers, in words: added tokens first, SentencePiece for what is between them."""

    def __init__(self, folder: Path, *, legacy: bool) -> None:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        self.added = {entry["content"]: (int(id_), entry) for id_, entry in settings["added_tokens_decoder"].items()}
        self.roles = {"<s>", "<unk>", *settings.get("additional_special_tokens", ())}
        self.legacy = legacy
        self.model = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))

    def __call__(self, text: str) -> list[int]:
        """Ids without ``<s>``."""
        found = "|".join(map(re.escape, sorted(self.added, key=len, reverse=True)))
        parts = re.split(f"({found})", text if self.legacy else f"\u2581{text}")
        ids: list[int] = []
        for before, part in zip(["", *parts], parts, strict=False):
            if part in self.added:
                if ids == [self.space] and not self.legacy and part in self.roles:
                    ids = []
                ids.append(self.added[part][0])
            else:
                strips = before in self.added and self.added[before][1].get("rstrip")
                ids += self.pieces(part.lstrip() if strips else part)
        return ids

    @property
    def space(self) -> int:
        """The piece that is one space."""
        return int(self.model.piece_to_id("\u2581"))

    def pieces(self, text: str) -> list[int]:
        """One stretch; without the dummy prefix where ``legacy`` is false."""
        if self.legacy or not text:
            return list(self.model.encode(text))
        marked = self.model.encode("\n" + text)  # nothing joins with a line break; it takes the prefix
        return list(marked[marked.index(self.model.piece_to_id("<0x0A>")) + 1 :])


def texts(random: np.random.Generator, added: list[str]) -> list[str]:
    found = []
    for _ in range(150):
        scraps = random.choice(
            [*SCRAPS, *WORDS, *added, *(run(random) for _ in range(20))], size=random.integers(1, 30)
        )
        found.append("".join(map(str, scraps)))
    return found


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("collapse", [False, True])
@pytest.mark.parametrize("fallback", [True, False])
def test_internlm2_s_model_gives_the_same_ids(
    make: Make, random: np.random.Generator, prefix: bool, collapse: bool, fallback: bool
) -> None:
    options = {"add_dummy_prefix": prefix, "remove_extra_whitespaces": collapse, "byte_fallback": fallback}
    folder = make(INTERNLM2)
    if prefix or collapse or not fallback:
        folder = make(INTERNLM2, trained(random, **options), added_tokens_decoder=numbered(INTERNLM2))
    tokenizer, slow = converted(folder, INTERNLM2), Slow(folder, legacy=True)
    for text in texts(random, list(slow.added)):
        assert tokenizer.encode(text, add_special_tokens=False).ids == slow(text), text
        assert tokenizer.encode(text).ids == [1, *slow(text)]


def numbered(name: str, pieces: int = PIECES, **flags: bool) -> dict[str, Any]:
    """The added tokens behind all pieces."""
    first = {str(id_): token(content) for id_, content in enumerate(("<unk>", "<s>", "</s>"))}
    return first | {str(id_): token(content, **flags) for id_, content in enumerate(shipped(name), pieces)}


@pytest.mark.parametrize("rstrip", [False, True])
@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("roles", [False, True])
def test_phi3_s_model_gives_the_same_ids(
    make: Make, random: np.random.Generator, legacy: bool | None, rstrip: bool, roles: bool
) -> None:
    folder = make(
        PHI3,
        legacy=legacy,
        added_tokens_decoder=numbered(PHI3, rstrip=rstrip),
        additional_special_tokens=shipped(PHI3) if roles else [],
    )
    tokenizer, slow = converted(folder, PHI3), Slow(folder, legacy=legacy is not False)
    for text in texts(random, list(slow.added)):
        prompt = f"<|system|>\n{text}<|end|>"
        assert tokenizer.encode(prompt).ids == [1, *slow(prompt)], prompt
        if not text.startswith((" ", "\u2581", *slow.added)):
            assert tokenizer.encode(text, add_special_tokens=False).ids == slow(text), text


def test_phi3_s_prompt_begins_with_a_space_where_its_tokens_have_no_role(make: Make) -> None:
    folder = make(PHI3, legacy=False)
    assert converted(folder, PHI3).encode("<|system|>\n").tokens == ["<s>", "\u2581", "<|system|>", "<0x0A>"]
    folder = make(PHI3, legacy=False, additional_special_tokens=["<|system|>"])
    assert converted(folder, PHI3).encode("<|system|>\n").tokens == ["<s>", "<|system|>", "<0x0A>"]
    folder = make(PHI3)
    assert converted(folder, PHI3).encode("<|system|>\n").tokens == ["<s>", "<|system|>", "\u2581", "<0x0A>"]


@pytest.mark.parametrize("name", [INTERNLM2, PHI3])
def test_answers_are_decoded_as_sentencepiece_does(make: Make, random: np.random.Generator, name: str) -> None:
    folder = make(name)
    tokenizer = converted(folder, name)
    model = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in texts(random, []):
        ids = model.encode(text)
        assert tokenizer.decode(ids) == model.decode(ids) == text.replace("\u2581", " ")


def test_control_tokens_take_the_unused_pieces_and_the_rest_follow(make: Make) -> None:
    tokenizer = converted(make(INTERNLM2), INTERNLM2)
    ids = [tokenizer.token_to_id(content) for content in shipped(INTERNLM2)]
    assert ids == list(range(PIECES - len(UNUSED), PIECES - len(UNUSED) + len(ids)))
    assert tokenizer.token_to_id(UNUSED[0]) is None
    assert all(tokenizer.get_added_tokens_decoder()[id_].special for id_ in ids)


@pytest.mark.parametrize(
    ("changes", "around"),
    [
        ({}, ([1], [])),
        ({"add_bos_token": False}, ([], [])),
        ({"add_eos_token": True}, ([1], [2])),
        ({"add_eos_token": True, "add_bos_token": False, "eos_token": token("<|im_end|>")}, ([], [418])),
    ],
)
def test_the_tokens_around_a_text_are_the_published_ones(
    make: Make, changes: dict[str, Any], around: tuple[list[int], list[int]]
) -> None:
    tokenizer = converted(make(INTERNLM2, **changes), INTERNLM2)
    ids = tokenizer.encode("the video", add_special_tokens=False).ids
    assert tokenizer.encode("the video").ids == [*around[0], *ids, *around[1]]


def test_text_that_spells_a_byte_s_piece_is_text(make: Make, random: np.random.Generator) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(trained(random))
    known = {piece.piece for piece in model.pieces}
    for text in dict.fromkeys([*"<0xA>", "<0", "<0x", "<0x0", "<0x0A"]):
        if text not in known:
            model.pieces.add(piece=text, score=-1000, type=Kind.NORMAL)
    folder = make(PHI3, model.SerializeToString(), added_tokens_decoder=numbered(PHI3, len(model.pieces)))
    slow = Slow(folder, legacy=True)
    assert converted(folder, PHI3).encode("<0x0A>", add_special_tokens=False).ids == slow("<0x0A>")


def test_older_files_list_their_tokens_elsewhere(make: Make) -> None:
    folder = make(PHI3)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    listed = settings.pop("added_tokens_decoder")
    older = {entry["content"]: int(id_) for id_, entry in listed.items() if int(id_) > 2}
    (folder / "added_tokens.json").write_text(json.dumps(older))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<img>"]}))
    tokenizer = converted(folder, PHI3)
    assert {content: tokenizer.token_to_id(content) for content in older} == older
    special = {entry.content for entry in tokenizer.get_added_tokens_decoder().values() if entry.special}
    assert special == {"<unk>", "<s>", "<img>"}


def test_what_the_family_adds_gets_the_next_ids_and_keeps_those_it_has(make: Make) -> None:
    checkpoint = Checkpoint(make(PHI3), {}, TensorFiles({}))
    prompt = facts(PHI3)
    layouts = {name: dataclasses.replace(layout, visual_token="<new>") for name, layout in prompt.layouts.items()}
    prompt = dataclasses.replace(prompt, layouts=layouts, extra_tokens=("<more>", "<|end|>", "<new>"))
    tokenizer, before = tokenizer_from_checkpoint(checkpoint, prompt), converted(checkpoint.folder, PHI3)
    assert tokenizer.token_to_id("<|end|>") == before.token_to_id("<|end|>")
    assert [tokenizer.token_to_id(token) for token in ("<more>", "<new>")] == [440, 441]
    assert tokenizer.encode("the<new>", add_special_tokens=False).ids[-1] == 441
    with pytest.raises(CheckpointError, match="no token '<new>'"):
        tokenizer_from_checkpoint(checkpoint, dataclasses.replace(prompt, extra_tokens=("<more>",)))


def test_the_model_file_is_read_as_sentencepiece_reads_it(make: Make) -> None:
    path = make(INTERNLM2) / "tokenizer.model"
    model, own = SentencePiece.read(path), spm.SentencePieceProcessor(model_file=str(path))
    assert [piece.text for piece in model.pieces] == own.id_to_piece(list(range(PIECES)))
    assert [piece.score for piece in model.pieces] == own.get_score(list(range(PIECES)))
    assert (model.unknown, model.byte_fallback, model.dummy_prefix, model.collapses) == (0, True, False, False)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model_type": "unigram", "hard_vocab_limit": False}, "model_type is 1, supported: 2"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises text by a table"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix is 1"),
        ({"user_defined_symbols": ["a\u2581b"]}, "'a\u2581b'"),
    ],
)
def test_other_models_are_refused_by_name(
    make: Make, random: np.random.Generator, options: dict[str, Any], named: str
) -> None:
    assert named in refusal(make(PHI3, trained(random, **options)), PHI3)


def test_a_damaged_model_is_refused_by_name(make: Make, random: np.random.Generator) -> None:
    whole = (make(PHI3) / "tokenizer.model").read_bytes()
    for content in (b"\n", b"\xff" * 30, b"\x0b", whole[: len(whole) // 2], whole[:-1]):
        assert "tokenizer.model is not a SentencePiece model" in refusal(make(PHI3, content), PHI3)
    for _ in range(200):
        damaged = bytearray(whole)
        for at in random.integers(0, len(whole), 3):
            damaged[at] = random.integers(256)
        try:
            SentencePiece.read(make(PHI3, bytes(damaged)) / "tokenizer.model")
        except CheckpointError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("sp_model_kwargs", {"enable_sampling": True}, "sp_model_kwargs"),
        ("add_prefix_space", False, "add_prefix_space False"),
        ("split_special_tokens", True, "split_special_tokens True"),
        ("legacy", "no", "legacy 'no'"),
        ("add_bos_token", 1, "add_bos_token 1"),
        ("bos_token", "<start>", "'<start>' around a text, which is no token"),
        ("bos_token", {"special": True}, "holds the token {'special': True}"),
        ("added_tokens_decoder", [], "added_tokens_decoder []"),
        ("added_tokens_decoder", {"x": token("<img>")}, "added_tokens_decoder {'x'"),
        ("added_tokens_decoder", {"420": "<img>", "422": "</img>"}, "'</img>' the id 422, expected 421"),
        ("added_tokens_decoder", {"420": {"id": 3}}, "holds the token {'id': 3}"),
        ("added_tokens_decoder", {"420": token("<img>", rstrip=3)}, "rstrip 3"),  # type: ignore[arg-type]
        ("added_tokens_decoder", {}, "the tokenizer has no token"),
        ("tokenizer_class", "BertTokenizer", "neither tokenizer.json nor vocab.txt"),
    ],
)
def test_odd_settings_are_refused_by_name(make: Make, key: str, value: object, named: str) -> None:
    assert named in refusal(make(PHI3, **{key: value}), PHI3)


@pytest.mark.parametrize("name", [INTERNLM2, PHI3])
def test_a_checkpoint_without_its_model_file_is_refused_by_name(make: Make, name: str) -> None:
    folder = make(name)
    (folder / "tokenizer.model").unlink()
    assert "neither tokenizer.json nor tokenizer.model" in refusal(folder, name)
    edit_json(folder / "tokenizer_config.json", "tokenizer_class", ABSENT)
    assert "add a tokenizer.json" in refusal(folder, name)
