"""Parts of a file that holds one array: several ranges of bytes, or a file object for a parser."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from chunkq.paths import is_url
from chunkq.storage.formats.single_file import SingleFile

MAX_GAP = 1 << 16
"""Bytes between two ranges at a URL that are read rather than requested separately."""
MAX_REQUEST = 16 << 20
"""Bytes above which ranges are not joined into one request."""
CACHED_BYTES = 16 << 20
"""Bytes of cached blocks per file object at a URL."""


class Range(NamedTuple):
    """The bytes from `start` up to `stop` of a file."""

    start: int
    stop: int


def open_binary(file: SingleFile, block_bytes: int) -> Any:
    """Open a file for a parser that seeks; a file at a URL is read in cached blocks of this size.

    Raises OSError, and StoreError if a web server does not send parts of files.
    """
    if not is_url(file.path):
        return open(file.inner, "rb")
    file.require_parts()
    return file.filesystem.open(
        file.inner,
        "rb",
        block_size=block_bytes,
        cache_type="blockcache",
        cache_options={"maxblocks": CACHED_BYTES // block_bytes},
    )


def read_ranges(file: SingleFile, ranges: Sequence[Range]) -> list[memoryview]:
    """Return the bytes of each range. Raises OSError, and EOFError if the file ends before one.

    Ranges at a URL that are near to each other are read in one request.
    """
    max_gap = MAX_GAP if is_url(file.path) else 0
    order = sorted(range(len(ranges)), key=lambda number: ranges[number])
    groups = list(_groups(ranges, order, max_gap))
    spans = [
        Range(ranges[group[0]].start, max(ranges[number].stop for number in group))
        for group in groups
    ]
    contents: list[memoryview] = [memoryview(b"")] * len(ranges)
    for group, span, content in zip(groups, spans, _read_spans(file, spans), strict=True):
        for number in group:
            start, stop = ranges[number]
            if len(content) < stop - span.start:
                raise EOFError(
                    f"expected {stop - start} bytes at byte {start}, found "
                    f"{max(0, span.start + len(content) - start)}; the file is truncated"
                )
            contents[number] = memoryview(content)[start - span.start : stop - span.start]
    return contents


def _groups(ranges: Sequence[Range], order: Sequence[int], max_gap: int) -> Iterator[list[int]]:
    """Yield the numbers of the ranges that one request reads, in ascending order."""
    group: list[int] = []
    stop = 0
    for number in order:
        one = ranges[number]
        is_near = group and one.start <= stop + max_gap
        if group and not (is_near and one.stop - ranges[group[0]].start <= MAX_REQUEST):
            yield group
            group = []
        group.append(number)
        stop = max(stop, one.stop) if len(group) > 1 else one.stop
    if group:
        yield group


def _read_spans(file: SingleFile, spans: Sequence[Range]) -> Sequence[bytes]:
    if is_url(file.path):
        starts, stops = [span.start for span in spans], [span.stop for span in spans]
        contents = file.filesystem.cat_ranges([file.inner] * len(spans), starts, stops)
        for content in contents:
            if isinstance(content, BaseException):
                raise content
        if any(len(c) > s.stop - s.start for c, s in zip(contents, spans, strict=True)):
            raise EOFError("the server sends whole files instead of parts")
        return list(contents)
    with open(file.inner, "rb", buffering=0) as stream:
        return [_read_span(stream.fileno(), span) for span in spans]


def _read_span(descriptor: int, span: Range) -> bytes:
    parts: list[bytes] = []
    position = span.start
    while position < span.stop:
        part = os.pread(descriptor, span.stop - position, position)
        if not part:
            break
        parts.append(part)
        position += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
