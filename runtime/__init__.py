"""Answers questions about videos from an exported bundle, without torch.

    from runtime import VideoQA

    with VideoQA.open("demo") as qa:
        video = qa.video("clip.mp4")
        print(qa.ask(video, "What happens?").text)

This namespace is the public API; modules may change. What needs NumPy and PyAV is imported when it is first asked for,
so that a command can be interrupted in one line while they load.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from runtime.errors import (
    BackendError,
    BundleError,
    CheckpointError,
    DependencyError,
    LinvtError,
    OptionError,
    OutputError,
    QuestionError,
    VideoError,
)

if TYPE_CHECKING:
    from runtime.answer import Answer, Stream
    from runtime.engine import Images, Video, VideoQA
    from runtime.options import GenerationOptions

__all__ = [
    "Answer",
    "BackendError",
    "BundleError",
    "CheckpointError",
    "DependencyError",
    "GenerationOptions",
    "Images",
    "LinvtError",
    "OptionError",
    "OutputError",
    "QuestionError",
    "Stream",
    "Video",
    "VideoError",
    "VideoQA",
]

_HOMES = {
    **dict.fromkeys(("Answer", "Stream"), "runtime.answer"),
    **dict.fromkeys(("Images", "Video", "VideoQA"), "runtime.engine"),
    "GenerationOptions": "runtime.options",
}


def __getattr__(name: str) -> Any:
    """A public name that is imported when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names and what is loaded."""
    return sorted({*globals(), *__all__})
