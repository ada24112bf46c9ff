"""The LLM in TensorRT: the KV cache on the device, prefill in one context, steps replayed as a CUDA graph.

Where the engine writes the cache in place, past and present are the same memory. Where it cannot, there are two sets of
buffers, read and written in turns, and a context and a graph for each direction. A cache that is full moves to a larger
one on the device. What a decoder leaves (cache, contexts, graphs) the next one takes over.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kernels import cuda
from runtime.backend import Array
from runtime.dtypes import NUMPY
from runtime.errors import BackendError
from runtime.kv_cache import grown, in_blocks, step_feeds
from runtime.manifest import Dtype, Manifest
from runtime.trt_device import aligned, narrowed, translated, widened
from runtime.trt_engine import Shape, TrtContext, TrtEngine

__all__ = ["SlotPool", "TrtDecoder"]

PREFILL, STEP = 0, 1  # optimisation profiles
STEP_INPUTS = ("inputs_embeds", "position_ids", "write_index")


@dataclass(frozen=True)
class CacheLayout:
    """The KV cache of one engine.

    Attributes:
        names: of the graph's tensors without "past_" and "present_".
        aliased: those that the engine updates in place.
        heads, width: values of a token in one of them.
        dtype: of the values.
        least, most: tokens that the engine takes.
    """

    names: tuple[str, ...]
    aliased: frozenset[str]
    heads: int
    width: int
    dtype: Dtype
    least: int
    most: int

    @classmethod
    def of(cls, engine: TrtEngine, manifest: Manifest) -> CacheLayout:
        """What an engine and its record say."""
        names = tuple(name.removeprefix("past_") for name in engine.inputs if name.startswith("past_"))
        aliases = engine.aliases()
        ranges = [profile["past_key.0"] for profile in engine.record.profiles]
        return cls(
            names=names,
            aliased=frozenset(name for name in names if aliases.get(f"present_{name}") == f"past_{name}"),
            heads=manifest.heads_kv,
            width=manifest.head_dim,
            dtype=engine.inputs["past_key.0"],
            least=max(shapes.least[2] for shapes in ranges),
            most=min(shapes.most[2] for shapes in ranges),
        )

    @property
    def row(self) -> int:
        """Bytes of one token in one head."""
        return self.width * NUMPY[self.dtype].itemsize

    @property
    def in_place(self) -> bool:
        """Whether no tensor needs a second buffer."""
        return self.aliased == frozenset(self.names)

    def shape(self, room: int) -> Shape:
        """Of one tensor."""
        return (1, self.heads, room, self.width)

    def size(self, room: int) -> int:
        """Bytes of one tensor, rounded up."""
        return aligned(self.heads * room * self.row)


class CacheBuffers:
    """Memory of one room: a set of addresses, or two of which one is read and the other written."""

    def __init__(self, layout: CacheLayout, room: int) -> None:
        self.room = room
        size = layout.size(room)
        own = [name for name in layout.names if name not in layout.aliased]
        with translated(f"allocate a KV cache of {room} tokens"):
            self.memories = [cuda.allocate(size * len(layout.names))]
            if own:
                self.memories.append(cuda.allocate(size * len(own)))
        first = dict(zip(layout.names, range(self.memories[0].address, 2**64, size), strict=False))
        self.sets = [first]
        if own:
            self.sets.append({**first, **dict(zip(own, range(self.memories[1].address, 2**64, size), strict=False))})

    def clear(self, stream: cuda.Stream) -> None:
        """Zero what is read first: what is masked must still be finite."""
        cuda.zero(self.memories[0].address, self.memories[0].size, stream)


class StepMemory:
    """Inputs and logits of a step at fixed addresses: on the device, and pinned on the host."""

    def __init__(self, engine: TrtEngine, shapes: dict[str, Shape], vocabulary: int) -> None:
        self.engine = engine
        self.shapes = shapes
        self.places: dict[str, tuple[int, int]] = {}  # offset and bytes
        size = 0
        for name, shape in (*shapes.items(), ("logits", (1, vocabulary))):
            self.inputs_end = size
            dtype = NUMPY[{**engine.inputs, **engine.outputs}[name]]
            self.places[name] = (size, int(np.prod(shape)) * dtype.itemsize)
            size += aligned(self.places[name][1])
        self.device = cuda.allocate(size)
        self.host = cuda.pinned(size)

    def address(self, name: str) -> int:
        """On the device."""
        return self.device.address + self.places[name][0]

    def staged(self, name: str) -> Array:
        """On the host, flat, as the engine has it."""
        start, size = self.places[name]
        dtype = {**self.engine.inputs, **self.engine.outputs}[name]
        return self.host.array[start : start + size].view(NUMPY[dtype])

    def put(self, feeds: Mapping[str, Array]) -> None:
        """Inputs of the next step; the one before must have been waited for."""
        for name, array in feeds.items():
            self.staged(name)[:] = narrowed(array, self.engine.inputs[name]).reshape(-1)

    def upload(self, stream: cuda.Stream) -> None:
        """All inputs at once."""
        cuda.upload(self.device.address, self.host.array[: self.inputs_end], stream)

    def download(self, stream: cuda.Stream) -> None:
        """The logits."""
        start, size = self.places["logits"]
        cuda.download(self.host.array[start : start + size], self.address("logits"), stream)

    def logits(self) -> NDArray[np.float32]:
        """A copy (V,), once the stream was waited for."""
        return widened(self.staged("logits"), self.engine.outputs["logits"])


@dataclass
class Direction:
    """Steps that read one set of buffers and write one: a context of their own, and what was captured of it.

    A graph holds for the shapes and the state that its context had, so no other work may use the context.
    """

    context: TrtContext
    graph: cuda.Graph | None = None
    warm: bool = False
    aimed: bool = False  # shapes and addresses are set

    def forget(self) -> None:
        """Shapes or addresses change."""
        self.graph, self.warm, self.aimed = None, False, False


@dataclass
class Slot:
    """All that a decoder needs for as long as it lives."""

    buffers: CacheBuffers
    memory: StepMemory
    directions: list[Direction]
    turn: int = 0  # the set that holds the cache now


@dataclass
class SlotPool:
    """What decoders share: a slot that is free, and whether steps can be captured."""

    notes: list[str]
    keep: bool
    free: list[Slot] = field(default_factory=list)
    captures: bool = True

    def take(self, engine: TrtEngine, layout: CacheLayout, manifest: Manifest, room: int) -> Slot:
        """A slot with an empty cache of at least so many tokens."""
        slot = None
        while self.free and slot is None:
            slot = self.free.pop()
            if not room <= slot.buffers.room <= 4 * room or slot.memory.engine is not engine:
                slot = None
        if slot is None:
            slot = new_slot(engine, layout, manifest, room)
        slot.turn = 0
        engine.device.hold(slot)
        with translated("clear the KV cache"):
            slot.buffers.clear(engine.device.stream)
        return slot

    def give(self, box: list[Slot]) -> None:
        """Take back what a decoder leaves, or let it go."""
        if self.keep and not self.free:
            self.free += box
        box.clear()

    def close(self) -> None:
        """Keep nothing any more."""
        self.keep = False
        self.free.clear()


def new_slot(engine: TrtEngine, layout: CacheLayout, manifest: Manifest, room: int) -> Slot:
    """Memory and contexts of a decoder."""
    axes = manifest.positions.axes
    shapes: dict[str, Shape] = {
        "inputs_embeds": (1, 1, manifest.width),
        "position_ids": (1, 1) if axes == 1 else (axes, 1, 1),
        "write_index": (1,),
    }
    logits = next(tensor for tensor in manifest.stages["decode"].outputs if tensor.name == "logits")
    vocabulary = logits.shape[-1]
    if not isinstance(vocabulary, int):
        vocabulary = engine.engine.get_tensor_shape("logits")[1]
    with translated("make a decoder"):
        memory = StepMemory(engine, shapes, vocabulary)
        directions = [Direction(TrtContext(engine, STEP)) for _ in range(1 if layout.in_place else 2)]
    return Slot(CacheBuffers(layout, room), memory, directions)


class TrtDecoder:
    """The LLM over one KV cache."""

    def __init__(self, engine: TrtEngine, manifest: Manifest, pool: SlotPool, capacity: int) -> None:
        self.engine = engine
        self.manifest = manifest
        self.device = engine.device
        self.pool = pool
        self.capacity = capacity
        self.length = 0
        self.layout = CacheLayout.of(engine, manifest)
        self.box: list[Slot] = []  # its slot, taken when the first rows come
        weakref.finalize(self, pool.give, self.box).atexit = False

    @property
    def slot(self) -> Slot:
        """What it works with."""
        return self.box[0]

    @property
    def room(self) -> int:
        """Tokens the cache can hold now."""
        return self.slot.buffers.room if self.box else 0

    def step(self, embeds: NDArray[np.float32], position_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append rows (S, D) at positions (axes, S) -> logits (V,) of the last row."""
        rows = len(embeds)
        assert self.length + rows <= self.capacity, "the caller sizes the cache"
        feeds = step_feeds(embeds, position_ids, self.length)
        with self.device.asking():
            self.make_room(rows)
            with translated("run decode", self.device.log):
                if rows == 1:
                    self.one(feeds)
                else:
                    self.many(feeds)
            self.device.finish()
        self.length += rows
        if not self.layout.in_place:
            self.slot.turn = 1 - self.slot.turn
        return self.slot.memory.logits()

    def make_room(self, rows: int) -> None:
        """Have a cache that takes so many more tokens."""
        needed = self.length + rows
        if needed <= self.room:
            return
        layout = self.layout
        largest = in_blocks(self.capacity, layout.most)  # whole blocks: the next question may use it too
        room = max(grown(self.room, rows, largest), layout.least)
        assert needed <= room, "the caller keeps to the limits"
        if not self.box:
            self.box.append(self.pool.take(self.engine, layout, self.manifest, room))
        else:
            self.move(CacheBuffers(layout, room))

    def move(self, larger: CacheBuffers) -> None:
        """Go on in larger buffers, zero behind what the cache holds."""
        slot, layout, stream = self.slot, self.layout, self.device.stream
        old = slot.buffers
        self.device.hold(larger, old)
        with translated("move the KV cache"):
            larger.clear(stream)
            pitches = (larger.room * layout.row, old.room * layout.row)
            for name, source in old.sets[slot.turn].items():
                target = larger.sets[0][name]
                cuda.copy_rows(target, pitches[0], source, pitches[1], self.length * layout.row, layout.heads, stream)
        self.device.finish()  # so that the smaller one is freed before anything else is asked for
        slot.buffers, slot.turn = larger, 0
        for direction in slot.directions:
            direction.forget()

    def many(self, feeds: Mapping[str, Array]) -> None:
        """Prefill."""
        slot, engine = self.slot, self.engine
        inputs = engine.uploaded(feeds)
        context = engine.context(PREFILL)
        context.refresh()
        cache = dict.fromkeys((f"past_{name}" for name in self.layout.names), self.layout.shape(self.room))
        context.set_shapes({**{name: value.shape for name, value in inputs.items()}, **cache})
        context.set_addresses({name: value.address for name, value in inputs.items()})
        context.set_addresses({**self.cache_addresses(), "logits": slot.memory.address("logits")})
        context.execute()
        slot.memory.download(self.device.stream)
        self.device.hold(*inputs.values())

    def one(self, feeds: Mapping[str, Array]) -> None:
        """A step, captured when it is made for the second time in a direction and replayed from then on."""
        slot, stream = self.slot, self.device.stream
        slot.memory.put(feeds)
        direction = slot.directions[slot.turn]
        if direction.context.refresh():
            direction.forget()
        if not direction.aimed:
            self.aim(direction)
        if direction.graph is None and direction.warm and self.pool.captures:
            self.capture(direction)
        if direction.graph is not None:
            direction.graph.launch(stream)
        else:
            self.ask(direction)
            direction.warm = True

    def aim(self, direction: Direction) -> None:
        """Set shapes and addresses of a direction's context."""
        memory, context = self.slot.memory, direction.context
        cache = dict.fromkeys((f"past_{name}" for name in self.layout.names), self.layout.shape(self.room))
        context.set_shapes({**memory.shapes, **cache})
        context.set_addresses({name: memory.address(name) for name in (*STEP_INPUTS, "logits")})
        context.set_addresses(self.cache_addresses())
        direction.aimed = True

    def ask(self, direction: Direction) -> None:
        """All work of one step."""
        self.slot.memory.upload(self.device.stream)
        direction.context.execute()
        self.slot.memory.download(self.device.stream)

    def capture(self, direction: Direction) -> None:
        """Make a graph of a step; where that fails, steps go on without, and a note says so."""
        try:
            direction.graph = cuda.capture(self.device.stream, lambda: self.ask(direction))
        except (cuda.CudaError, BackendError) as error:
            self.pool.captures = False
            self.pool.notes.append(f"decoding runs without a CUDA graph: {error!s:.200}")

    def cache_addresses(self) -> dict[str, int]:
        """Where the cache is read and written in this turn."""
        sets, turn = self.slot.buffers.sets, self.slot.turn
        read, write = sets[turn], sets[(turn + 1) % len(sets)]
        past = {f"past_{name}": address for name, address in read.items()}
        return past | {f"present_{name}": address for name, address in write.items()}
