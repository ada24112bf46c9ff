"""Commands called in this process, and the one line with which they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import runtime.run

Captured = pytest.CaptureFixture[str]


def refused(capfd: Captured, arguments: list[str], code: int = 1, main: Callable[..., int] = runtime.run.main) -> str:
    """The one line on stderr of a command that must fail with nothing on stdout."""
    capfd.readouterr()
    try:
        assert main(arguments) == code
    except SystemExit as error:
        assert error.code == code
    output, line = capfd.readouterr()
    assert output == ""
    assert line.startswith("linvt-") and line.endswith("\n") and line.count("\n") == 1 and len(line) < 500, line
    return line
