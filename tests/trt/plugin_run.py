"""Run an engine that has a plugin: what comes before, the plugin's own launch, what comes after, as work of a stream.

The plugin's tensors lie in device memory of the execution context. An ``IPluginV3`` is asked to enqueue; the kernel of
a quickly deployable plugin is launched from what the engine holds.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tests.trt.driver_calls import Launch
from tests.trt.expressions import evaluate
from tests.trt.plan import NUMPY, Plan, Shape, bytes_of, known_values, session_of
from tests.trt.plugin_host import Hosted, tensor_desc

if TYPE_CHECKING:
    from tests.trt.double import Double

__all__ = ["PluginInstance", "load_plugins", "split"]

Values = dict[str, NDArray[Any]]


def load_plugins(world: Double, plan: Plan) -> list[Any]:
    """Plugins of classes, made from the fields that the engine kept; None for those that need none."""
    return [restored(world, facts) if facts["kind"] == "v3" else None for facts in plan.plugins]


def restored(world: Double, facts: Hosted) -> Any:
    trt = world.trt
    creator = world.registry.find(facts["name"], facts["version"], facts["namespace"])
    fields = [
        trt.PluginField(name, np.array(values, np.int32).reshape(-1), trt.PluginFieldType.INT32)
        for name, values in facts["fields"].items()
    ]
    return creator.create_plugin(facts["layer"], trt.PluginFieldCollection(fields), trt.TensorRTPhase.RUNTIME)


class PluginInstance:
    """The plugin of one execution context, and the memory of its tensors."""

    def __init__(self, world: Double, plan: Plan, facts: Hosted, loaded: Any, most: Mapping[str, Shape]) -> None:
        self.world = world
        self.plan = plan
        self.facts = facts
        self.object: Any = None
        if loaded is not None:
            runtime = loaded.get_capability_interface(world.trt.PluginCapabilityType.RUNTIME)
            self.object = runtime.attach_to_context(None)
        self.addresses = {}
        shapes = self.shapes(most)
        for name in (*facts["inputs"], *facts["outputs"]):
            size = max(bytes_of(facts["dtypes"][name], shapes[name]), 1)
            block = world.device.memory.allocate(size, "device", f"plugin tensor {name}")
            assert block is not None, "no memory for a plugin's tensors"
            self.addresses[name] = block.address
            weakref.finalize(self, world.reclaim, block.address, f"plugin tensor {name}")
        self.shaped: object = None

    def shapes(self, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
        """Shapes of the plugin's tensors, of the engine's inputs' shapes; the outputs' as the plugin said."""
        known = {
            name: shape for name, (_, shape) in known_values(self.plan.model, tuple(sorted(inputs.items()))).items()
        }
        sources = [known[name] for name in self.facts["inputs"]]
        assert all(-1 not in shape for shape in sources), f"the double cannot tell the plugin's input shapes: {sources}"
        found = dict(zip(self.facts["inputs"], sources, strict=True))
        for name, trees in zip(self.facts["outputs"], self.facts["shapes"], strict=True):
            found[name] = tuple(evaluate(tree, sources) for tree in trees)
        return found

    def enqueue(self, shapes: Mapping[str, Shape], stream: int) -> None:
        """Ask for the plugin's work."""
        found = self.shapes(shapes)
        if self.object is None:
            self._launch(found, stream)
            return
        descs = {name: tensor_desc(self.world, self.facts["dtypes"][name], shape) for name, shape in found.items()}
        sides = [[descs[name] for name in self.facts[side]] for side in ("inputs", "outputs")]
        if self.shaped != found:
            self.object.on_shape_change(*sides)
            self.shaped = found
        addresses = [[self.addresses[name] for name in self.facts[side]] for side in ("inputs", "outputs")]
        self.object.enqueue(*sides, *addresses, 0, stream)

    def _launch(self, shapes: Mapping[str, Shape], stream: int) -> None:
        sources = [shapes[name] for name in self.facts["inputs"]]
        numbers = {name: evaluate(tree, sources) for name, tree in self.facts["launch"].items()}
        extra = [evaluate(tree, sources) for tree in self.facts["extra"]]
        inputs, outputs = ([self.addresses[name] for name in self.facts[side]] for side in ("inputs", "outputs"))
        launch = Launch(
            entry=self.facts["entry"],
            grid=(numbers["grid_x"], numbers["grid_y"], numbers["grid_z"]),
            block=(numbers["block_x"], numbers["block_y"], numbers["block_z"]),
            shared=numbers["shared_mem"],
            arguments=(*inputs, *extra, *outputs),
            memory=self.world.device.memory,
            image=self.facts["kernel"].encode(),
        )
        self.world.driver.queue(launch, self.world.device.stream(stream))

    def write_inputs(self, values: Values) -> None:
        """Put the plugin's inputs where it reads them."""
        for name in self.facts["inputs"]:
            data = np.ascontiguousarray(values[name]).reshape(-1).view(np.uint8)
            self.world.device.memory.view(self.addresses[name], data.nbytes, f"plugin input {name}")[:] = data

    def read_outputs(self, shapes: Mapping[str, Shape]) -> Values:
        """What the plugin wrote."""
        found, made = self.shapes(shapes), {}
        for name in self.facts["outputs"]:
            dtype = self.facts["dtypes"][name]
            data = self.world.device.memory.view(self.addresses[name], bytes_of(dtype, found[name]), f"output {name}")
            made[name] = data.copy().view(NUMPY[dtype]).reshape(found[name])
        return made


@lru_cache(maxsize=16)
def split(model: bytes, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> tuple[bytes, bytes]:
    """The model without its plugin node (that of these inputs and outputs) and what depends on it, and that rest."""
    whole = onnx.load_from_string(model)
    late, after, before = set(outputs), [], []
    for node in whole.graph.node:
        if tuple(node.output) == outputs:
            continue
        depends = any(name in late for name in node.input)
        late |= set(node.output) if depends else set()
        (after if depends else before).append(node)
    names = {value.name for value in whole.graph.output}
    early = {name for node in before for name in node.output} | {value.name for value in whole.graph.input}
    needed = {name for node in after for name in node.input} & early
    first = part(whole, before, {*inputs, *needed, *(names - late)}, [value.name for value in whole.graph.input])
    second = part(whole, after, names & {name for node in after for name in node.output}, [*outputs, *sorted(needed)])
    return first, second


def part(whole: onnx.ModelProto, nodes: list[onnx.NodeProto], outputs: set[str], inputs: list[str]) -> bytes:
    """A model of some nodes."""
    kinds = {name: kind for name, (kind, _) in known_values(whole.SerializeToString(), ()).items()}
    made = onnx.ModelProto()
    made.CopyFrom(whole)
    for field, values in (("node", nodes), ("value_info", [])):
        del getattr(made.graph, field)[:]
        getattr(made.graph, field).extend(values)
    given = {value.name: value for value in whole.graph.input}
    stored = {tensor.name for tensor in whole.graph.initializer}
    del made.graph.input[:]
    made.graph.input.extend(given.get(name) or tensor(name, kinds) for name in inputs if name not in stored)
    del made.graph.output[:]
    made.graph.output.extend(tensor(name, kinds) for name in sorted(outputs))
    return made.SerializeToString()


def tensor(name: str, kinds: Mapping[str, int]) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, kinds[name], None)


def run_part(model: bytes, values: Values) -> Values:
    """What a part computes of the values it needs."""
    session = session_of(model)
    if session is None:
        return {}
    feeds = {value.name: values[value.name] for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))
