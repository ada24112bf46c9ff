"""Video in, chosen RGB frames out.

``open_source`` opens a file, a folder of images, bytes or an array; ``choose`` picks frame indices from its
timestamps; ``FrameSource.frames`` decodes just those. A failure is a ``VideoError``, a wish that cannot be
met is an ``OptionError``.

Does not resize or normalise (``runtime.preprocess`` does) and never reads from the network.
"""

from runtime.video.choose import FrameChoice, choose, uniform_indices
from runtime.video.source import FrameSource, VideoLike, open_source

__all__ = ["FrameChoice", "FrameSource", "VideoLike", "choose", "open_source", "uniform_indices"]
