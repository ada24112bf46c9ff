"""``python -m tests.benchmarks.calibration_memory [BUNDLE]``: does memory grow with the number of clips?

Calibrates with 8 short clips and with 800, which are the 8 under other names, in a process of its own each, and
compares the processes' peak resident memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CLIPS = 8
COUNTS = (8, 800)
SIZE, FRAMES, RATE = 128, 24, 8


def main() -> None:
    bundle = sys.argv[1] if len(sys.argv) > 1 else "demo-float"
    peaks = {}
    with tempfile.TemporaryDirectory() as place:
        originals = [encode(Path(place) / f"{number}.mp4", number) for number in range(CLIPS)]
        for count in COUNTS:
            folder = Path(place) / f"clips-{count}"
            folder.mkdir()
            for number in range(count):
                os.link(originals[number % CLIPS], folder / f"{number}.mp4")
            begin = time.perf_counter()
            peaks[count] = peak_mib(bundle, folder, Path(place) / f"bundle-{count}")
            print(f"{count:>4} clips: peak {peaks[count]:.1f} MiB, {time.perf_counter() - begin:.0f} s")
    ratio = peaks[COUNTS[1]] / peaks[COUNTS[0]]
    print(f"ratio {ratio:.4f}")
    print(json.dumps({"peak_mib": peaks, "ratio": round(ratio, 4), "within_5_percent": ratio <= 1.05}))


def encode(path: Path, number: int) -> Path:
    """Three seconds of a coloured gradient that moves, another one for every number."""
    random = np.random.default_rng(number)
    colour, speed = random.uniform(0.2, 1, 3), random.uniform(-20, 20, 2)
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for index in range(FRAMES):
            moved = (rows + speed[0] * index) % SIZE + (columns + speed[1] * index) % SIZE
            frame = av.VideoFrame.from_ndarray((moved[..., None] * colour).astype(np.uint8))
            frame.pts, frame.time_base = index, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def peak_mib(bundle: str, clips: Path, output: Path) -> float:
    """Peak resident memory of one calibration, in MiB."""
    code = (
        "import sys\nfrom calibration.__main__ import main\n"
        "code = main(sys.argv[1:])\n"
        # VmHWM, not ru_maxrss: that one starts at the peak of the process that forked us
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\nsys.exit(code)"
    )
    # A cosine that any model keeps: how much of it is left in floating point is not what is measured here.
    arguments = [bundle, str(clips), "-o", str(output), "--min-cosine", "0"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=None, text=True, check=True
    )
    return int(done.stdout.split()[-1]) / 1024  # KiB


if __name__ == "__main__":
    main()
