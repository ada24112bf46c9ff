"""What the engine needs from an inference library, and the factory that picks one.

A ``Backend`` opens the graphs of one bundle. ``Graph`` is a stage that maps arrays to arrays; ``Decoder`` is the LLM
with its KV cache, which stays where the backend computes. Implementations sit beside this module (``backend_ort``)
and are imported by the factory alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.errors import OptionError

__all__ = ["BACKENDS", "Array", "Backend", "BackendName", "Decoder", "Graph", "open_backend"]

BackendName = Literal["auto", "cpu", "cuda"]
BACKENDS: tuple[BackendName, ...] = ("auto", "cpu", "cuda")

MAX_THREADS = 1024  # starting more takes minutes where it works at all

Array = NDArray[Any]


class Graph(Protocol):
    """One opened stage."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs by name -> outputs by name."""


class Decoder(Protocol):
    """The LLM over one KV cache."""

    capacity: int

    def step(self, embeds: NDArray[np.float32], position_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append rows (S, D) at positions (axes, S) -> logits (V,) of the last row; capacity must not be passed."""


class Backend(Protocol):
    """The graphs of one bundle on one device."""

    name: str

    def graph(self, stage: str) -> Graph:
        """The stage's graph, opened on first use and kept."""

    def decoder(self, capacity: int) -> Decoder:
        """A decoder with an empty cache of its own, which may come to hold ``capacity`` tokens."""

    def close(self) -> None:
        """Free everything; a graph or decoder asked for afterwards is a ``BackendError``. May be called twice."""


def open_backend(bundle: Bundle, name: BackendName, *, threads: int | None = None) -> Backend:
    """The backend called ``name`` over ``bundle``; "auto" takes CUDA where ONNX Runtime offers it, else the CPU.

    Args:
        bundle: a checked bundle.
        name: one of ``BACKENDS``.
        threads: compute threads on the CPU; None takes one per core.

    Raises:
        BackendError: the device is not available.
        OptionError: ``threads`` is out of range.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise OptionError(f"threads is {threads}, expected 1 to {MAX_THREADS}; leave it out for one per core")
    from runtime.backend_ort import OrtBackend, choose_provider

    return OrtBackend(bundle, choose_provider(name), threads)
