"""A byte-level BPE tokenizer in the shape of Qwen2's, trained on the demo's own sentences.

The vocabulary holds the 256 bytes, merges that make every wording and the fixed system text short, and InternVL's
special tokens at the end, so any text can still be encoded.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from export.demo.questions import all_texts

__all__ = ["SPECIAL_TOKENS", "SYSTEM", "prompt", "token_id", "train_tokenizer"]

SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGED_WORDS = 1024  # upper limit of the vocabulary before special tokens; training stops when all is merged


def token_id(tokenizer: Tokenizer, text: str) -> int:
    """The id of a token that is known to exist."""
    found = tokenizer.token_to_id(text)
    assert found is not None
    return int(found)


def prompt(question: str, queries: int) -> str:
    """Everything before the answer, with one placeholder per LinVT query."""
    context = "<IMG_CONTEXT>" * queries
    return (
        f"<|im_start|>system\n{SYSTEM}<|im_end|><|im_start|>user\n<img>{context}</img>\n"
        f"{question}<|im_end|><|im_start|>assistant\n"
    )


def train_tokenizer() -> Tokenizer:
    """Train on every wording and on the prompt's fixed text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MERGED_WORDS,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    fixed = ["system", "user", "assistant", SYSTEM]
    tokenizer.train_from_iterator([*all_texts(), *fixed * 50], trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL_TOKENS])
    return tokenizer
