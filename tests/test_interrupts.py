"""Ctrl-C and SIGTERM end a command also where Python or a library loses them."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.cli import guarded
from runtime.errors import DependencyError
from tests.commands import Captured

ROOT = Path(__file__).parent.parent
Ending = tuple[signal.Signals, int]
ENDINGS: list[Ending] = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


class Deaf:
    """Its destructor gets the signal."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)
        time.sleep(0)  # Python looks for signals


def in_a_destructor(number: int) -> None:
    Deaf(number)


def in_a_callback(number: int) -> None:
    class Thing: ...

    thing = Thing()
    reference = weakref.ref(thing, lambda _: Deaf(number))
    del thing
    assert reference() is None


def in_an_import(number: int) -> None:
    try:
        os.kill(os.getpid(), number)
        time.sleep(0)
    except BaseException as error:
        raise ImportError("initialization failed") from error


def translated(number: int) -> None:
    try:
        in_an_import(number)
    except ImportError as error:
        raise DependencyError("it is not installed") from error


def handlers() -> tuple[object, ...]:
    return sys.unraisablehook, signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)


def code_of(program: Callable[[], int]) -> object:
    try:
        return guarded("p", program)
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize(("number", "code"), ENDINGS)
@pytest.mark.parametrize("lose", [in_a_destructor, in_a_callback, in_an_import, translated])
def test_an_interrupt_is_not_lost(lose: Callable[[int], None], number: int, code: int, capfd: Captured) -> None:
    before = handlers()

    def command() -> int:
        lose(number)
        for _ in range(1000):
            time.sleep(0.01)
        return 0

    assert code_of(command) == code
    assert capfd.readouterr().err == ("p: interrupted\n" if number == signal.SIGINT else "")
    assert handlers() == before


@pytest.mark.parametrize(("number", "code"), ENDINGS)
@pytest.mark.parametrize("error", [None, DependencyError("it is not installed"), ImportError("it is broken")])
def test_an_interrupt_that_is_lost_in_the_end_counts_too(
    error: Exception | None, number: int, code: int, capfd: Captured
) -> None:
    """Also before a command that ends at once says what it refuses."""
    before = handlers()

    def command() -> int:
        in_a_destructor(number)
        if error is not None:
            raise error
        return 0

    assert code_of(command) == code
    assert capfd.readouterr().err == ("p: interrupted\n" if number == signal.SIGINT else "")
    time.sleep(0.05)  # nothing comes after it
    assert handlers() == before


def test_what_else_a_destructor_raises_goes_where_it_went(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __del__(self) -> None:
            raise ValueError("broken")

    seen: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: seen.append(lost.exc_type))

    def command() -> int:
        Broken()
        gc.collect()
        return 7

    assert guarded("p", command) == 7 and seen == [ValueError]


def test_an_import_error_of_its_own_is_no_interrupt() -> None:
    def command() -> int:
        raise ImportError("initialization failed") from ValueError()

    with pytest.raises(ImportError, match="initialization failed"):
        guarded("p", command)


LOADING = """
import os, sys, time
from runtime.cli import guarded
from runtime.interrupts import imports

class Finder:
    sent = False

    def find_spec(self, name, path=None, target=None):
        if not self.sent and imports(sys._getframe()):
            self.sent = True
            os.kill(os.getpid(), int(sys.argv[1]))
            time.sleep(0.1)
            print(f"{name} goes on", flush=True)

def command():
    import onnxruntime
    time.sleep(10)
    return 0

sys.meta_path.insert(0, Finder())
sys.exit(guarded("p", command))
"""


@pytest.mark.parametrize(("number", "code"), ENDINGS)
def test_an_import_is_not_interrupted(number: int, code: int) -> None:
    """Some C extensions abort the process then."""
    words = [sys.executable, "-c", LOADING, str(int(number))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, preexec_fn=heard)
    assert done.returncode == code and done.stdout.endswith(" goes on\n"), done.stderr
    assert done.stderr == ("p: interrupted\n" if number == signal.SIGINT else "")


def heard() -> None:
    """Undo what a shell does for what it starts in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_interrupt_that_is_ignored_stays_ignored() -> None:
    """As a shell has it for what it starts in the background."""
    code = """if True:
        import signal, sys, time
        from runtime.cli import guarded
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(guarded("p", lambda: signal.raise_signal(signal.SIGINT) or 7))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (7, "")


def test_an_interrupt_of_text_that_runs_gives_the_code_too() -> None:
    """Python would end itself by the signal, whatever the code."""
    code = """if True:
        import signal, sys
        from runtime.cli import guarded
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(guarded("p", lambda: exec("signal.raise_signal(signal.SIGINT)")))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "p: interrupted\n")
