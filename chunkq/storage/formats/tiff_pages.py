"""Pages of a TIFF file as an array: the rows, strips or tiles that a box needs are read."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
from typing_extensions import override

from chunkq.access import Access
from chunkq.errors import ChunkqError, ChunkReadError
from chunkq.geometry.box import Box
from chunkq.paths import is_url
from chunkq.storage.array import Array, Voxels, box_error
from chunkq.storage.formats.base import native_dtype
from chunkq.storage.formats.file_ranges import Range, read_ranges
from chunkq.storage.formats.single_file import SingleFile
from chunkq.system import buffers

BATCH_BYTES = 64 << 20
"""Stored bytes of segments that are in memory at a time."""
CACHE_BYTES = 64 << 20
"""Decoded bytes of compressed segments that a process keeps for the next box."""


@dataclass(frozen=True, eq=False)
class Page:
    """One page: where its voxels are, and how they are decoded.

    `shape` is (planar samples, depth, rows, columns, interleaved samples). If `decoder` is None,
    the voxels are stored at `offsets[0]` in C order as `dtype`. Else each segment has an offset and
    a size in bytes, and `decoder` is tifffile's keyframe, with `tables` of JPEG.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offsets: Sequence[int]
    sizes: Sequence[int]
    decoder: Any = None
    tables: bytes | None = None

    @property
    def segment_shape(self) -> tuple[int, ...]:
        """Shape of a strip or tile, of rank 5 like `shape`."""
        frame, (_, _, _, columns, samples) = self.decoder, self.shape
        if frame.is_tiled:
            return (1, frame.tiledepth, frame.tilelength, frame.tilewidth, samples)
        return (1, 1, frame.rowsperstrip, columns, samples)

    @property
    def stop(self) -> int:
        """The first byte behind the voxels."""
        if self.decoder is None:
            return self.offsets[0] + prod(self.shape) * self.dtype.itemsize
        ends = (start + size for start, size in zip(self.offsets, self.sizes, strict=False))
        return max(ends, default=0)


