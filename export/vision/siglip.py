"""SigLIP, the vision tower of BLIP-3, Aquila-VL and Mipha.

Module names are transformers' own, but for the inside of the blocks, which are ``export.vision.block``'s. The pooling
head is not built: every family takes patches. Facts from transformers' ``modeling_siglip`` and
google/siglip-so400m-patch14-384, whose sizes are the defaults here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from export.fields import MOST_LAYERS, field, one_of, positive, size
from export.load import Names, OrZeros, Rule, prefixed, renamed
from export.peer import Peer, VisionPeer
from export.vision.block import Activation, Block, BlockConfig, stacked_qkv
from runtime.errors import CheckpointError
from runtime.preprocess import MAX_SIDE

__all__ = ["SigLIP", "SigLIPConfig", "siglip_config", "siglip_names", "siglip_peer"]

ACTIVATIONS: dict[str, Activation] = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
}


Value = TypeVar("Value")


@dataclass(frozen=True)
class SigLIPConfig:
    """Sizes of the tower, by default those of SO400M/14-384.

    Attributes:
        layers: blocks that run; a family may leave out the last ones.
        image_size: the side its position table was made for, in pixels; no multiple of the patch needs be.
        post_norm: the norm after the last block runs.
    """

    width: int = 1152
    heads: int = 16
    layers: int = 27
    mlp_width: int = 4304
    patch_size: int = 14
    image_size: int = 384
    norm_eps: float = 1e-6
    post_norm: bool = False
    activation: Activation = "gelu_tanh"

    @property
    def grid(self) -> int:
        """Whole patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of a frame."""
        return self.grid**2

    @property
    def block(self) -> BlockConfig:
        """Sizes of one block."""
        return BlockConfig(self.width, self.heads, self.mlp_width, self.norm_eps, self.activation)


SO400M = SigLIPConfig()


class Embeddings(nn.Module):
    """Patches, each with a learned position; there is no class token."""

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.patches, config.width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(F, 3, H, W) -> (F, patches, E); rows and columns beyond the last whole patch are left out."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        embedded: Tensor = patches + self.position_embedding.weight
        return embedded


class Encoder(nn.Module):
    """The blocks that run."""

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config.block) for _ in range(config.layers))

    def forward(self, states: Tensor) -> Tensor:
        """(F, patches, E) -> (F, patches, E)."""
        for block in self.layers:
            states = block(states)
        return states


class SigLIP(nn.Module):
    """Vision tower."""

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.width, config.norm_eps) if config.post_norm else nn.Identity()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised frames (F, 3, H, W) -> patch features (F, patches, E)."""
        features: Tensor = self.post_layernorm(self.encoder(self.embeddings(pixel_values)))
        return features


def siglip_names(ours: str, theirs: str) -> tuple[Rule, ...]:
    """From ``SigLIP``'s parameters below the prefix ``ours`` to transformers' names below ``theirs``.

    Both end with a dot or are empty; ``theirs`` is what stands before ``embeddings.``.
    """
    layers, stored = re.escape(ours) + r"encoder\.layers", theirs + r"encoder.layers.\1."
    return (
        stacked_qkv(layers, stored + "self_attn", "q_proj", "k_proj", "v_proj"),
        renamed(layers + r"\.(\d+)\.attn\.proj\.(\w+)", stored + r"self_attn.out_proj.\2"),
        renamed(layers + r"\.(\d+)\.norm([12])\.(\w+)", stored + r"layer_norm\2.\3"),
        prefixed(ours, theirs),
    )


class PeerTower(nn.Module):
    """Transformers' tower in the form of ``SigLIP``."""

    def __init__(self, model: nn.Module, *, post_norm: bool) -> None:
        super().__init__()
        self.model = model
        self.post_norm = post_norm

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised frames (F, 3, H, W) -> patch features (F, patches, E)."""
        found = self.model(pixel_values, output_hidden_states=True)
        features: Tensor = found.last_hidden_state if self.post_norm else found.hidden_states[-1]
        return features


def siglip_peer(config: SigLIPConfig, prefix: str) -> VisionPeer:
    """Transformers' own class with the blocks that run; ``prefix`` stands before ``embeddings.`` in the checkpoint."""
    sizes = {
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "intermediate_size": config.mlp_width,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": next(name for name, ours in ACTIVATIONS.items() if ours == config.activation),
        "vision_use_head": False,
    }
    unused: tuple[Rule, ...] = ((r"post_layernorm\.\w+", lambda found: OrZeros(prefix + found[0])),)
    names = Names((*(() if config.post_norm else unused), prefixed("", prefix)))
    return VisionPeer(
        Peer("SiglipVisionModel", sizes, names), "tower", lambda model: PeerTower(model, post_norm=config.post_norm)
    )


def siglip_config(
    config: Mapping[str, Any],
    path: str = "",
    *,
    left_out: int = 0,
    post_norm: bool = False,
    usual: SigLIPConfig | None = SO400M,
) -> SigLIPConfig:
    """Read transformers' fields of a SigLIP vision configuration.

    Args:
        config: a JSON file's content.
        path: where the fields stand in it, "" or with a dot at the end.
        left_out: last blocks that the family does not run.
        post_norm: see ``SigLIPConfig``.
        usual: holds for absent fields; None where all must be there.
    """
    section = field(config, path.removesuffix("."), dict) if path else config

    def known(name: str, default: Value, read: Callable[[Mapping[str, Any], str], Value]) -> Value:
        return default if usual and section.get(name) is None else read(config, path + name)

    side, plain = partial(size, most=MAX_SIDE), usual or SO400M
    one_of(config, f"{path}num_channels", 3)
    known("hidden_act", "", partial(field, kind=str))
    found = SigLIPConfig(
        width=known("hidden_size", plain.width, size),
        heads=known("num_attention_heads", plain.heads, size),
        layers=known("num_hidden_layers", plain.layers, partial(size, most=MOST_LAYERS)) - left_out,
        mlp_width=known("intermediate_size", plain.mlp_width, size),
        patch_size=known("patch_size", plain.patch_size, side),
        image_size=known("image_size", plain.image_size, side),
        norm_eps=known("layer_norm_eps", plain.norm_eps, positive),
        post_norm=post_norm,
        activation=ACTIVATIONS[one_of(config, f"{path}hidden_act", *ACTIVATIONS)],
    )
    refuse_misfit(found, path, left_out)
    return found


def refuse_misfit(found: SigLIPConfig, path: str, left_out: int) -> None:
    """Sizes that are all right alone and not together."""
    if found.layers < 1:
        raise CheckpointError(
            f"config.json field {path}num_hidden_layers is {found.layers + left_out}, expected more than {left_out}, "
            "which is how many layers do not run"
        )
    if found.width % found.heads:
        raise CheckpointError(
            f"config.json field {path}hidden_size is {found.width}, expected a multiple of {path}num_attention_heads, "
            f"which is {found.heads}"
        )
    if not found.grid:
        raise CheckpointError(
            f"config.json field {path}image_size is {found.image_size}, expected at least {path}patch_size, "
            f"which is {found.patch_size}"
        )
