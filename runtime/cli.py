"""What every command line of the project shares: one-line errors, exit codes, options that several commands take.

Exit codes: 0 done; 1 refused or failed, with one line on stderr; 2 wrong usage; 130 interrupted, 143 terminated.
Commands parse into one record, call one function and print; no logic is here.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from runtime.backend import BACKENDS
from runtime.errors import LinvtError

__all__ = ["Parser", "add_backend_options", "guarded"]

INTERRUPTED = 130
TERMINATED = 143


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def add_backend_options(parser: argparse.ArgumentParser) -> None:
    """``--backend``, ``--threads`` and ``--verify``."""
    group = parser.add_argument_group("where it runs")
    group.add_argument("--backend", choices=BACKENDS, default="auto", help="default: the best one present")
    group.add_argument("--threads", type=int, metavar="N", help="compute threads on the CPU; default: one per core")
    group.add_argument("--verify", action="store_true", help="hash every file of the bundle again")


def guarded(program: str, command: Callable[[], int]) -> int:
    """Run a command; what it refuses becomes one line on stderr and an exit code."""
    signal.signal(signal.SIGTERM, terminate)
    try:
        code = command()
        sys.stdout.flush()
        return code
    except LinvtError as error:
        return complain(program, str(error), 1)
    except KeyboardInterrupt:
        return complain(program, "interrupted", INTERRUPTED)
    except BrokenPipeError:  # whoever read our output has left: nothing more to say to anybody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, RecursionError) as error:
        return complain(program, f"out of {type(error).__name__.removesuffix('Error').lower()}", 1)


def complain(program: str, message: str, code: int) -> int:
    """One line on stderr."""
    print(f"{program}: {message}", file=sys.stderr)  # noqa: T201  the place where commands speak
    return code


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    """End as after Ctrl-C, so that unfinished files are removed."""
    raise SystemExit(TERMINATED)
