"""``optimum-cli export linvt --model CHECKPOINT OUT/``, registered where optimum looks for other packages' commands.

The wheel carries this file a second time as ``optimum/commands/register/register_linvt.py``. Imports stay light:
optimum loads every registered command at start-up.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

__all__ = ["REGISTER_COMMANDS"]


class LinvtExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum ships no types
    """The export under optimum's conventions."""

    COMMAND = CommandInfo(name="linvt", help="Export a LinVT video LLM to a bundle that runs without torch.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Optimum's names for model and output; the rest as in ``python -m export``."""
        from export.__main__ import add_export_options

        parser.add_argument("-m", "--model", required=True, dest="checkpoint", help="checkpoint folder or hub id")
        parser.add_argument("output", type=Path, help="folder to write the bundle to")
        add_export_options(parser)

    def run(self) -> None:
        """Export; exits with the command's code when it was refused."""
        from export.__main__ import PROGRAM, export
        from runtime.cli import guarded

        if code := guarded(PROGRAM, lambda: export(self.args)):
            sys.exit(code)


REGISTER_COMMANDS = [(LinvtExportCommand, ExportCommand)]
