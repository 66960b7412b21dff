"""Voxels in a file that gzip has compressed, which can be read from its start only."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
from zlib_ng import gzip_ng, zlib_ng

from chunkq.geometry.box import Box
from chunkq.paths import is_url
from chunkq.storage.array import Voxels
from chunkq.storage.formats.single_file import SingleFile, StoredVoxels
from chunkq.system import buffers

MAGIC = b"\x1f\x8b"
"""First bytes of a file that gzip has compressed."""
WHOLE_BYTES = 64 << 20
"""Size (bytes) up to which the decompressed file is kept in memory instead of being staged."""
CACHE_BYTES = 256 << 20
"""Size (bytes) of the decompressed files that a process keeps."""
SIZE_BYTES = 4
"""Last bytes of a file, which contain its decompressed size modulo 2^32."""
PART_BYTES = 1 << 20
"""Bytes that are decompressed at a time when nothing is kept of them."""
PLANE_RANK = 2
"""The last axes of which whole rows are decompressed at once."""


@contextmanager
def decompressed(file: SingleFile) -> Iterator[BinaryIO]:
    """Open the decompressed content of a file, which is read once from its start."""
    with file.stream() as raw, cast(Any, gzip_ng).GzipNGFile(fileobj=raw, mode="rb") as content:
        yield content


def head(compressed: bytes, size: int) -> bytes:
    """Return the first decompressed bytes of a file that begins with `compressed`."""
    content: bytes = zlib_ng.decompressobj(16 + zlib_ng.MAX_WBITS).decompress(compressed, size)
    return content


def has_at_least(file: SingleFile, size: int) -> bool:
    """Return whether the decompressed content of a local file has `size` bytes.

    The file is decompressed only if its last bytes name another size. A file at a URL is assumed to
    be complete.
    """
    if is_url(file.path):
        return True
    with file.stream() as raw:
        raw.seek(-min(SIZE_BYTES, file.size() or 0), 2)
        if int.from_bytes(raw.read(), "little") == size % 2 ** (8 * SIZE_BYTES):
            return True
    try:
        with decompressed(file) as content:
            return _skip_all(content) >= size
    except EOFError:
        return False


def read_whole(voxels: StoredVoxels) -> Voxels:
    """Return the whole array in its stored dtype, which the process keeps for the next call.

    Raises EOFError if the file is truncated, and OSError or zlib's error if it is damaged.
    """
    key = f"{voxels.file.path} {voxels.file.state()}"
    content = _cache.get(key, lambda: _load(voxels))
    return np.ndarray(voxels.shape, voxels.dtype, content.data, voxels.offset)


def read_boxes(voxels: StoredVoxels, boxes: Iterable[Box], *, to_end: bool) -> Iterator[Voxels]:
    """Yield boxes in the stored dtype, in one pass through the file.

    The boxes follow each other in C order. `to_end` reads the rest of the file too, whose checksum
    is at its end. Raises like `read_whole`.
    """
    with decompressed(voxels.file) as content:
        _skip(content, voxels.offset)
        position = 0
        for box in boxes:
            values = buffers.zeros(box.shape, voxels.dtype)
            position = _read_box(content, voxels, box, values, position)
            yield values
        if to_end:
            _skip(content, prod(voxels.shape) * voxels.dtype.itemsize - position)
            _skip_all(content)


def _read_box(
    content: BinaryIO, voxels: StoredVoxels, box: Box, values: Voxels, position: int
) -> int:
    """Read a box plane by plane; return the position (bytes) in the array behind it."""
    lead = max(0, len(voxels.shape) - PLANE_RANK)
    row_bytes = prod(voxels.shape[lead + 1 :]) * voxels.dtype.itemsize
    rows = range(box.start[lead], box.stop[lead])
    is_whole = box.shape[lead + 1 :] == voxels.shape[lead + 1 :]
    columns = box.slices((0,) * len(voxels.shape))[lead + 1 :]
    for index in product(*map(range, box.start[:lead], box.stop[:lead])):
        plane = 0
        for number, size in zip(index, voxels.shape[:lead], strict=True):
            plane = plane * size + number
        first = (plane * voxels.shape[lead] + rows.start) * row_bytes
        _skip(content, first - position)
        target = values[tuple(n - low for n, low in zip(index, box.start[:lead], strict=True))]
        if is_whole:
            _fill(content, target)
        else:
            whole = np.empty((len(rows), *voxels.shape[lead + 1 :]), voxels.dtype)
            _fill(content, whole)
            target[...] = whole[(slice(None), *columns)]
        position = first + len(rows) * row_bytes
    return position


def _load(voxels: StoredVoxels) -> npt.NDArray[np.uint8]:
    content = buffers.zeros((voxels.end,), np.uint8)
    with decompressed(voxels.file) as stream:
        _fill(stream, content)
        _skip_all(stream)
    content.flags.writeable = False
    return content


def _fill(content: BinaryIO, target: npt.NDArray[Any]) -> None:
    """Read as many bytes as a contiguous array has. Raises EOFError if there are fewer."""
    view = memoryview(target.reshape(-1).view(np.uint8).data)
    while view:
        count = cast(Any, content).readinto(view)
        if not count:
            raise EOFError("the file ends before its last voxel; copy it again")
        view = view[count:]


def _skip(content: BinaryIO, size: int) -> None:
    """Drop `size` bytes. Raises EOFError if there are fewer."""
    while size:
        part = len(content.read(min(size, PART_BYTES)))
        if not part:
            raise EOFError("the file ends before its last voxel; copy it again")
        size -= part


def _skip_all(content: BinaryIO) -> int:
    """Drop all bytes that are left, which verifies the checksum; return their number."""
    size = 0
    while part := content.read(PART_BYTES):
        size += len(part)
    return size


@dataclass
class _Cache:
    """Decompressed files by key, the least recently used ones dropped. Thread-safe."""

    limit: int
    _contents: OrderedDict[str, npt.NDArray[np.uint8]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, key: str, load: Callable[[], npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
        # The lock is held while a file is loaded, so that threads do not load it twice.
        with self._lock:
            content = self._contents.pop(key, None)
            if content is None:
                content = load()
            self._contents[key] = content
            while sum(stored.nbytes for stored in self._contents.values()) > self.limit:
                self._contents.popitem(last=False)
            return content


_cache = _Cache(CACHE_BYTES)
