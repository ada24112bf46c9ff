"""Decoded frame -> upright RGB.

swscale converts every pixel format to 8-bit RGB: 10 bit is reduced, grey is repeated over the channels, alpha
is dropped with the colours left as stored, an untagged colour space counts as BT.601. The display matrix of
the container or the stream (phones write one) is then applied: all four right angles, mirrored or not. PyAV's
``frame.rotation`` is not used: it reports a mirrored frame as one turned by 180 degrees.

Does not stretch non-square pixels and does not deinterlace.
"""

from __future__ import annotations

import av
import numpy as np
from av.sidedata.sidedata import SideData
from av.video.reformatter import VideoReformatter

from runtime.video.source import Frame


def rgb_from_frame(frame: av.VideoFrame, converter: VideoReformatter) -> Frame:
    """-> (H, W, 3) uint8 RGB as a player would show it, contiguous, read-only.

    ``converter`` serves all frames of a video: a new one starts threads, which costs more than a small frame.
    """
    rgb = converter.reformat(frame, format="rgb24").to_ndarray()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if isinstance(matrix, SideData):
        a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), dtype=np.int32).tolist()
        rgb = np.ascontiguousarray(oriented(rgb.astype(np.uint8, copy=False), a, b, c, d))
    rgb.flags.writeable = False
    return rgb.astype(np.uint8, copy=False)


def oriented(rgb: Frame, a: int, b: int, c: int, d: int) -> Frame:
    """Apply x' = a x + c y, y' = b x + d y, rounded to the nearest right angle; a view.

    x runs right and y down. When b and c outweigh a and d the axes swap; a negative factor flips its axis.
    """
    if abs(a) + abs(d) < abs(b) + abs(c):
        rgb, a, d = rgb.transpose(1, 0, 2), c, b
    return rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
