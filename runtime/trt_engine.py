"""One TensorRT engine: opened from its file, given shapes and addresses, run.

Feeds that lie on the host go through pinned staging, those on the device are read where they lie; outputs stay there.
A run is asked for and not waited for. Builds nothing, and knows nothing of the KV cache (``trt_decoder``).
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kernels import cuda
from runtime.backend import Array, Tensor
from runtime.device_tensor import DeviceTensor
from runtime.dtypes import NUMPY
from runtime.engines import EngineRecord
from runtime.errors import BackendError
from runtime.trt_device import ALIGNMENT, TrtDevice, advised, narrowed, translated
from runtime.trt_log import Log

__all__ = ["TrtEngine", "TrtGraph"]

Shape = tuple[int, ...]


def failure(what: str, log: Log, command: str) -> BackendError:
    """What TensorRT would not do, why by its log, and what to do about that."""
    reason = log.reason()
    return BackendError(f"TensorRT {what}: {reason}; {advised(reason, f'run: {command}')}")


class TrtEngine:
    """An engine on the device, and a context for each of its profiles."""

    def __init__(self, device: TrtDevice, path: Path, record: EngineRecord, command: str) -> None:
        """Deserialise.

        Args:
            device: what engines share.
            path: the engine's file.
            record: what it was built of.
            command: the line that builds it again.

        Raises:
            BackendError: TensorRT does not take it, or there is not enough memory.
        """
        self.device = device
        self.path = path
        self.record = record
        self.command = command
        self.inputs = {tensor.name: tensor.dtype for tensor in record.inputs}
        self.outputs = {tensor.name: tensor.dtype for tensor in record.outputs}
        device.log.clear()
        with translated(f"open {path.name}", device.log):
            self.engine = self.deserialized()
            self.check_locations()
            # Of all profiles: IExecutionContext.set_device_memory takes no less, whatever profile a context has.
            self.scratch: int = self.engine.device_memory_size_v2
        self.contexts: dict[int, TrtContext] = {}
        self.buffers: dict[str, DeviceTensor] = {}  # of inputs that come from the host

    def deserialized(self) -> Any:
        """TensorRT's engine, from the mapped file."""
        try:
            with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
                engine = self.device.runtime.deserialize_cuda_engine(blob)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise BackendError(f"{self.path} cannot be read: {error}; run: {self.command}") from error
        if engine is None:
            raise failure(f"does not take {self.path}", self.device.log, self.command)
        return engine

    def check_locations(self) -> None:
        """The engine has the record's tensors, and wants none of them on the host."""
        trt, engine = self.device.trt, self.engine
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        if names != {*self.inputs, *self.outputs}:
            raise BackendError(f"{self.path} has other tensors than its record says; run: {self.command}")
        for name in sorted(names):
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise BackendError(
                    f"{self.path} wants its tensor {name} on the host, where this runtime does not put it; "
                    "report this as a bug"
                )

    def context(self, profile: int) -> TrtContext:
        """The profile's context, made on first use and shared by all who wait for their runs' turn."""
        if profile not in self.contexts:
            self.contexts[profile] = TrtContext(self, profile)
        return self.contexts[profile]

    def aliases(self) -> dict[str, str]:
        """Outputs that are an input, updated in place: output -> input."""
        if not hasattr(self.engine, "get_aliased_input_tensor"):
            return {}
        found = {name: self.engine.get_aliased_input_tensor(name) for name in self.outputs}
        return {name: source for name, source in found.items() if source}

    def uploaded(self, feeds: Mapping[str, Tensor]) -> dict[str, DeviceTensor]:
        """Inputs on the device, as the engine takes them; what is not there yet is on its way."""
        found: dict[str, DeviceTensor] = {}
        pieces = []
        for name, value in feeds.items():
            dtype = self.inputs[name]
            if isinstance(value, DeviceTensor) and value.dtype == NUMPY[dtype]:
                found[name] = self.at_boundary(name, value)
            else:
                array = narrowed(np.asarray(value), dtype)
                found[name] = self.buffer(name, array.shape)
                pieces.append((found[name].address, array))
        if pieces:
            self.device.upload(pieces)
        return found

    def at_boundary(self, name: str, value: DeviceTensor) -> DeviceTensor:
        """The tensor itself, or a copy at an aligned address."""
        if value.address % ALIGNMENT == 0:
            return value
        copy = self.buffer(name, value.shape)
        cuda.copy(copy.address, value.address, value.nbytes, self.device.stream)
        return copy

    def buffer(self, name: str, shape: Shape) -> DeviceTensor:
        """Memory for an input, kept for the next run; runs follow each other on one stream."""
        dtype = self.inputs[name]
        wanted = DeviceTensor(self.buffers[name].block, 0, shape, NUMPY[dtype]) if name in self.buffers else None
        if wanted is None or wanted.nbytes > self.buffers[name].nbytes:
            self.device.hold(self.buffers.pop(name, None))
            self.buffers[name] = wanted = self.device.empty(shape, dtype)
        return wanted


