"""The checkpoint's tokenizer as one ``tokenizer.json``, and its generation settings.

Where only vocabulary and merges are published, transformers' fast tokenizer of the class the checkpoint names converts
them. Renders no prompt.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from export.checkpoint import Checkpoint
from export.families.base import PromptFacts
from runtime.errors import CheckpointError
from runtime.options import GenerationDefaults

__all__ = ["generation_defaults", "stop_ids", "token_id", "tokenizer_from_checkpoint"]

GENERATION_FIELDS = GenerationDefaults.__struct_fields__


def tokenizer_from_checkpoint(checkpoint: Checkpoint, prompt: PromptFacts) -> Tokenizer:
    """The tokenizer, which must know the family's visual and end tokens.

    Raises:
        CheckpointError: no tokenizer, a broken one, or one that lacks those tokens.
    """
    path = checkpoint.folder / "tokenizer.json"
    tokenizer = read_tokenizer(path.read_text("utf-8"), checkpoint) if path.exists() else None
    if tokenizer is None or tokenizer.token_to_id(prompt.visual_token) is None:
        tokenizer = converted(checkpoint)
    for token in (prompt.visual_token, prompt.end_token):
        token_id(tokenizer, token)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_tokenizer(text: str, checkpoint: Checkpoint) -> Tokenizer:
    """Parse ``tokenizer.json``."""
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise CheckpointError(f"{checkpoint.folder}/tokenizer.json is broken: {error}") from error


def converted(checkpoint: Checkpoint) -> Tokenizer:
    """A tokenizer from vocabulary files, through the transformers class the checkpoint names."""
    import transformers

    name = str(checkpoint.json("tokenizer_config.json").get("tokenizer_class", ""))
    kind = getattr(transformers, f"{name.removesuffix('Fast')}Fast", None) or getattr(transformers, name, None)
    if kind is None:
        raise CheckpointError(
            f"{checkpoint.folder}: no usable tokenizer.json, and tokenizer_class {name!r} is not one of "
            "transformers' own; add a tokenizer.json"
        )
    try:
        tokenizer: Tokenizer = kind.from_pretrained(checkpoint.folder).backend_tokenizer
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint.folder}: {name} could not be converted to tokenizer.json: {error}"
        ) from error
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that has to exist."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise CheckpointError(f"the tokenizer has no token {token!r}, which the family's prompt needs")
    return int(found)


def stop_ids(checkpoint: Checkpoint, tokenizer: Tokenizer, end_token: str) -> tuple[int, ...]:
    """Ids that end an answer: those of ``generation_config.json`` and the template's end token."""
    listed: Any = checkpoint.json("generation_config.json").get("eos_token_id")
    ids = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    return tuple(sorted({*ids, token_id(tokenizer, end_token)}))


def generation_defaults(checkpoint: Checkpoint) -> GenerationDefaults:
    """What ``generation_config.json`` says about decoding; transformers' defaults for the rest."""
    config = checkpoint.json("generation_config.json")
    given = {name: config[name] for name in GENERATION_FIELDS if config.get(name) is not None}
    try:
        return GenerationDefaults(**given)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"generation_config.json does not fit: {error}") from error
