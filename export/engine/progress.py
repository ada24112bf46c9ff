"""What a build tells on stderr: a line for every stage, a percentage on a terminal, and a Ctrl-C that arrives.

TensorRT builds for minutes inside one call. Signals that come meanwhile are kept, end the build at its next step
where the version has a progress monitor, and are raised when the call has returned.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from runtime.cli import printable

__all__ = ["Phases", "Progress", "monitor"]

CLEAR = "\r\x1b[2K"
SHOWN_EVERY = 0.2  # seconds


class Progress:
    """Lines on stderr; the running one is overwritten on a terminal."""

    def __init__(self) -> None:
        self.stream = sys.stderr or io.StringIO()  # None where it was closed before we began
        self.live = self.stream.isatty()
        self.shown = 0.0
        self.stopped = 0  # number of a signal that came

    def say(self, line: str) -> None:
        """A line that stays."""
        self.write(f"{CLEAR if self.live else ''}{printable(line)}\n")

    def show(self, line: str) -> None:
        """A line for now, on a terminal, a few times a second."""
        now = time.monotonic()
        if self.live and now - self.shown >= SHOWN_EVERY:
            self.shown = now
            self.write(f"{CLEAR}{printable(line)}")

    def write(self, text: str) -> None:
        """Write what TensorRT's threads may ask for too, where nothing may be raised."""
        with suppress(OSError, ValueError):  # nobody reads it any more
            self.stream.write(text)
            self.stream.flush()

    @contextmanager
    def holding_signals(self) -> Iterator[None]:
        """Keep SIGINT and SIGTERM until the block ends, then act on them as before; a second one ends the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.stopped = 0
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self.stopped:
                signal.raise_signal(self.stopped)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal."""
        if self.stopped:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.stopped = number


@dataclass
class Phase:
    """A phase of TensorRT's builder."""

    parent: str | None
    steps: int
    done: int = 0


class Phases:
    """How far a build is: phases in phases, each of so many steps. Safe under threads."""

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}
        self.lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        with self.lock:
            self.phases[name] = Phase(parent, max(steps, 1))

    def step(self, name: str, step: int) -> None:
        """One of its steps, counted from 0, is done."""
        with self.lock:
            if name in self.phases:
                self.phases[name].done = step + 1

    def finish(self, name: str) -> None:
        """A phase is over."""
        with self.lock:
            self.phases.pop(name, None)

    def line(self) -> str:
        """The outermost phase and how much of it is done, e.g. "Tactic timing 43 %"."""
        with self.lock:
            top = next((name for name, phase in self.phases.items() if phase.parent not in self.phases), None)
            return "" if top is None else f"{top} {min(100, int(100 * self.share(top)))} %"

    def share(self, name: str) -> float:
        """Part of a phase that is done, the step it is in counted by its own phases."""
        phase = self.phases[name]
        inner = max((self.share(other) for other, child in self.phases.items() if child.parent == name), default=0.0)
        return min(1.0, (phase.done + inner) / phase.steps)


def monitor(trt: Any, phases: Phases, show: Callable[[str], None], stopped: Callable[[], bool]) -> Any:
    """TensorRT's progress monitor, or None where the version has none; its build ends once ``stopped``."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes progress on; called from TensorRT's threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.step(phase_name, step)
            show(phases.line())
            return not stopped()

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()