class TrtContext:
    """An execution context of one profile, whose scratch memory is the device's.

    Keeps TensorRT's engine but not ours, which keeps contexts: whoever lets go of an engine frees it at once.
    """

    def __init__(self, engine: TrtEngine, profile: int) -> None:
        self.device = engine.device
        self.kept = engine.engine
        self.needed = engine.scratch
        self.shapes = engine.record.profiles[profile]
        self.name, self.command = engine.path.name, engine.command
        self.scratch = 0  # address of the scratch memory it was given
        strategy = self.device.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.device.log.clear()
        with translated(f"open {self.name}", self.device.log):
            self.context = engine.engine.create_execution_context(strategy)
            if self.context is None or not self.context.set_optimization_profile_async(
                profile, self.device.stream.handle
            ):
                raise self.failure(f"makes no context of {self.name}")

    def refresh(self) -> bool:
        """Give it the scratch memory where that moved; whether it did."""
        memory = self.device.reserve(self.needed)
        if memory.address == self.scratch:
            return False
        self.context.set_device_memory(memory.address, memory.size)
        self.scratch = memory.address
        return True

    def set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """Shapes of all inputs.

        Raises:
            BackendError: one is outside what the engine was built for.
        """
        for name, shape in shapes.items():
            if not self.context.set_input_shape(name, shape):
                built = self.shapes.get(name)
                limits = f"{list(built.least)} to {list(built.most)}" if built else "another shape"
                raise BackendError(
                    f"{self.name} was built for {name} of {limits}, found {list(shape)}; run: {self.command} with "
                    "--min or --max that cover it"
                )
        missing = self.context.infer_shapes()
        assert not missing, f"shapes of {missing} were not set"

    def set_addresses(self, addresses: Mapping[str, int]) -> None:
        """Where inputs and outputs lie."""
        self.device.log.clear()
        for name, address in addresses.items():
            if not self.context.set_tensor_address(name, address):
                raise self.failure(f"takes no address for {name} of {self.name}")

    def shape(self, name: str) -> Shape:
        """Of an output, once the inputs' are set."""
        return tuple(self.context.get_tensor_shape(name))

    def execute(self) -> None:
        """Ask the stream for one run."""
        self.device.log.clear()
        if not self.context.execute_async_v3(self.device.stream.handle):
            raise self.failure(f"does not run {self.name}")

    def failure(self, what: str) -> BackendError:
        """What TensorRT would not do, why by its log, and what to do about that."""
        return failure(what, self.device.log, self.command)


class TrtGraph:
    """A stage whose outputs stay on the device."""

    def __init__(self, engine: TrtEngine) -> None:
        self.engine = engine

    def run(self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Inputs by name -> outputs by name, which may not be there yet; those given are written in place."""
        engine, device = self.engine, self.engine.device
        with translated(f"run {engine.record.stage}", device.log), device.asking():
            inputs = engine.uploaded(feeds)
            context = engine.context(0)
            context.refresh()
            context.set_shapes({name: value.shape for name, value in inputs.items()})
            results = {name: self.target(context, name, (outputs or {}).get(name)) for name in engine.outputs}
            tensors = {**inputs, **results}
            context.set_addresses({name: value.address for name, value in tensors.items()})
            device.hold(engine, *tensors.values())
            context.execute()
            return {**results, **self.delivered(results, outputs or {})}

    def target(self, context: TrtContext, name: str, given: Tensor | None) -> DeviceTensor:
        """Where the engine writes an output: what was given if it can, else memory of its own."""
        shape, dtype = context.shape(name), self.engine.outputs[name]
        if isinstance(given, DeviceTensor) and given.dtype == NUMPY[dtype] and given.address % ALIGNMENT == 0:
            assert all(a in (b, -1) for a, b in zip(shape, given.shape, strict=True)), f"{name} is {shape}"
            return given
        return self.engine.device.empty(shape, dtype)

    def delivered(self, results: Mapping[str, DeviceTensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy what could not be written in place to where it was wanted."""
        device = self.engine.device
        for name, target in given.items():
            found = results[name]
            if found is target:
                continue
            if isinstance(target, DeviceTensor):
                assert found.dtype == target.dtype, "engines have the dtypes of their graphs"
                cuda.copy(target.address, found.address, found.nbytes, device.stream)
                device.hold(target)
            else:
                host: Array = np.asarray(found)
                np.copyto(target, host)
        return dict(given)
