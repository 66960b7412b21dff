"""Read from an ONNX file which other files hold weights of it.

ONNX Runtime resolves these names itself, against the working directory for a model from memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath, PureWindowsPath
from types import MappingProxyType

MODEL, GRAPH, NODE, ATTRIBUTE, TENSOR, SPARSE, FUNCTION, TRAINING = range(8)
PARTS: MappingProxyType[int, dict[int, int]] = MappingProxyType(
    {
        MODEL: {7: GRAPH, 20: TRAINING, 25: FUNCTION},
        GRAPH: {1: NODE, 5: TENSOR, 15: SPARSE},
        NODE: {5: ATTRIBUTE},
        ATTRIBUTE: {5: TENSOR, 6: GRAPH, 10: TENSOR, 11: GRAPH, 22: SPARSE, 23: SPARSE},
        SPARSE: {1: TENSOR, 2: TENSOR},
        FUNCTION: {7: NODE, 11: ATTRIBUTE},
        TRAINING: {1: GRAPH, 2: GRAPH},
    }
)
"""Message of onnx.proto -> number of a field -> the message in it."""
EXTERNAL_DATA = 13
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5


def external_files(content: bytes | memoryview) -> list[str]:
    """Return the locations of weights outside the file; raises ValueError for a damaged file."""
    found: list[str] = []
    waiting = [(MODEL, memoryview(content))]
    while waiting:
        kind, message = waiting.pop()
        for number, value in _fields(message):
            if kind == TENSOR and number == EXTERNAL_DATA:
                found.extend(_location(value))
            elif (inner := PARTS.get(kind, {}).get(number)) is not None:
                waiting.append((inner, value))
    return sorted(set(found))


def is_beside(location: str) -> bool:
    """Tell whether a location stays in the model's folder."""
    paths = (PurePosixPath(location), PureWindowsPath(location))
    return not any(path.anchor or ".." in path.parts for path in paths)


def _location(entry: memoryview) -> Iterator[str]:
    pair = {number: bytes(value).decode() for number, value in _fields(entry)}
    if pair.get(1) == "location":
        yield pair.get(2, "")


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and content of a message's fields that have a length."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            _, at = _varint(message, at)
            continue
        if wire == LENGTH:
            size, at = _varint(message, at)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(message):
            raise ValueError("a field is cut off")
        if wire == LENGTH:
            yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
    raise ValueError("a number is cut off")
