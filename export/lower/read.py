"""``read_graph`` and ``read_stage``: a bundle's graph as it is edited here, weights left in their files.

What is read computes something, has all its weights, and can be written again; as a stage it also is the one that the
manifest describes. Everything else is refused in one line.

Does not say whether every node is valid ONNX; where editing shows that one is not, ``understood`` says so.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it has no stubs

from export.lower.whole import check_computes, check_tensors, check_weights
from runtime.bundle import Bundle
from runtime.errors import BundleError
from runtime.external_data import external_files

__all__ = ["read_graph", "read_stage", "understood"]

# onnx-ir warns of tensors that nothing makes, and Python prints what no handler takes: they are refused here instead.
logging.getLogger("onnx_ir").addHandler(logging.NullHandler())
# What onnx and onnx-ir raise of a file that holds something else or half of it; they assert that a tensor's numbers
# stand in its dtype's field.
UNREADABLE = (OSError, ValueError, TypeError, DecodeError, ir.serde.SerdeError, AssertionError)


def read_stage(bundle: Bundle, stage: str) -> ir.Model:
    """The graph of one stage.

    Raises:
        BundleError: it is no graph, lacks something, or is another than the manifest says.
    """
    spec = bundle.manifest.stages[stage]
    model, _ = read_graph(bundle.path(spec.file))
    check_tensors(model, spec)
    return model


def read_graph(path: Path) -> tuple[ir.Model, set[str]]:
    """The graph, and the names of the files in which its weights lie.

    Raises:
        BundleError: no file, no graph in it, or one that lacks something.
    """
    try:
        names = external_files(path.read_bytes())  # which refuses what is no Protocol Buffers message
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that onnx does not know: what is missing is refused
            model = ir.load(path)
        ir.to_proto(model)  # which refuses names that are no text
        check_computes(model, path)
        check_weights(model, path)
    except UNREADABLE as error:
        raise BundleError(f"cannot read {path}: {error!s:.200}; export the bundle again") from error
    return model, names


@contextmanager
def understood() -> Iterator[None]:
    """Turn what onnx-ir raises of nodes that it cannot make sense of into ``BundleError``."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        raise BundleError(f"graph: found {error!s:.200}, expected valid ONNX; export the bundle again") from error
