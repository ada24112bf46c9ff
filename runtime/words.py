"""What a bundle knows of words: tokenizer and template, and the embedding table that belongs to them.

Opens no graph.
"""

from __future__ import annotations

from pathlib import Path

from runtime.bundle import Bundle
from runtime.embedding import EmbeddingTable
from runtime.errors import BundleError
from runtime.text import PromptBuilder

__all__ = ["open_words"]


def open_words(bundle: Bundle) -> tuple[PromptBuilder, EmbeddingTable]:
    """The prompt builder and the table of a checked bundle.

    Raises:
        BundleError: tokenizer, template or table are damaged, or do not belong together.
    """
    template = read_text(bundle.path("chat_template.jinja"))
    manifest = bundle.manifest
    prompts = PromptBuilder(bundle.path("tokenizer.json"), template, manifest.prompt, manifest.positions)
    table = EmbeddingTable.open(bundle.path("embedding.safetensors"))
    check_table(table, bundle)
    return prompts, table


def check_table(table: EmbeddingTable, bundle: Bundle) -> None:
    """Every token the LLM can produce has a row, of the LLM's width."""
    manifest = bundle.manifest
    logits = next(spec for spec in manifest.stages["decode"].outputs if spec.name == "logits")
    vocabulary = logits.shape[-1]
    if table.width != manifest.width or (isinstance(vocabulary, int) and table.vocabulary < vocabulary):
        raise BundleError(
            f"{bundle.folder}: embedding.safetensors is ({table.vocabulary}, {table.width}), bundle.json says "
            f"({vocabulary}, {manifest.width}); the files do not belong together, export the bundle again"
        )


def read_text(path: Path) -> str:
    """A text file of the bundle."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not readable as text: {error}; export the bundle again") from error
