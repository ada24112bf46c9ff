"""What the published Python tokenizers make of ``tokenizer.model``, as one tokenizer of the ``tokenizers`` library.

``LlamaTokenizer`` is InternVL2-4B's, ``InternLM2Tokenizer`` (remote code) that of 2B and 8B. Both find the added
tokens first and give each stretch between them to SentencePiece. Facts from transformers 4.37 and OpenGVLab/InternVL's
``tokenization_internlm2``.

With ``legacy`` false the Python tokenizer puts a space in front of the whole text and takes it away again where one of
the tokens with a role follows; in front of another added token it stays, a piece of its own. InternVL2-4B was trained
so (``preprocess_phi3`` counts that piece). Here the tokens around a prompt hold it. What differs is a text that begins
with a space, which gets no second one, and one that begins with an added token but is no prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from export.checkpoint import Checkpoint
from export.fields import shortened
from export.sentencepiece import Kind, SentencePiece
from runtime.errors import CheckpointError

__all__ = ["SLOW_TOKENIZERS", "slow_tokenizer"]

SLOW_TOKENIZERS = frozenset({"LlamaTokenizer", "LlamaTokenizerFast", "InternLM2Tokenizer", "InternLM2TokenizerFast"})
SPACE = "\u2581"  # what a space is called inside SentencePiece
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
FLAGS = ("single_word", "lstrip", "rstrip", "special")
UNCHANGED = {"sp_model_kwargs": {}, "add_prefix_space": True, "split_special_tokens": False}  # refused otherwise

Added = dict[int, AddedToken]
Prefix = Literal["each", "first", "none"]
"""Where a space is put in front: of every stretch, of the one that begins the text, nowhere."""


def slow_tokenizer(checkpoint: Checkpoint, name: str, opening: str) -> Tokenizer:
    """The tokenizer of the class ``name``, one of ``SLOW_TOKENIZERS``.

    Args:
        checkpoint: has a ``tokenizer.model``.
        name: what its ``tokenizer_config.json`` calls it.
        opening: what every prompt begins with; more may follow.

    Raises:
        CheckpointError: a file is damaged or asks for what is not supported.
    """
    settings = checkpoint.json("tokenizer_config.json")
    for key, wanted in UNCHANGED.items():
        if settings.get(key) not in (None, wanted):
            raise CheckpointError(
                f"tokenizer_config.json has {key} {shortened(settings[key])}, supported: {wanted}; add a tokenizer.json"
            )
    model = SentencePiece.read(checkpoint.folder / "tokenizer.model")
    roles = tokens_with_roles(checkpoint)
    added = added_tokens(checkpoint, model, roles)
    legacy = name.startswith("InternLM2") or flag(settings, "legacy", default=True)
    if not legacy and model.collapses:
        raise CheckpointError(
            "tokenizer_config.json has legacy false, and tokenizer.model collapses spaces, which are not supported "
            "together; add a tokenizer.json"
        )
    prefix: Prefix = "first" if not legacy else "each" if model.dummy_prefix else "none"
    tokenizer = assembled(model, added, prefix)
    begun = [token.content for token in added.values() if opening.startswith(token.content)]
    space = [SPACE] if not legacy and begun and max(begun, key=len) not in roles else []
    tokenizer.post_processor = frame(tokenizer, settings, space)
    return tokenizer


def assembled(model: SentencePiece, added: Added, prefix: Prefix) -> Tokenizer:
    """Pieces and added tokens; an added token takes over the piece at its id, as InternLM2's control tokens do."""
    texts = [added[id_].content if id_ in added else piece.text for id_, piece in enumerate(model.pieces)]
    tokenizer = Tokenizer(
        BPE(
            vocab={text: id_ for id_, text in enumerate(texts)},
            merges=merges(model, added),
            unk_token=texts[model.unknown],
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    tokenizer.normalizer = normalizer(model, prefix)
    if prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps if prefix == "none" else [*steps, decoders.Strip(" ", left=1)])
    for id_, token in sorted((defined(model) | added).items()):
        tokenizer.add_tokens([token])
        if (found := tokenizer.token_to_id(token.content)) != id_:
            raise CheckpointError(
                f"tokenizer_config.json gives {token.content!r} the id {id_}, expected {found} after the "
                f"{len(model.pieces)} pieces of tokenizer.model; the files do not belong together, download them again"
            )
    return tokenizer


def merges(model: SentencePiece, added: Added) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a piece, by that piece's falling score.

    Of pieces with one score SentencePiece takes the leftmost in the text, and here it is the one of the lower id: the
    same for the published models, whose equal scores are runs of spaces or pieces that never overlap.
    """
    usable = {piece.text for id_, piece in enumerate(model.pieces) if piece.kind is Kind.NORMAL and id_ not in added}
    ranked: list[tuple[float, int, tuple[str, str]]] = []
    for id_, piece in enumerate(model.pieces):
        for cut in range(1, len(piece.text)) if piece.text in usable else ():
            pair = piece.text[:cut], piece.text[cut:]
            if usable.issuperset(pair):
                ranked.append((-piece.score, id_, pair))
    return [pair for *_, pair in sorted(ranked)]


def normalizer(model: SentencePiece, prefix: Prefix) -> normalizers.Normalizer:
    """What happens to a stretch of text before it is cut into pieces."""
    steps: list[normalizers.Normalizer] = []
    if model.collapses:
        steps += [
            normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if prefix == "each":
        steps.append(normalizers.Prepend(SPACE))
    if prefix != "first":
        steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def defined(model: SentencePiece) -> Added:
    """Pieces that SentencePiece finds before any merge."""
    found = {id_: piece.text for id_, piece in enumerate(model.pieces) if piece.kind is Kind.USER_DEFINED}
    if odd := [text for text in found.values() if SPACE in text]:
        raise CheckpointError(
            f"tokenizer.model defines the piece {odd[0]!r} with a space, which is not supported; add a tokenizer.json"
        )
    return {id_: AddedToken(text, normalized=False) for id_, text in found.items()}


def tokens_with_roles(checkpoint: Checkpoint) -> set[str]:
    """What transformers calls ``all_special_tokens``."""
    settings = checkpoint.json("special_tokens_map.json") | checkpoint.json("tokenizer_config.json")
    further = settings.get("additional_special_tokens")
    named = [settings[role] for role in NAMED if settings.get(role) is not None]
    return {content_of(token) for token in (*named, *(further if isinstance(further, list) else ()))}


def added_tokens(checkpoint: Checkpoint, model: SentencePiece, roles: set[str]) -> Added:
    """Tokens besides the pieces, from ``tokenizer_config.json`` or the older ``added_tokens.json``."""
    listed = checkpoint.json("tokenizer_config.json").get("added_tokens_decoder")
    if listed is None:
        older = checkpoint.json("added_tokens.json").items()
        listed = {str(id_): {"content": content} for content, id_ in older}
    if not isinstance(listed, dict) or not all(key.isdecimal() for key in listed):
        raise CheckpointError(
            f"tokenizer_config.json has added_tokens_decoder {shortened(listed)}, expected tokens by id; "
            "download it again"
        )
    added = {int(key): added_token(token, roles) for key, token in listed.items()}
    missing = roles - {token.content for token in added.values()}
    for id_, piece in enumerate(model.pieces):
        if piece.text in missing:
            added[id_] = AddedToken(piece.text, normalized=False, special=True)
    return added


def added_token(entry: object, roles: set[str]) -> AddedToken:
    """One token; the Python tokenizers look for all of them in the text as it is, normalised or not."""
    content = content_of(entry)
    flags = {name: flag(entry, name, default=False) for name in FLAGS} if isinstance(entry, dict) else {}
    flags["special"] = flags.get("special", False) or content in roles
    return AddedToken(content, normalized=False, **flags)


def content_of(entry: object) -> str:
    """The text of a token, which stands alone or in an object."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(content, str) or not content:
        raise CheckpointError(
            f"tokenizer_config.json holds the token {shortened(entry)}, expected its text; download it again"
        )
    return content


def flag(entry: Mapping[str, Any], name: str, *, default: bool) -> bool:
    """A yes or no, ``default`` where it is absent or null."""
    value = entry.get(name)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"tokenizer_config.json has {name} {shortened(value)}, expected true or false")
    return default if value is None else value


def frame(tokenizer: Tokenizer, settings: Mapping[str, Any], space: list[str]) -> processors.TemplateProcessing:
    """The tokens that are put before and after a prompt."""
    first = [content_of(settings.get("bos_token") or "<s>")] if flag(settings, "add_bos_token", default=True) else []
    last = [content_of(settings.get("eos_token") or "</s>")] if flag(settings, "add_eos_token", default=False) else []
    first += space
    ids = [(token, tokenizer.token_to_id(token)) for token in (*first, *last)]
    if missing := [token for token, id_ in ids if id_ is None]:
        raise CheckpointError(
            f"tokenizer_config.json puts {missing[0]!r} around a text, which is no token; it is another model's"
        )
    return processors.TemplateProcessing(
        single=[*first, "$A", *last], pair=[*first, "$A", "$B", *last], special_tokens=ids
    )
