"""What every command line of the project shares: one-line errors, exit codes, options that several commands take.

Exit codes: 0 done; 1 refused or failed, with one line on stderr; 2 wrong usage; 130 interrupted, 143 terminated.
Where whoever reads the output leaves early, the code is 1 and there is no line. A locale that cannot show a character
gets a question mark in its place; JSON is plain ASCII and loses nothing.

Commands parse into one record, call one function and print; no logic is here. They import what takes long (NumPy, PyAV,
ONNX Runtime) inside ``guarded``, and nothing of it is imported here: Ctrl-C is answered from the first moment on.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from runtime.backend_names import BACKENDS
from runtime.errors import DependencyError, LinvtError
from runtime.interrupts import INTERRUPTED, ending, forget_interrupt

__all__ = ["Parser", "add_backend_options", "ascii_json", "backend_options", "guarded", "printable", "require_extra"]


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        self.exit(2, f"{self.prog}: {printable(message)}; see {self.prog} --help\n")


def add_backend_options(parser: argparse.ArgumentParser) -> None:
    """``--backend`` and what goes with it; ``backend_options`` reads them."""
    group = parser.add_argument_group("where it runs")
    group.add_argument("--backend", choices=BACKENDS, default="auto", help="default: the best one present")
    group.add_argument("--threads", type=int, metavar="N", help="compute threads on the CPU; default: one per core")
    group.add_argument("--low-memory", action="store_true", help="hold one TensorRT engine at a time")
    group.add_argument("--cuda-graph", action="store_true", help="with CUDA: decode as one CUDA graph")
    group.add_argument("--verify", action="store_true", help="hash every file of the bundle again")


def backend_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``add_backend_options`` parsed, as ``VideoQA.open`` takes it."""
    return {name: getattr(arguments, name) for name in ("backend", "threads", "low_memory", "cuda_graph", "verify")}


def require_extra(extra: str, packages: Sequence[str]) -> None:
    """Say which extra is missing before anything fails for it.

    Raises:
        DependencyError: one of ``packages`` is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise DependencyError(f"{package} is not installed; run: pip install 'linvt-edge[{extra}]'")


def guarded(program: str, command: Callable[[], int]) -> int:
    """Run a command; what it refuses becomes one line on stderr and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
    try:
        with ending():
            code = command()
            if sys.stdout is not None:  # None where it was closed before we began
                sys.stdout.flush()
            return code
    except LinvtError as error:
        return complain(program, str(error), 1)
    except KeyboardInterrupt:
        forget_interrupt()
        return complain(program, "interrupted", INTERRUPTED)
    except BrokenPipeError:  # whoever read our output has left: nothing more to say to anybody
        silence_stdout()
        return 1
    except OSError as error:
        silence_stdout()
        return complain(program, f"{error.strerror or error}; check where the output goes", 1)
    except (MemoryError, RecursionError) as error:
        what = type(error).__name__.removesuffix("Error").lower()
        return complain(program, f"out of {what}; use fewer frames or tokens", 1)


def complain(program: str, message: str, code: int) -> int:
    """One line on stderr."""
    with suppress(OSError):
        print(f"{program}: {printable(message)}", file=sys.stderr)  # noqa: T201  the place where commands speak
    return code


def printable(text: str, kept: str = "") -> str:
    """Text that a terminal shows as it is: nothing but the ``kept`` characters moves the cursor or changes colours."""
    return "".join(
        char if char.isprintable() or char in kept else char.encode("unicode_escape").decode() for char in text
    )


def ascii_json(content: Any) -> str:
    """One JSON object on one line, in ASCII: the same in every locale."""
    import msgspec

    return json.dumps(msgspec.to_builtins(content))


def silence_stdout() -> None:
    """Send what is still buffered nowhere, so that Python does not complain about it when it exits."""
    with suppress(OSError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
