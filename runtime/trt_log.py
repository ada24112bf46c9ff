"""TensorRT's messages, kept instead of printed: they hold the reason where a call only returns nothing.

TensorRT has one logger for the process, the first that it is given, and warns of every other: so there is one here,
which hands every message to the logs that live. Its class is made when it is asked for, for TensorRT is imported by
then only.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["Log", "capturing"]

KEPT = 500  # messages
LETTERS = {"INTERNAL_ERROR": "F", "ERROR": "E", "WARNING": "W", "INFO": "I", "VERBOSE": "V"}  # as TensorRT's own logger
LENGTH = 300  # characters of a reason; TensorRT names C++ conditions at length


class Log:
    """What TensorRT said.

    Attributes:
        logger: for TensorRT's factories.
        lines: (letter of the severity, text), the newest last.
    """

    def __init__(self, logger: Any, echo: Callable[[str], None] | None = None) -> None:
        self.logger = logger
        self.echo = echo
        self.lines: deque[tuple[str, str]] = deque(maxlen=KEPT)

    def take(self, severity: str, text: str) -> None:
        """Keep one message; may be called from any thread, and must not fail."""
        letter = LETTERS.get(severity, "?")
        self.lines.append((letter, text))
        if self.echo and letter != "V":
            self.echo(f"[TRT] [{letter}] {text}")

    def reason(self) -> str:
        """The last error, or else the last warning."""
        return next(iter([*self.latest("EF"), *self.latest("W")]), "TensorRT gave no reason")

    def error(self) -> str:
        """The last error; empty where there is none."""
        return next(iter(self.latest("EF")), "")

    def warnings(self) -> list[str]:
        """All warnings, each once, the oldest first."""
        return list(dict.fromkeys(reversed(self.latest("W"))))

    def latest(self, letters: str) -> list[str]:
        """Messages of these severities, one line each, the newest first."""
        lines = self.lines.copy()  # other threads add to it, and what grows cannot be gone through
        return [f"{' '.join(text.split()):.{LENGTH}}" for letter, text in reversed(lines) if letter in letters]

    def clear(self) -> None:
        """Forget what was said about something else."""
        self.lines.clear()


def capturing(trt: Any, echo: Callable[[str], None] | None = None) -> Log:
    """A log of all that TensorRT says from now on; ``echo`` is given every line but verbose ones."""
    logger = logger_of(trt)
    log = Log(logger, echo)
    alive = [known for known in logger.logs if known() is not None]
    logger.logs = (*alive, weakref.ref(log))  # another tuple: threads of TensorRT may be going through the one before
    return log


_loggers: list[tuple[Any, Any]] = []  # the module ``tensorrt`` and its logger, which TensorRT does not keep alive


def logger_of(trt: Any) -> Any:
    """The process's logger for a module ``tensorrt``."""
    if not _loggers or _loggers[0][0] is not trt:
        _loggers[:] = [(trt, made_logger(trt))]
    return _loggers[0][1]


def made_logger(trt: Any) -> Any:
    """A logger that hands messages on."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Hands messages to ``logs``, weak references."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.logs: tuple[weakref.ref[Log], ...] = ()

        def log(self, severity: Any, msg: str) -> None:
            for known in self.logs:
                if (log := known()) is not None:
                    log.take(severity.name, msg)

    return Logger()
