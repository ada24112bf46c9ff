"""What a double does for TensorRT's network and ONNX parser: read a model, refuse it as a parser would.

The parser refuses operators that come only with a later release, plugins that are not registered, and whatever a test
tells the double to refuse. It knows none of the operators' limits; those are ``export.check``'s business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from google.protobuf.message import DecodeError

from tests.trt.plan import DTYPES, Shape

if TYPE_CHECKING:
    from tests.trt.double import Double

__all__ = ["NetworkBehaviour", "ParserBehaviour", "plugin_nodes"]

# onnx/onnx-tensorrt, docs/operators.md and docs/Changelog.md: the first release whose parser has the operator.
OPERATORS_SINCE = {
    "Attention": (10, 14),
    "RMSNormalization": (10, 15),
    "RotaryEmbedding": (10, 15),
    "TensorScatter": (10, 15),
}
# Newest opset that is taken from a release on. Real parsers do not look at it and may misread newer operators; 21 is
# what blocked weights need.
NEWEST_OPSET = {(10, 3): 21, (10, 15): 24}
STANDARD = ("", "ai.onnx")


@dataclass(eq=False)
class TensorBehaviour:
    """``ITensor`` of a network's input or output."""

    world: Double
    name: str
    elem_type: int
    dims: Shape
    face = "ITensor"

    @property
    def dtype(self) -> Any:
        return getattr(self.world.trt.DataType, DTYPES[self.elem_type])

    @property
    def shape(self) -> Shape:
        return self.dims

    @property
    def is_shape_tensor(self) -> bool:
        return False

    @property
    def is_execution_tensor(self) -> bool:
        return True

    @property
    def location(self) -> Any:
        return self.world.trt.TensorLocation.DEVICE


@dataclass(eq=False)
class LayerBehaviour:
    """``ILayer`` of a node. The bindings hand out that base class; whoever wants another sets ``__class__``."""

    name: str
    metadata: str
    type: Any  # a value of LayerType; IDENTITY where the double does not tell
    attention: AttentionBehaviour | None = None
    face = "ILayer"


@dataclass(eq=False)
class AttentionBehaviour:
    """``IAttention``, which an input and an output layer stand for."""

    name: str
    decomposable: bool = False
    face = "IAttention"


class NetworkBehaviour:
    """``INetworkDefinition``."""

    face = "INetworkDefinition"

    def __init__(self, world: Double, flags: int, builder: Any) -> None:
        self.world = world
        self.flags = flags
        self.builder = builder
        self.model: onnx.ModelProto | None = None
        self.name = "Unnamed Network 0"
        self.error_recorder = None
        self.has_implicit_batch_dimension = False
        self.inputs: list[TensorBehaviour] = []
        self.outputs: list[TensorBehaviour] = []
        self.layers: list[LayerBehaviour] = []

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags >> flag.value & 1)

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def __len__(self) -> int:
        return self.num_layers

    def get_input(self, index: int) -> TensorBehaviour:
        return self.inputs[index]

    def get_output(self, index: int) -> TensorBehaviour:
        return self.outputs[index]

    def get_layer(self, index: int) -> LayerBehaviour:
        return self.layers[index]

    @property
    def attentions(self) -> list[AttentionBehaviour]:
        """Attention that may be fused."""
        found = [layer.attention for layer in self.layers if layer.attention is not None]
        return list(dict.fromkeys(found))

    def _layers(self, node: onnx.NodeProto) -> list[LayerBehaviour]:
        origin, kinds = f"[ONNX Layer: {node.name}]", self.world.trt.LayerType
        if node.op_type != "Attention" or not hasattr(kinds, "ATTENTION_INPUT"):
            return [LayerBehaviour(node.name, origin, kinds.IDENTITY)]
        attention = AttentionBehaviour(node.name)
        return [
            LayerBehaviour(node.name, origin, kind, attention)
            for kind in (kinds.ATTENTION_INPUT, kinds.ATTENTION_OUTPUT)
        ]

    def take(self, model: onnx.ModelProto) -> None:
        """Become what a parsed model says."""
        assert self.model is None, "a network is parsed into twice"
        self.model = model
        self.name = model.graph.name or self.name
        self.layers = [layer for node in model.graph.node for layer in self._layers(node)]
        stored = {tensor.name for tensor in model.graph.initializer}
        self.inputs = [self._tensor(value) for value in model.graph.input if value.name not in stored]
        self.outputs = [self._tensor(value) for value in model.graph.output]

    def _tensor(self, value: onnx.ValueInfoProto) -> TensorBehaviour:
        kind = value.type.tensor_type
        shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
        return TensorBehaviour(self.world, value.name, kind.elem_type, shape)


@dataclass(eq=False)
class ParserError:
    """``ParserError``."""

    world: Double
    text: str
    operator: str = ""
    label: str = ""
    index: int = -1
    face = "ParserError"

    def code(self) -> Any:
        codes = self.world.trt.ErrorCode
        return codes.UNSUPPORTED_NODE if self.operator else codes.MODEL_DESERIALIZE_FAILED

    def desc(self) -> str:
        return self.text

    def file(self) -> str:
        return "ModelImporter.cpp"

    def line(self) -> int:
        return 1

    def func(self) -> str:
        return "parseNode"

    def node(self) -> int:
        return self.index

    def node_name(self) -> str:
        return self.label

    def node_operator(self) -> str:
        return self.operator

    def local_function_stack(self) -> list[str]:
        return []

    def local_function_stack_size(self) -> int:
        return 0


