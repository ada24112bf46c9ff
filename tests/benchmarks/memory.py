"""``python -m tests.benchmarks.memory [BUNDLE]``: does memory grow with the length of a video?

Encodes a 10-second and a 10-minute clip of 1080p H.264 at 30 frames a second, answers one question about each in a
process of its own with the same number of frames, and compares the processes' peak resident memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, RATE = 1920, 1080, 30
SECONDS = {"10 s": 10, "10 min": 600}
FRAMES = 16


def main() -> None:
    bundle = sys.argv[1] if len(sys.argv) > 1 else "demo"
    with tempfile.TemporaryDirectory() as folder:
        peaks = {}
        for name, seconds in SECONDS.items():
            clip = Path(folder) / f"{seconds}.mp4"
            encode(clip, seconds)
            begin = time.perf_counter()
            peaks[name] = peak_mib(bundle, clip)
            took = time.perf_counter() - begin
            print(f"{name:>7}: {clip.stat().st_size / 1e6:7.1f} MB file, peak {peaks[name]:.1f} MiB, {took:.1f} s")
    ratio = peaks["10 min"] / peaks["10 s"]
    print(json.dumps({"peak_mib": peaks, "ratio": round(ratio, 4), "within_5_percent": ratio <= 1.05}))


def encode(path: Path, seconds: int) -> None:
    """Ten encoded seconds of a moving gradient with noise, its packets repeated up to ``seconds``."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast", "crf": "30", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        packets = [packet for frame in frames() for packet in stream.encode(frame)] + stream.encode()
        stored = [(bytes(packet), packet.is_keyframe) for packet in packets]
        for index in range(seconds * RATE):
            data, is_keyframe = stored[index % len(stored)]
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, RATE), is_keyframe
            packet.pts = packet.dts = index
            container.mux(packet)


def frames() -> Iterator[av.VideoFrame]:
    """Ten seconds of pictures."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    noise = random.integers(0, 16, (HEIGHT, WIDTH, 3))
    for index in range(10 * RATE):
        gradient = np.stack([rows + 8 * index, columns - 8 * index, rows + columns], -1) // 4
        frame = av.VideoFrame.from_ndarray(((gradient + noise) % 256).astype(np.uint8))
        frame.pts = index
        yield frame


def peak_mib(bundle: str, clip: Path) -> float:
    """Peak resident memory of one answer, in MiB."""
    arguments = [bundle, str(clip), "What is happening?", "--frames", str(FRAMES), "--max-new-tokens", "8", "--json"]
    code = (
        "import sys\nfrom runtime.run import main\n"
        "code = main(sys.argv[1:])\n"
        # VmHWM, not ru_maxrss: that one starts at the peak of the process that forked us
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0], file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return int(done.stderr.split()[-1]) / 1024  # KiB


if __name__ == "__main__":
    main()
