"""What a family tells the exporter: a ``Backbone`` made from a checkpoint's files.

A family is one file of facts beside this one: which ``config.json`` it recognises and how it fills a ``Backbone``
from shared towers, connectors and LLMs. Nothing outside that file asks which family it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import nn

from export.checkpoint import Checkpoint
from export.llm.base import LLM
from export.load import Names
from export.peer import VisionPeer
from runtime.errors import OptionError
from runtime.preprocess import Preprocess

__all__ = ["CHATML", "Backbone", "Family", "FrameRoute", "Layout", "PromptFacts", "Route", "filled"]

Route = Literal["images", "video"]

# The conversation of Qwen's models: see ``filled``.
CHATML = """\
{% for message in messages %}
{% if loop.first and message.role != "system" %}
<|im_start|>system
{{ system }}<|im_end|>
{% endif %}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{% for part in message.content %}
{% if part.type == "video" %}@VIDEO@{% elif part.type == "image" %}@IMAGE@{% else %}{{ part.text }}{% endif %}
{% endfor %}
{% endif %}
<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""


@dataclass(frozen=True)
class FrameRoute:
    """How frames are to become tokens, where a family leaves a choice.

    Attributes:
        image_size: (height, width) in pixels, None for the family's own.
        route: "images" encodes every frame as a picture of its own; "video" is the family's way for videos.
    """

    image_size: tuple[int, int] | None = None
    route: Route = "images"

    def refuse_choices(self, family: str) -> None:
        """For a family that has one way only."""
        if self.image_size is not None:
            raise OptionError(f"--image-size: {family} has the size its checkpoint says; leave the option out")
        if self.route != "images":
            raise OptionError(f"--route {self.route}: {family} encodes every frame as an image; leave the option out")


@dataclass(frozen=True)
class Layout:
    """A chat template and the token whose rows the video's take.

    The template sees ``messages``, whose content is text or parts of type "video", "image" and "text";
    ``system``, ``visual_token``, ``image_token``, ``frames`` (how many sets of tokens the video has), ``tokens``
    (visual tokens of the video with LinVT, of each set without), ``images`` (how many there are) and
    ``image_tokens`` (tokens of each).
    """

    template: str
    visual_token: str


@dataclass(frozen=True)
class PromptFacts:
    """How the family puts a video or pictures and a question into text.

    Attributes:
        system: the system text a conversation starts with; None where the family has no place for one.
        layouts: by name; "video" (LinVT's rows) and "frames" (no LinVT: every frame's tokens) must be there,
            "training" where LinVT's training data stood otherwise in the prompt. All of them know images.
        image_token: the placeholder whose rows a picture's take.
        end_token: ends an answer.
        reserved: control tokens that a question may not contain.
        add_special_tokens: the tokenizer puts its own in front (``<s>``).
        extra_tokens: tokens the family's code adds to its tokenizer when it runs, in that order.
        prompt_rows: tokens that stand in a prompt for a row of the table which is not their own.
    """

    system: str | None
    layouts: Mapping[str, Layout]
    image_token: str
    end_token: str
    reserved: tuple[str, ...]
    add_special_tokens: bool = False
    extra_tokens: tuple[str, ...] = ()
    prompt_rows: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Backbone:
    """An image-level LLM, ready to be loaded part by part.

    Attributes:
        tokens_per_frame: N, tokens the connector makes of one frame, or of one group of frames.
        vision: builds tower and connector, unfilled: pixel_values (F, 3, H, W) -> tokens (F / frame_group, N, D);
            takes pixel_mask (F, patches) besides where ``preprocess`` makes one.
        vision_names: from that module's parameters to the checkpoint's.
        vision_peer: the same module, or a part of it, in transformers.
        frame_group: frames that become one set of tokens together.
        tower_blocks: blocks of the tower that the checkpoint holds, as config.json says, used or not.
        grid: rows and columns of the N tokens, for an LLM whose positions have three axes.
        pooled: the tokens are pooled for the prompt, so that LinVT has no use for them.
        merge: whether visual rows replace those of the placeholders or are added to them.
    """

    family: str
    tokens_per_frame: int
    vision: Callable[[], nn.Module]
    vision_names: Names
    llm: LLM
    preprocess: Preprocess
    prompt: PromptFacts
    tower_blocks: int
    frame_group: int = 1
    grid: tuple[int, int] | None = None
    pooled: bool = False
    merge: Literal["replace", "add"] = "replace"
    vision_peer: VisionPeer | None = None


class Family(Protocol):
    """One file of facts."""

    name: str

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is this family's."""

    def backbone(self, checkpoint: Checkpoint, route: FrameRoute) -> Backbone:
        """Read the facts; raises CheckpointError where a field is missing or not supported."""


def filled(conversation: str, *, video: str, image: str) -> str:
    """A template in whose messages ``@VIDEO@`` and ``@IMAGE@`` stand for what a video and an image become."""
    return conversation.replace("@VIDEO@", video).replace("@IMAGE@", image)