class ParserBehaviour:
    """``OnnxParser``."""

    face = "OnnxParser"

    def __init__(self, world: Double, network: NetworkBehaviour, logger: Any) -> None:
        self.world = world
        self.network = network
        self.logger = logger
        self.errors: list[ParserError] = []
        self.flags = 0

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> ParserError:
        return self.errors[index]

    def clear_errors(self) -> None:
        self.errors = []

    def set_flag(self, flag: Any) -> None:
        self.flags |= 1 << flag.value

    def clear_flag(self, flag: Any) -> None:
        self.flags &= ~(1 << flag.value)

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags >> flag.value & 1)

    def supports_operator(self, op_name: str) -> bool:
        return self._since(op_name) <= self.world.release

    def get_used_vc_plugin_libraries(self) -> list[str]:
        return []

    def parse(self, model: Any, path: str | None = None) -> bool:
        try:
            proto = onnx.load_from_string(bytes(memoryview(model)))
            if path:
                take_weights_in(proto, Path(path).parent)
        except (DecodeError, OSError, ValueError) as error:
            return self._failed([ParserError(self.world, f"Failed to parse the ONNX model: {error!s:.200}")])
        return self._take(proto)

    def parse_from_file(self, model: str) -> bool:
        path = Path(model if isinstance(model, str) else model.decode())
        if not path.is_file():
            return self._failed([ParserError(self.world, f"Failed to open the ONNX file {path}")])
        try:
            proto = onnx.load(path, load_external_data=False)
            take_weights_in(proto, path.parent)
        except (DecodeError, OSError, ValueError) as error:
            return self._failed([ParserError(self.world, f"Failed to parse the ONNX model: {error!s:.200}")])
        return self._take(proto)

    def _take(self, model: onnx.ModelProto) -> bool:
        found = list(self._problems(model))
        if found:
            return self._failed(found)
        self.network.take(model)
        self.world.parsed.append(model)
        return True

    def _failed(self, errors: list[ParserError]) -> bool:
        self.errors += errors
        for error in errors:
            self.world.log(self.logger, "ERROR", f"[OnnxParser] {error.label or 'model'}: {error.text}")
        return False

    def _problems(self, model: onnx.ModelProto) -> Iterator[ParserError]:
        bodies = {(function.domain, function.name): function for function in model.functions}
        opset = max((o.version for o in model.opset_import if o.domain in STANDARD), default=0)
        newest = max((pair for pair in NEWEST_OPSET.items() if pair[0] <= self.world.release), default=((0, 0), 0))[1]
        if opset > newest:
            yield ParserError(self.world, f"opset {opset} is newer than this parser's {newest}")
        for index, node in enumerate(walk(model.graph)):
            reason = self._refused(node, bodies)
            if reason:
                yield ParserError(self.world, reason, node.op_type, node.name, index)

    def _refused(self, node: onnx.NodeProto, bodies: dict[tuple[str, str], onnx.FunctionProto]) -> str | None:
        told = self.world.refuse.get(node.op_type) or self.world.refuse.get(node.name)
        if told:
            return told
        if node.domain in STANDARD:
            late = self._since(node.op_type) > self.world.release
            return f"no importer registered for op: {node.op_type}" if late else None
        if plugin_of(self.world, node, bodies) is None and (node.domain, node.op_type) not in bodies:
            return f"Plugin not found, are the plugin name, version, and namespace correct? ({node.op_type})"
        for inner in bodies[node.domain, node.op_type].node if (node.domain, node.op_type) in bodies else ():
            reason = self._refused(inner, bodies)
            if reason:
                return reason
        return None

    def _since(self, operator: str) -> tuple[int, ...]:
        return OPERATORS_SINCE.get(operator, (10, 0))


def plugin_of(world: Double, node: onnx.NodeProto, bodies: dict[tuple[str, str], Any]) -> Any:
    """The registered creator that a node gets, None where it is the function body's.

    onnx-tensorrt: before 10.7 a local function goes before a plugin; later a plugin does, where the node names its
    namespace.
    """
    attributes = {attribute.name: attribute for attribute in node.attribute}
    space = attributes["plugin_namespace"].s.decode() if "plugin_namespace" in attributes else None
    version = attributes["plugin_version"].s.decode() if "plugin_version" in attributes else "1"
    has_body = (node.domain, node.op_type) in bodies
    if has_body and (world.release < (10, 7) or space is None):
        return None
    return world.registry.find(node.op_type, version, space or "")


def plugin_nodes(world: Double, model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, Any]]:
    """Nodes that become plugins, with their creators."""
    bodies = {(function.domain, function.name): function for function in model.functions}
    pairs = [(node, plugin_of(world, node, bodies)) for node in walk(model.graph) if node.domain not in STANDARD]
    return [(node, creator) for node, creator in pairs if creator is not None]


def take_weights_in(model: onnx.ModelProto, folder: Path) -> None:
    """Replace external data by the data; links are followed, as the parser does that opens a file by its name."""
    tensors = [*model.graph.initializer]
    for node in [*walk(model.graph), *(node for function in model.functions for node in function.node)]:
        tensors += [attribute.t for attribute in node.attribute if attribute.type == onnx.AttributeProto.TENSOR]
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            facts = {entry.key: entry.value for entry in tensor.external_data}
            start, length = int(facts.get("offset", 0)), int(facts.get("length", -1))
            with (folder / facts["location"]).open("rb") as file:
                file.seek(start)
                tensor.raw_data = file.read(length)
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]


def walk(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes, those of subgraphs too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from walk(attribute.g)