class SegmentCache:
    """Decoded segments that were used last, of all arrays of this process."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._segments: OrderedDict[tuple[int, int, int], Voxels] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int, int]) -> Voxels | None:
        """Return a segment by array, page and number; None if it is not kept."""
        with self._lock:
            if key in self._segments:
                self._segments.move_to_end(key)
            return self._segments.get(key)

    def put(self, key: tuple[int, int, int], values: Voxels) -> None:
        """Keep a segment, and remove those whose last use is longest ago."""
        with self._lock:
            if key not in self._segments:
                self._segments[key] = values
                self._bytes += values.nbytes
            while self._bytes > self._max_bytes and len(self._segments) > 1:
                self._bytes -= self._segments.popitem(last=False)[1].nbytes


CACHE = SegmentCache()
_tokens = itertools.count()


class PagesArray(Array):
    """Array (*leading, *page). Each position of the leading axes is a page, in C order.

    `rank` is the number of leading axes. The sizes of the other axes, without those of 1, are those
    of `Page.shape`.
    """

    def __init__(
        self, path: str, shape: Sequence[int], rank: int, pages: Sequence[Page], access: Access
    ) -> None:
        self.path, self.shape, self.pages = path, tuple(shape), pages
        self.dtype = native_dtype(pages[0].dtype)
        self._rank, self._access = rank, access
        self._files: Mapping[str, SingleFile] = {
            page.path: SingleFile(page.path, access) for page in pages
        }
        self._token = next(_tokens)
        for page in pages:
            if page.decoder is not None:
                _ = page.decoder.decode  # a cached property, which is not thread-safe

    @override
    def read(self, box: Box) -> Voxels:
        values = buffers.zeros(box.shape, self.dtype)
        leading = zip(box.start[: self._rank], box.stop[: self._rank], strict=True)
        try:
            numbers = list(itertools.product(*(range(*bounds) for bounds in leading)))
            targets = values.reshape(len(numbers), *box.shape[self._rank :])
            picks = [self._number(index) for index in numbers]
            self._read_pages(picks, targets, box)
        except (ChunkqError, MemoryError):
            raise
        except Exception as error:  # each codec and file system raises different errors
            raise ChunkReadError(box_error(self.path, box, "read", error)) from error
        return values

    def _number(self, index: Sequence[int]) -> int:
        number = 0
        for position, size in zip(index, self.shape, strict=False):
            number = number * size + position
        return number

    def _read_pages(self, picks: Sequence[int], targets: Voxels, box: Box) -> None:
        """Read the same box of several pages, each into its entry of `targets`."""
        window = self._window(box)
        views = [target.reshape(window.shape) for target in targets]
        rows = [n for n, pick in enumerate(picks) if self.pages[pick].decoder is None]
        stored = [_StoredRows(self.pages[picks[n]], window) for n in rows]
        self._read_rows(stored, [views[n] for n in rows])
        if len(rows) < len(picks):
            self._read_segments(picks, views, window)

    def _window(self, box: Box) -> Box:
        """Return the part of the box inside a page, for the axes of `Page.shape`."""
        bounds = [
            (start, stop)
            for start, stop, size in zip(
                box.start[self._rank :],
                box.stop[self._rank :],
                self.shape[self._rank :],
                strict=True,
            )
            if size != 1
        ]
        rest = iter(bounds)
        pairs = [next(rest) if size != 1 else (0, 1) for size in self.pages[0].shape]
        return Box(tuple(low for low, _ in pairs), tuple(high for _, high in pairs))

    def _read_rows(self, stored: Sequence[_StoredRows], views: Sequence[Voxels]) -> None:
        """Read voxels that are stored in C order."""
        for path, numbers in _by_path([rows.page for rows in stored]).items():
            file = self._files[path]
            if not is_url(path):
                mapped = np.memmap(file.inner, np.uint8, "r")
                for number in numbers:
                    views[number][...] = stored[number].mapped(mapped)
                continue
            for batch in _batches(numbers, [rows.size for rows in stored]):
                ranges = [one for number in batch for one in stored[number].ranges]
                contents = iter(read_ranges(file, ranges))
                for number in batch:
                    parts = itertools.islice(contents, len(stored[number].ranges))
                    stored[number].copy(list(parts), views[number])

    def _read_segments(self, picks: Sequence[int], views: Sequence[Voxels], window: Box) -> None:
        """Read and decode the segments that a window of the pages needs."""
        wanted: list[tuple[int, _Segment]] = []
        for number, pick in enumerate(picks):
            page = self.pages[pick]
            if page.decoder is None:
                continue
            for segment in _segments(page, window):
                cached = CACHE.get((self._token, pick, segment.number))
                if cached is None:
                    wanted.append((number, segment))
                else:
                    _copy_segment(segment, cached, views[number], window)
        pages = [self.pages[picks[number]] for number, _ in wanted]
        ranges = [
            Range(page.offsets[n], page.offsets[n] + page.sizes[n])
            for page, (_, (n, _)) in zip(pages, wanted, strict=True)
        ]
        for path, entries in _by_path(pages).items():
            for batch in _batches(entries, [stop - start for start, stop in ranges]):
                contents = read_ranges(self._files[path], [ranges[entry] for entry in batch])
                for entry, content in zip(batch, contents, strict=True):
                    number, segment = wanted[entry]
                    values = _decode(pages[entry], segment.number, content)
                    CACHE.put((self._token, picks[number], segment.number), values)
                    _copy_segment(segment, values, views[number], window)


class _Segment(NamedTuple):
    """A strip or tile of a page: its number, and its first voxel."""

    number: int
    start: tuple[int, ...]


class _StoredRows:
    """A window of a page whose voxels are stored in C order: the runs of bytes that contain it."""

    def __init__(self, page: Page, window: Box) -> None:
        self.page, self.window = page, window
        full = [size == bound for size, bound in zip(window.shape, page.shape, strict=True)]
        # Whole rows are read: what lies between the columns of a window is too short to be skipped.
        axis = next((n for n in range(len(full) - 1, -1, -1) if not full[n] and n < 3), 0)
        self._axis = axis
        bounds = zip(window.start[:axis], window.stop[:axis], strict=True)
        inner = prod(page.shape[axis + 1 :])
        start, stop = window.start[axis], window.stop[axis]
        firsts = (
            _flat((*index, start), page.shape[: axis + 1]) * inner
            for index in itertools.product(*(range(*pair) for pair in bounds))
        )
        length, width = (stop - start) * inner * page.dtype.itemsize, page.dtype.itemsize
        offset = page.offsets[0]
        self.ranges = [
            Range(offset + first * width, offset + first * width + length) for first in firsts
        ]
        self.size = length * len(self.ranges)

    def mapped(self, content: Voxels) -> Voxels:
        """Return the window as a view of the bytes of the file. Raises EOFError if they end."""
        if self.page.stop > len(content):
            raise EOFError(
                f"expected {self.page.stop} bytes, found {len(content)}; the file is truncated"
            )
        page = np.ndarray(
            self.page.shape, self.page.dtype, buffer=content.data, offset=self.page.offsets[0]
        )
        return page[self.window.slices((0,) * 5)]

    def copy(self, contents: Sequence[memoryview], view: Voxels) -> None:
        """Copy the window from the bytes of `ranges` to an array of its shape."""
        axis, page, window = self._axis, self.page, self.window
        rows = window.stop[axis] - window.start[axis]
        inner = tuple(slice(a, b) for a, b in zip(window.start, window.stop, strict=True))
        targets = view.reshape(len(contents), *window.shape[axis:])
        for target, content in zip(targets, contents, strict=True):
            stored = np.frombuffer(content, page.dtype).reshape(rows, *page.shape[axis + 1 :])
            target[...] = stored[(slice(None), *inner[axis + 1 :])]


def _flat(index: Sequence[int], shape: Sequence[int]) -> int:
    number = 0
    for position, size in zip(index, shape, strict=True):
        number = number * size + position
    return number


def _by_path(pages: Sequence[Page]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for number, page in enumerate(pages):
        groups.setdefault(page.path, []).append(number)
    return groups


def _batches(numbers: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Yield runs of `numbers` whose sizes are at most `BATCH_BYTES` together, or single ones."""
    batch: list[int] = []
    total = 0
    for number in numbers:
        if batch and total + sizes[number] > BATCH_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(number)
        total += sizes[number]
    if batch:
        yield batch


