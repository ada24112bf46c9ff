"""Steps of a long command on stderr: a running bar on a terminal, a line per finished step elsewhere."""

from __future__ import annotations

import io
import resource
import sys
import time
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from runtime.cli import printable

__all__ = ["Steps"]


class Steps:
    """Names each step while it runs, and its seconds and the peak memory so far when it is over."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.step: str | None = None
        self.began = 0.0
        self.stream = sys.stderr or io.StringIO()  # None where it was closed before we began
        self.bar: tqdm[None] = tqdm(
            bar_format="{desc} {elapsed}", file=self.stream, disable=not self.stream.isatty(), leave=False
        )

    def __enter__(self) -> Steps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.end()
        self.bar.close()

    def begin(self, step: str) -> None:
        """End the step before and name the next; what stands behind a colon is shown while it lasts, on a terminal."""
        name, _, _ = step.partition(": ")
        if name != self.step:
            self.end()
            self.step, self.began = name, time.perf_counter()
        self.bar.set_description_str(printable(f"{self.title}: {step}"))

    def end(self) -> None:
        """Report the step that runs, if any."""
        if self.step is not None:
            seconds = time.perf_counter() - self.began
            self.say(f"{self.title}: {self.step:<18} {seconds:6.1f} s   peak {peak_memory() / 2**30:.2f} GiB")
        self.step = None

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        self.bar.write(printable(line), file=self.stream)


def peak_memory() -> int:
    """Most bytes this process has held so far; ``ru_maxrss`` would begin at its parent's peak."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
