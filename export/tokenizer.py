"""The checkpoint's tokenizer as one ``tokenizer.json``, and its generation settings.

Where only vocabulary and merges are published, transformers' fast tokenizer of the class the checkpoint names converts
them; a SentencePiece model is converted by ``slow_tokenizer``. Renders no prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from export.checkpoint import Checkpoint
from export.families.base import PromptFacts
from export.slow_tokenizer import SLOW_TOKENIZERS, slow_tokenizer
from runtime.errors import CheckpointError
from runtime.options import GenerationDefaults

__all__ = ["generation_defaults", "stop_ids", "token_id", "tokenizer_from_checkpoint"]

GENERATION_FIELDS = GenerationDefaults.__struct_fields__


def tokenizer_from_checkpoint(checkpoint: Checkpoint, prompt: PromptFacts) -> Tokenizer:
    """The tokenizer, with the tokens that the family's code adds; it must know all that the prompt needs.

    Raises:
        CheckpointError: no tokenizer, a broken one, or one that lacks those tokens.
    """
    written = "".join(layout.template for layout in prompt.layouts.values())
    needed = {layout.visual_token for layout in prompt.layouts.values()} | {prompt.image_token, prompt.end_token}
    needed |= {token for token in prompt.reserved if token in written}
    path = checkpoint.folder / "tokenizer.json"
    tokenizer = read_tokenizer(path) if path.exists() else converted(checkpoint, prompt)
    lacking = [token for token in needed.difference(prompt.extra_tokens) if tokenizer.token_to_id(token) is None]
    if lacking and (has_model(checkpoint) or transformers_class(tokenizer_class(checkpoint))):
        tokenizer = converted(checkpoint, prompt)  # tokenizer.json is a base model's, the tokens are in other files
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in prompt.extra_tokens])
    for token in sorted(needed):
        token_id(tokenizer, token)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """Parse ``tokenizer.json``."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise CheckpointError(f"{path} is broken: {error}; download it again") from error


def converted(checkpoint: Checkpoint, prompt: PromptFacts) -> Tokenizer:
    """A tokenizer from vocabulary files, as the class the checkpoint names reads them."""
    name = tokenizer_class(checkpoint)
    if has_model(checkpoint):
        return slow_tokenizer(checkpoint, name, prompt.layouts["frames"].template)
    kind = transformers_class(name)
    if kind is None and name not in SLOW_TOKENIZERS:
        raise CheckpointError(
            f"{checkpoint.folder}: no tokenizer.json, and tokenizer_class {name!r} of tokenizer_config.json is not "
            "one of transformers' own; add a tokenizer.json"
        )
    names = kind.vocab_files_names if kind else {"vocab_file": "tokenizer.model"}
    files = [file for part, file in names.items() if part != "tokenizer_file"]
    missing = [file for file in files if not (checkpoint.folder / file).is_file()]
    if missing and not (checkpoint.folder / "tokenizer.json").is_file():  # transformers makes an empty one then
        raise CheckpointError(f"{checkpoint.folder} has neither tokenizer.json nor {missing[0]}; download it again")
    try:
        tokenizer: Tokenizer = kind.from_pretrained(checkpoint.folder, local_files_only=True).backend_tokenizer
    except Exception as error:  # the tokenizers library below raises nothing narrower
        raise CheckpointError(
            f"{checkpoint.folder}: {name} could not be converted to tokenizer.json: {error}; add a tokenizer.json"
        ) from error
    return tokenizer


def has_model(checkpoint: Checkpoint) -> bool:
    """Whether there is a SentencePiece model and a class that is known to read it."""
    return tokenizer_class(checkpoint) in SLOW_TOKENIZERS and (checkpoint.folder / "tokenizer.model").is_file()


def transformers_class(name: str) -> Any:
    """The tokenizer class of that name, the fast one of two; None where transformers has none."""
    import transformers

    kind = getattr(transformers, f"{name.removesuffix('Fast')}Fast", None) or getattr(transformers, name, None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerBase)
    return kind if known else None


def tokenizer_class(checkpoint: Checkpoint) -> str:
    """The transformers class that ``tokenizer_config.json`` names; empty where it names none."""
    name = checkpoint.json("tokenizer_config.json").get("tokenizer_class")
    return name if isinstance(name, str) else ""


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that has to exist."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise CheckpointError(
            f"the tokenizer has no token {token!r}, which the family's prompt needs; "
            "tokenizer.json or tokenizer_config.json is another model's"
        )
    return int(found)


def stop_ids(checkpoint: Checkpoint, tokenizer: Tokenizer, end_token: str) -> tuple[int, ...]:
    """Ids that end an answer: those of ``generation_config.json`` and the template's end token."""
    listed: Any = checkpoint.json("generation_config.json").get("eos_token_id")
    ids = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(type(id_) is int and id_ >= 0 for id_ in ids):
        raise CheckpointError(
            f"generation_config.json has eos_token_id {listed!r}, expected a token id or a list of them"
        )
    return tuple(sorted({*ids, token_id(tokenizer, end_token)}))


def generation_defaults(checkpoint: Checkpoint) -> GenerationDefaults:
    """What ``generation_config.json`` says about decoding; transformers' defaults for the rest."""
    config = checkpoint.json("generation_config.json")
    given = {name: config[name] for name in GENERATION_FIELDS if config.get(name) is not None}
    try:
        return GenerationDefaults(**given)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"generation_config.json does not fit: {error}; correct the field or remove it"
        ) from error
