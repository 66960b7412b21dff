"""List the external weight files that an ONNX file refers to.

ONNX Runtime resolves these names, for a model loaded from memory against the working directory.
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
"""Message type of onnx.proto -> field number -> message type of that field."""
EXTERNAL_DATA = 13
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5


def external_files(content: bytes | memoryview) -> list[str]:
    """Return the sorted locations of external weights. Raise ValueError for a damaged file."""
    locations: list[str] = []
    pending = [(MODEL, memoryview(content))]
    while pending:
        kind, message = pending.pop()
        for number, value in _fields(message):
            if kind == TENSOR and number == EXTERNAL_DATA:
                locations.extend(_location(value))
            elif (child := PARTS.get(kind, {}).get(number)) is not None:
                pending.append((child, value))
    return sorted(set(locations))


def is_in_folder(location: str) -> bool:
    """Return whether a location is inside the folder of the model."""
    paths = (PurePosixPath(location), PureWindowsPath(location))
    return not any(path.anchor or ".." in path.parts for path in paths)


def _location(entry: memoryview) -> Iterator[str]:
    pair = {number: bytes(value).decode() for number, value in _fields(entry)}
    if pair.get(1) == "location":
        yield pair.get(2, "")


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the number and content of the length-delimited fields of a message."""
    offset = 0
    while offset < len(message):
        tag, offset = _varint(message, offset)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            _, offset = _varint(message, offset)
            continue
        if wire == LENGTH:
            size, offset = _varint(message, offset)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if offset + size > len(message):
            raise ValueError("a field is cut off")
        if wire == LENGTH:
            yield number, message[offset : offset + size]
        offset += size


def _varint(message: memoryview, offset: int) -> tuple[int, int]:
    value = shift = 0
    while offset < len(message) and shift < 64:
        byte = message[offset]
        value |= (byte & 0x7F) << shift
        offset, shift = offset + 1, shift + 7
        if not byte & 0x80:
            return value, offset
    raise ValueError("a number is cut off")
