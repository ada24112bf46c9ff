"""The published checkpoint layout of LinVT-InternVL2: config, tokenizer files and one safetensors file.

``save`` writes weights as float16; ``load`` gives the trained modules back, in float32. The exporter has its own
reader; this one serves training and evaluation only.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from export.demo.model import LINVT, MEAN, STD, VISION, DemoModel, decoder_config
from export.demo.tokenizer import SPECIAL_TOKENS, token_id

__all__ = ["load", "save"]

PUBLISHED = {"connector.": "", "linvt.": ""}  # prefixes of ours that published names do not have


def save(model: DemoModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a checkpoint folder; what is there of an earlier one is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {text: token_id(tokenizer, text) for text in SPECIAL_TOKENS}
    files = {
        "config.json": config(tokenizer.get_vocab_size(), ids),
        "generation_config.json": generation(ids),
        "preprocessor_config.json": preprocessor(),
        "added_tokens.json": ids,
        "special_tokens_map.json": special_tokens(),
        "tokenizer_config.json": tokenizer_config(ids),
    }
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    weights = {published(name): tensor.half() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> tuple[DemoModel, Tokenizer]:
    """The model, in evaluation mode, and its tokenizer."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = DemoModel(decoder_config(tokenizer.get_vocab_size()))
    stored = load_file(folder / "model.safetensors")
    model.load_state_dict({name: stored[published(name)].float() for name in model.state_dict()})
    return model.eval(), tokenizer


def published(name: str) -> str:
    """The published name of one of our tensors."""
    for ours, theirs in PUBLISHED.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def config(vocab: int, ids: dict[str, int]) -> dict[str, object]:
    """``config.json``: the published keys and ours for LinVT's choices."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": "Hermes-2",
        "torch_dtype": "float16",
        "downsample_ratio": 0.5,
        "dynamic_image_size": False,
        "force_image_size": VISION.image_size,
        "max_dynamic_patch": 1,
        "min_dynamic_patch": 1,
        "use_thumbnail": False,
        "ps_version": "v2",
        "select_layer": VISION.select_layer,
        "pad2square": False,
        "use_video_frames_compress": True,
        "use_multi_scale": True,
        "num_video_query_token": LINVT.queries,
        "linvt_num_heads": LINVT.heads,
        "linvt_num_layers": LINVT.layers,
        "linvt_top_k": LINVT.top_k,
        "linvt_pool_scales": list(LINVT.pool_scales),
        "linvt_axes": LINVT.axes,
        "linvt_select_from": LINVT.select_from,
        "linvt_positions": LINVT.positions,
        "linvt_query_self_attention": LINVT.query_self_attention,
        "linvt_residual": LINVT.residual,
        "linvt_order": LINVT.order,
        "linvt_tokens_per_frame": LINVT.tokens_per_frame,
        "linvt_max_frames": LINVT.max_frames,
        "vision_config": vision_config(),
        "llm_config": llm_config(vocab, ids),
    }


def vision_config() -> dict[str, object]:
    """InternViT's part of the config."""
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_act": "gelu",
        "hidden_size": VISION.width,
        "image_size": VISION.image_size,
        "intermediate_size": VISION.mlp_width,
        "layer_norm_eps": VISION.norm_eps,
        "norm_type": "layer_norm",
        "num_attention_heads": VISION.heads,
        "num_channels": VISION.channels,
        "num_hidden_layers": VISION.layers,
        "patch_size": VISION.patch_size,
        "qk_normalization": False,
        "qkv_bias": VISION.qkv_bias,
    }


def llm_config(vocab: int, ids: dict[str, int]) -> dict[str, object]:
    """The decoder's part of the config, in Qwen2's keys."""
    sizes = decoder_config(vocab)
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": sizes.width,
        "head_dim": sizes.head_dim,
        "intermediate_size": sizes.mlp_width,
        "max_position_embeddings": sizes.context,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.heads_kv,
        "rms_norm_eps": sizes.norm_eps,
        "rope_theta": sizes.rotary.theta,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": vocab,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }


def generation(ids: dict[str, int]) -> dict[str, object]:
    """``generation_config.json``: greedy, until the turn or the text ends."""
    return {
        "do_sample": False,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "max_new_tokens": 32,
    }


def preprocessor() -> dict[str, object]:
    """``preprocessor_config.json``."""
    return {
        "crop_size": VISION.image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "resample": 3,
        "size": VISION.image_size,
    }


def special_tokens() -> dict[str, object]:
    """``special_tokens_map.json``."""
    return {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
    }


def tokenizer_config(ids: dict[str, int]) -> dict[str, object]:
    """``tokenizer_config.json``, as InternVL2 with Qwen2's tokenizer has it."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    template = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
        "'<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_prefix_space": False,
        "errors": "replace",
        "split_special_tokens": False,
        "chat_template": template,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "added_tokens_decoder": {str(index): {"content": text, **flags} for text, index in ids.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
