"""Ctrl-C and SIGTERM end a command wherever they land, so that it can tidy up and say so in one line.

Python alone does not see to that: it prints and forgets what a destructor or a weak reference's callback raises (every
import runs such callbacks), C extensions make an ImportError of it while they load, and an interrupt that crosses an
``exec`` of text (every dataclass runs one) ends the process by the signal although it was caught.

Answers nobody: ``runtime.cli`` does.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from runtime.errors import LinvtError

__all__ = ["INTERRUPTED", "TERMINATED", "ending", "forget_interrupt"]

INTERRUPTED = 130  # what a shell gives after SIGINT
TERMINATED = 143  # and after SIGTERM
AGAIN = 0.01  # seconds until a lost interrupt is raised again: when the callback is over


@contextmanager
def ending() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the block by ``KeyboardInterrupt`` and ``SystemExit``, whatever they ran into.

    Only a program's main thread gets signals; elsewhere nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler, hook = signal.signal(signal.SIGTERM, terminate), sys.unraisablehook
    sys.unraisablehook = lambda lost: repeat(lost) or hook(lost)
    try:
        yield
    except (LinvtError, ImportError) as error:
        if cause := ending_behind(error):
            raise cause from None
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)
        sys.unraisablehook = hook


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    """End as after Ctrl-C, so that unfinished files are removed."""
    raise SystemExit(TERMINATED)


def repeat(lost: sys.UnraisableHookArgs) -> bool:
    """Ask for the signal again where Python lost what it raised; whether this was such a case."""
    for kind, number in ((KeyboardInterrupt, signal.SIGINT), (SystemExit, signal.SIGTERM)):
        if issubclass(lost.exc_type, kind):
            threading.Timer(AGAIN, _thread.interrupt_main, (number,)).start()
            return True
    return False


def ending_behind(error: BaseException) -> BaseException | None:
    """The interrupt that an error came of, if any."""
    behind = error.__cause__ or error.__context__
    while behind is not None and not isinstance(behind, KeyboardInterrupt | SystemExit):
        behind = behind.__cause__ or behind.__context__
    return behind


def forget_interrupt() -> None:
    """Let a caught interrupt not end the process by its signal: running any text makes Python forget it."""
    exec("")
