"""``read_graph``: a bundle's graph as it is edited here, weights left in their files; errors in one line.

Does not say whether the graph is valid ONNX: those of a bundle that opens are.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from runtime.errors import BundleError
from runtime.external_data import external_files

__all__ = ["read_graph"]


def read_graph(path: Path) -> tuple[ir.Model, set[str]]:
    """The graph, and the names of the files in which its weights lie.

    Raises:
        BundleError: no file, or no graph in it.
    """
    try:
        names = external_files(path.read_bytes())  # which refuses what is no Protocol Buffers message
        return ir.load(path), names
    except (OSError, ValueError, ir.serde.SerdeError) as error:
        raise BundleError(f"cannot read {path}: {error!s:.200}; export the bundle again") from error
