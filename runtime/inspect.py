"""``python -m runtime.inspect BUNDLE``: what is inside a bundle, what was proven about it, and which engines it has."""

from __future__ import annotations

import argparse
import sys

from runtime.cli import Parser, guarded

__all__ = ["main"]

PROGRAM = "linvt-inspect"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(PROGRAM, description="Show what is inside a bundle.")
    parser.add_argument("bundle", help="bundle folder, or demo")
    parser.add_argument("--json", action="store_true", help="print the manifest and the evidence as one object")
    parser.add_argument("--verify", action="store_true", help="hash every file again")
    arguments = parser.parse_args(argv)
    return guarded(PROGRAM, lambda: inspect(arguments))


def inspect(arguments: argparse.Namespace) -> int:
    """Print what was asked for."""
    from runtime.inspect_bundle import show

    return show(arguments.bundle, arguments.json, arguments.verify)


if __name__ == "__main__":
    sys.exit(main())
