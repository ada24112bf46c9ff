"""The LLM in ONNX Runtime on a device: a cache that grows there, and steps replayed as one CUDA graph.

``OrtDeviceDecoder`` is ``OrtDecoder`` whose cache moves to a larger one without a host trip. ``OrtGraphDecoder`` takes
the whole cache at once, since a graph is captured for fixed shapes and addresses, and hands it with its captured graph
to the next decoder of the same size.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.backend_ort import OrtDecoder, create_session
from runtime.manifest import Manifest
from runtime.ort_device import SILENT, lengthening_graph
from runtime.ort_errors import translated

__all__ = ["FixedCache", "OrtDeviceDecoder", "OrtGraphDecoder", "SharedByDecoders"]

LEAST_ROOM = 256  # tokens
# Of a run: which captured graph it replays (kOrtRunOptionsConfigCudaGraphAnnotation of ONNX Runtime's
# onnxruntime_run_options_config_keys.h); NO_GRAPH runs without one, 0 is reserved.
GRAPH_ID = "gpu_graph_id"
NO_GRAPH = "-1"
NUMBERS = itertools.count(1)


@dataclass
class SharedByDecoders:
    """What a decoder leaves for the next.

    Attributes:
        free: at most one cache that nobody uses.
        joining: a session of ``lengthening_graph``, made when it is first needed.
    """

    free: list[FixedCache] = field(default_factory=list)
    joining: ort.InferenceSession | None = None

    def take(self, room: int) -> FixedCache | None:
        """The free cache if it has this room; one of another goes, so that its memory serves the next."""
        found = [fixed for fixed in self.free if fixed.room == room]
        self.free.clear()
        return found[0] if found else None

    def give(self, fixed: FixedCache) -> None:
        """Keep a cache, unless there is one."""
        if not self.free:
            self.free.append(fixed)


class OrtDeviceDecoder(OrtDecoder):
    """The LLM over a KV cache that stays on the device when it grows."""

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, name: str, capacity: int, shared: SharedByDecoders
    ) -> None:
        super().__init__(session, manifest, name, capacity)
        self.shared = shared

    def moved(self, value: ort.OrtValue | None) -> ort.OrtValue:
        """A cache tensor of ``room`` tokens, zero behind what ``value`` holds: what is masked must still be finite."""
        if value is None:
            return super().moved(None)
        new, held = self.unset(self.room), value.shape()[2]
        self.join(new, (value, held), (self.zeros(self.room - held), self.room - held))
        return new

    def join(self, new: ort.OrtValue, *parts: tuple[ort.OrtValue, int]) -> None:
        """Fill a cache tensor with two parts, each so many tokens from the beginning of a tensor's memory."""
        shared = self.shared
        if shared.joining is None:
            shared.joining = create_session(lengthening_graph(self.element), self.device, None)
        binding = shared.joining.io_binding()
        for name, (tensor, tokens) in zip(("old", "rest"), parts, strict=True):
            binding.bind_input(name, self.device, 0, self.element, self.shape_of(tokens), tensor.data_ptr())
        binding.bind_output("new", self.device, 0, self.element, new.shape(), new.data_ptr())
        shared.joining.run_with_iobinding(binding, silent())

    def shape_of(self, tokens: int) -> list[int]:
        """Of a cache tensor."""
        return [*self.shape[:2], tokens, self.shape[2]]

    def unset(self, tokens: int) -> ort.OrtValue:
        """Cache of so many tokens that holds anything."""
        return ort.OrtValue.ortvalue_from_shape_and_type(self.shape_of(tokens), self.dtype.type, self.device, 0)

    def zeros(self, tokens: int) -> ort.OrtValue:
        """Cache of so many tokens that holds zeros."""
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(self.shape_of(tokens), self.dtype), self.device, 0)


class FixedCache:
    """A KV cache and a step's inputs and outputs at fixed addresses, and the number of the graph captured of them."""

    def __init__(self, decoder: OrtDeviceDecoder, width: int, axes: int, vocabulary: int) -> None:
        self.room = decoder.room
        self.number = next(NUMBERS)
        self.cache = {name: decoder.unset(decoder.room) for name in decoder.cache}
        positions = (1, 1) if axes == 1 else (axes, 1, 1)
        arrays = {
            "inputs_embeds": np.zeros((1, 1, width), np.float32),
            "position_ids": np.zeros(positions, np.int64),
            "write_index": np.zeros(1, np.int64),
        }
        device = decoder.device
        self.inputs = {name: ort.OrtValue.ortvalue_from_numpy(array, device, 0) for name, array in arrays.items()}
        self.logits = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, vocabulary), np.float32), device, 0)
        self.binding = decoder.session.io_binding()
        for name, value in self.inputs.items():
            self.binding.bind_ortvalue_input(name, value)
        self.binding.bind_ortvalue_output("logits", self.logits)
        decoder.bind_cache(self.binding, self.cache)

    def clear(self, decoder: OrtDeviceDecoder) -> None:
        """Zero it: what another answer left could hold something that is not a finite number.

        ONNX Runtime sets no memory, so one tensor of zeros comes from the host and is copied on the device.
        """
        zeros = decoder.zeros(self.room)
        for value in self.cache.values():
            decoder.join(value, (zeros, self.room - 1), (zeros, 1))


class OrtGraphDecoder(OrtDeviceDecoder):
    """The LLM, whose steps of one token are replayed."""

    def __init__(
        self,
        session: ort.InferenceSession,
        manifest: Manifest,
        name: str,
        capacity: int,
        shared: SharedByDecoders,
    ) -> None:
        """Take the cache that is free if it is of the right size, or a new one; it goes back with this object."""
        super().__init__(session, manifest, name, capacity, shared)
        room = max(LEAST_ROOM, 1 << (capacity - 1).bit_length())
        self.room = max(capacity, min(room, manifest.context))
        with translated(f"allocate a KV cache of {self.room} tokens", "use fewer frames or tokens"):
            vocabulary = int(session.get_outputs()[self.outputs.index("logits")].shape[-1])
            self.fixed = shared.take(self.room) or FixedCache(self, manifest.width, manifest.positions.axes, vocabulary)
            self.fixed.clear(self)
            self.bind_cache(self.binding, self.fixed.cache)
        weakref.finalize(self, shared.give, self.fixed)
        self.options.add_run_config_entry(GRAPH_ID, NO_GRAPH)
        self.replay = silent()
        self.replay.add_run_config_entry(GRAPH_ID, str(self.fixed.number))

    def step(self, embeds: NDArray[np.float32], position_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append rows (S, D) at positions (axes, S) -> logits (V,) of the last row."""
        if len(embeds) > 1:
            return super().step(embeds, position_ids)
        assert self.length < self.capacity, "the caller sizes the cache"
        inputs = self.fixed.inputs
        with translated("run decode", "leave out --cuda-graph, or open with --verify"):
            inputs["inputs_embeds"].update_inplace(np.ascontiguousarray(embeds[None]))
            inputs["position_ids"].update_inplace(
                np.ascontiguousarray(position_ids.reshape(inputs["position_ids"].shape()))
            )
            inputs["write_index"].update_inplace(np.array([self.length], np.int64))
            self.session.run_with_iobinding(self.fixed.binding, self.replay)
            logits: NDArray[np.float32] = self.fixed.logits.numpy()[0].copy()
        self.length += 1
        return logits


def silent() -> ort.RunOptions:
    """Options of a run that says nothing."""
    options = ort.RunOptions()
    options.log_severity_level = SILENT
    return options