def _segments(page: Page, window: Box) -> Iterator[_Segment]:
    """Yield the segments that a window intersects."""
    shape = page.segment_shape
    grid = [-(-size // step) for size, step in zip(page.shape, shape, strict=True)]
    bounds = [
        range(start // step, -(-stop // step))
        for start, stop, step in zip(window.start, window.stop, shape, strict=True)
    ]
    for index in itertools.product(*bounds):
        start = tuple(number * step for number, step in zip(index, shape, strict=True))
        yield _Segment(_flat(index, grid), start)


def _decode(page: Page, segment: int, content: memoryview) -> Voxels:
    """Return a segment (depth, rows, columns, samples) of its full size, also at an edge."""
    arguments: dict[str, Any] = {"_fullsize": True}
    if page.tables is not None:
        arguments["jpegtables"] = page.tables
    if page.decoder.jpegheader is not None:
        arguments["jpegheader"] = page.decoder.jpegheader
    is_stored = page.offsets[segment] > 0 and page.sizes[segment] > 0
    data = bytes(content) if is_stored else None
    values, _, shape = page.decoder.decode(data, segment, **arguments)
    if values is None:  # a segment that was never written
        return np.full(shape, page.decoder.nodata, page.dtype)
    result: Voxels = values
    return result


def _copy_segment(segment: _Segment, values: Voxels, view: Voxels, window: Box) -> None:
    """Copy the part of a decoded segment that lies in a window."""
    target, source = [], []
    shape = (1, *values.shape)
    for low, high, at, size in zip(window.start, window.stop, segment.start, shape, strict=True):
        first, last = max(low, at), min(high, at + size)
        target.append(slice(first - low, last - low))
        source.append(slice(first - at, last - at))
    view[tuple(target)] = values[np.newaxis][tuple(source)]
