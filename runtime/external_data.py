"""Where a graph keeps its weights: the files that an ONNX file names, read without loading it.

ONNX Runtime before 1.24 follows such a name anywhere, be it out of the bundle or to an address in memory (checked on
1.23.2). So the names are read here, from the Protocol Buffers encoding itself, and a bundle refuses what it does not
list before any engine sees the graph.

Understands no more of ONNX than the places where tensors can stand.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["external_files"]

# message -> number of a field in it -> the message that field holds (onnx.proto)
PLACES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
KEY, VALUE = 1, 2  # fields of an entry, both strings
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
MAX_VARINT = 10  # bytes


def external_files(model: bytes) -> set[str]:
    """The files in which the tensors of a serialised ``ModelProto`` lie, as it spells them.

    Raises:
        ValueError: the bytes are no Protocol Buffers message.
    """
    files = set()
    waiting = [("model", memoryview(model))]
    while waiting:
        message, data = waiting.pop()
        if message == "entry":
            files.update(location(data))
            continue
        places = PLACES[message]
        waiting += [(places[number], content) for number, content in fields(data) if number in places]
    return files


def location(entry: memoryview) -> set[str]:
    """The file a key-value pair of a tensor names, if that is what it is about."""
    strings = [(number, bytes(content)) for number, content in fields(entry)]
    if (KEY, b"location") not in strings:
        return set()
    return {content.decode("utf-8", "backslashreplace") for number, content in strings if number == VALUE}


def fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of the length-delimited fields of one message."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        number, kind = (tag & 0xFFFFFFFF) >> 3, tag & 7
        if kind == VARINT:
            at = varint(data, at)[1]
            continue
        if kind not in (FIXED64, BYTES, FIXED32):
            raise ValueError(f"wire type {kind} at byte {at}")
        size, at = varint(data, at) if kind == BYTES else (8 if kind == FIXED64 else 4, at)
        if size > len(data) - at:
            raise ValueError(f"a field of {size} bytes where {len(data) - at} are left")
        if kind == BYTES:
            yield number, data[at : at + size]
        at += size


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """The number that begins at ``at``, and where it ends."""
    value = 0
    for index, byte in enumerate(data[at : at + MAX_VARINT]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, at + index + 1
    raise ValueError(f"a number without an end at byte {at}")
