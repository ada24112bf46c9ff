"""What the engine needs from an inference library, and the factory that picks one.

A ``Backend`` opens the graphs of one bundle. ``Graph`` is a stage that maps tensors to tensors; ``Decoder`` is the LLM
with its KV cache, which stays where the backend computes. Tensors are NumPy arrays, or lie on a device: a stage takes
either, and what it gives may not be computed yet. Implementations sit beside this module (``backend_ort``,
``backend_trt``) and are imported by the factory alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from runtime.backend_names import BackendName
from runtime.bundle import Bundle
from runtime.device_tensor import DeviceTensor
from runtime.errors import OptionError
from runtime.limits import Limits

__all__ = ["Array", "Backend", "Decoder", "Graph", "Tensor", "open_backend"]

MAX_THREADS = 1024  # starting more takes minutes where it works at all

Array = NDArray[Any]
Tensor: TypeAlias = "Array | DeviceTensor"


class Graph(Protocol):
    """One opened stage."""

    def run(self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        """Inputs by name -> outputs by name; those given as ``outputs`` are written in place and among them."""


class Decoder(Protocol):
    """The LLM over one KV cache."""

    capacity: int

    def step(self, embeds: NDArray[np.float32], position_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append rows (S, D) at positions (axes, S) -> logits (V,) of the last row; capacity must not be passed."""


class Backend(Protocol):
    """The graphs of one bundle on one device.

    Attributes:
        name: "cpu", "cuda" or "tensorrt".
        reason: why it was chosen; empty where it was asked for.
        notes: what went otherwise than a user would expect, in words.
        limits: what can be asked of it.
    """

    name: str
    reason: str
    notes: list[str]
    limits: Limits

    def graph(self, stage: str) -> Graph:
        """The stage's graph, opened on first use and kept."""

    def decoder(self, capacity: int) -> Decoder:
        """A decoder with an empty cache of its own, which may come to hold ``capacity`` tokens."""

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Memory for float32 values where the graphs compute, to be written by one and read by another."""

    def finish(self) -> None:
        """Wait until everything that graphs were asked for is done."""

    def close(self) -> None:
        """Free everything; a graph or decoder asked for afterwards is a ``BackendError``. May be called twice."""


def open_backend(
    bundle: Bundle,
    name: BackendName,
    *,
    threads: int | None = None,
    low_memory: bool = False,
    cuda_graph: bool = False,
    verify: bool = False,
) -> Backend:
    """The backend called ``name`` over ``bundle``; "auto" takes the first that can run here.

    Args:
        bundle: a checked bundle.
        name: one of ``BACKENDS``.
        threads: compute threads on the CPU; None takes one per core.
        low_memory: hold one TensorRT engine at a time.
        cuda_graph: decode as a CUDA graph; TensorRT does so anyway.
        verify: hash TensorRT engines before they are used.

    Raises:
        BackendError: the device is not available, or engines do not fit it.
        DependencyError: TensorRT was asked for and is not installed.
        OptionError: ``threads`` is out of range, or an option means nothing to this backend.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise OptionError(f"threads is {threads}, expected 1 to {MAX_THREADS}; leave it out for one per core")
    from runtime.choose_backend import choose_backend

    choice = choose_backend(bundle, name)
    why = f" ({choice.reason})" if choice.reason else ""
    if low_memory and choice.name != "tensorrt":
        raise OptionError(f"low_memory is about TensorRT engines, and this runs on {choice.name}{why}; leave it out")
    if cuda_graph and choice.name == "cpu":
        raise OptionError(f"cuda_graph is about NVIDIA GPUs, and this runs on cpu{why}; leave it out")
    if choice.engines:
        from runtime.backend_trt import TrtBackend

        return TrtBackend(bundle, choice.engines, reason=choice.reason, low_memory=low_memory, verify=verify)
    from runtime.backend_ort import OrtBackend

    return OrtBackend(bundle, choice.name, threads, reason=choice.reason, cuda_graph=cuda_graph)
