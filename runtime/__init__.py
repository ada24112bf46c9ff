"""Answers questions about videos from an exported bundle, without torch.

    from runtime import VideoQA

    with VideoQA.open("demo") as qa:
        video = qa.video("clip.mp4")
        print(qa.ask(video, "What happens?").text)

This namespace is the public API; modules may change.
"""

from runtime.answer import Answer, Stream
from runtime.engine import Images, Video, VideoQA
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
