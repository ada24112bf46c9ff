"""Ctrl-C and SIGTERM end a command wherever they land, so that it can tidy up and say so in one line.

Python alone does not see to that: it prints and forgets what a destructor or a weak reference's callback raises (every
import runs such callbacks), C extensions abort or make an ImportError of it while they load, and an interrupt that
crosses an ``exec`` of text (every dataclass runs one) ends the process by the signal although it was caught. So a
signal waits while a module is imported, and comes again where it was lost.

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
LOADERS = ("create_module", "exec_module")
AGAIN = 0.01  # seconds until a signal is tried again: when the callback is over, or the module is imported


@contextmanager
def ending() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the block by ``KeyboardInterrupt`` and ``SystemExit``, whatever they ran into.

    Only a program's main thread gets signals; elsewhere nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = Signals(imports(sys._getframe()))
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, signals.hear)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell or a program may want another
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signals.hear)
    hook = sys.unraisablehook
    sys.unraisablehook = lambda lost: signals.repeat(lost) or hook(lost)
    try:
        yield
        signals.settle()
    except (LinvtError, ImportError) as error:
        signals.settle()
        if cause := ending_behind(error):
            raise cause from None
        raise
    finally:
        signals.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


class Signals:
    """Raises what ends the block when a signal comes, or a moment later."""

    def __init__(self, loading: int) -> None:
        self.loading = loading  # modules that are being imported around the block
        self.waiting: dict[int, threading.Timer] = {}

    def hear(self, number: int, frame: FrameType | None) -> None:
        """End the block now, or when the module that is being imported is there."""
        if imports(frame) > self.loading:
            self.again(number)
        else:
            self.end(number)

    def again(self, number: int) -> None:
        """Ask for a signal anew."""
        self.waiting[number] = threading.Timer(AGAIN, send, (number,))
        self.waiting[number].start()

    def repeat(self, lost: sys.UnraisableHookArgs) -> bool:
        """Ask for the signal again where Python lost what it raised; whether this was such a case."""
        for kind, number in ((KeyboardInterrupt, signal.SIGINT), (SystemExit, signal.SIGTERM)):
            if issubclass(lost.exc_type, kind):
                self.again(number)
                return True
        return False

    def settle(self) -> None:
        """End a block that is over before a signal was asked for again."""
        for number in tuple(self.waiting):
            self.end(number)

    def end(self, number: int) -> NoReturn:
        """Raise it, once."""
        self.cancel()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(TERMINATED)

    def cancel(self) -> None:
        """Ask for nothing any more."""
        while self.waiting:
            _, timer = self.waiting.popitem()
            timer.cancel()


def send(number: int) -> None:
    """A signal to the main thread, which wakes it where the system can."""
    thread = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and thread is not None:
        signal.pthread_kill(thread, number)
    else:
        _thread.interrupt_main(signal.Signals(number))


def imports(frame: FrameType | None) -> int:
    """How many modules are being imported where a frame runs, one by another."""
    found = 0
    while frame is not None:
        code, frame = frame.f_code, frame.f_back
        found += code.co_name in LOADERS and code.co_filename.startswith("<frozen importlib")
    return found


def ending_behind(error: BaseException) -> BaseException | None:
    """The interrupt that an error came of, if any."""
    behind = error.__cause__ or error.__context__
    while behind is not None and not isinstance(behind, KeyboardInterrupt | SystemExit):
        behind = behind.__cause__ or behind.__context__
    return behind


def forget_interrupt() -> None:
    """Let a caught interrupt not end the process by its signal: running any text makes Python forget it."""
    exec("")
