"""One execution of an engine in a double: memory checked when it is asked for and when it is done, work on a stream.

With a plugin it is three pieces of work: what comes before, the plugin's own, what comes after.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tests.trt.plan import NUMPY, Plan, Shape, bytes_of, compute
from tests.trt.plugin_run import PluginInstance, run_part, split
from tests.trt.streams import Stream, Work

if TYPE_CHECKING:
    from tests.trt.double import Double

__all__ = ["Execution"]

Values = dict[str, NDArray[Any]]


class Execution:
    """Shapes and addresses of one execution, fixed when it was asked for."""

    def __init__(
        self,
        world: Double,
        plan: Plan,
        shapes: Mapping[str, Shape],
        addresses: Mapping[str, int],
        scratch: tuple[int, int],
        context: object,
    ) -> None:
        self.world = world
        self.plan = plan
        self.shapes = dict(shapes)
        self.addresses = dict(addresses)
        self.scratch = scratch
        self.context = weakref.ref(context)
        self.inputs = {tensor.name: self.shapes[tensor.name] for tensor in plan.inputs}
        self.between: Values = {}

    def ask(self, stream: Stream, plugins: Sequence[PluginInstance]) -> None:
        """Ask a stream for it."""
        self.check()
        queues = self.world.device.queues
        self.check_scratch(stream)
        if not plugins:
            self.asked(stream, queues.enqueue(stream, "execute_async_v3", self.whole))
            return
        (plugin,) = plugins
        facts = plugin.facts
        parts = split(self.plan.model, tuple(facts["inputs"]), tuple(facts["outputs"]))

        def before() -> None:
            values = self.read()
            self.between = {**values, **run_part(parts[0], values)}
            plugin.write_inputs(self.between)

        def after() -> None:
            self.between |= plugin.read_outputs(self.inputs)
            self.write({**self.between, **run_part(parts[1], self.between)})

        queues.enqueue(stream, "execute_async_v3: before the plugin", before)
        plugin.enqueue(self.inputs, stream.handle)
        self.asked(stream, queues.enqueue(stream, "execute_async_v3", after))

    def asked(self, stream: Stream, work: Work) -> None:
        """Remember who uses the scratch memory until when."""
        if not stream.capture:
            self.world.pending = [entry for entry in self.world.pending if entry[2]() is not None]
            self.world.pending.append((self.scratch, stream, weakref.ref(work)))

    def check_scratch(self, stream: Stream) -> None:
        """Scratch memory that another stream may be using at the same time."""
        start, size = self.scratch
        for (other_start, other_size), other, reference in self.world.pending:
            work = reference()
            overlap = start < other_start + other_size and other_start < start + size
            if work is None or stream.capture or other is stream or not overlap:
                continue
            behind = self.world.device.queues.is_behind(stream, work, other)
            assert behind, "two streams execute in the same scratch memory at once"

    def whole(self) -> None:
        """Read, compute, write."""
        self.write(compute(self.plan, self.read()))

    def check(self) -> None:
        """Every tensor in live device memory; outputs apart from everything, unless they are an input's alias."""
        assert self.context() is not None, "a context is gone before its work was done"
        ranges = {}
        for name, tensor in self.plan.by_name.items():
            size = bytes_of(tensor.dtype, self.shapes[name])
            where = f"execute_async_v3: {name} {self.shapes[name]}"
            self.world.device.memory.view(self.addresses[name], size, where, "device")
            ranges[name] = (self.addresses[name], self.addresses[name] + size)
        for output in (tensor.name for tensor in self.plan.outputs):
            alias = self.plan.aliases.get(output)
            assert alias is None or self.addresses[alias] == self.addresses[output], (
                f"{output} is {alias} updated in place, but their addresses differ"
            )
            for name, (start, end) in ranges.items():
                overlap = start < ranges[output][1] and ranges[output][0] < end
                assert name in (output, alias) or not overlap, f"memory of {output} overlaps that of {name}"

    def read(self) -> Values:
        """The inputs; the scratch memory is overwritten."""
        self.check()
        memory, values = self.world.device.memory, {}
        for tensor in self.plan.inputs:
            shape = self.shapes[tensor.name]
            data = memory.view(self.addresses[tensor.name], bytes_of(tensor.dtype, shape), f"reading {tensor.name}")
            values[tensor.name] = data.copy().view(NUMPY[tensor.dtype]).reshape(shape)
        need = self.plan.scratch_of(self.inputs)
        memory.view(self.scratch[0], need, "scratch memory", "device")[:] = self.world.scribble()
        return values

    def write(self, values: Mapping[str, NDArray[Any]]) -> None:
        """The outputs."""
        for tensor in self.plan.outputs:
            value = values[tensor.name]
            shape = self.shapes[tensor.name]
            assert value.shape == shape, f"the double computed {tensor.name} {value.shape}, expected {shape}"
            data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            self.world.device.memory.view(self.addresses[tensor.name], data.nbytes, "writing", "device")[:] = data
