"""Stack of TIFF files by a pattern: each file is a slice of one array."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Lock
from typing import Any

from typing_extensions import override

from chunkq.access import Access
from chunkq.errors import ChunkReadError, ErrorCode, StoreError
from chunkq.geometry.axes import Axis, named_axes
from chunkq.geometry.box import Box
from chunkq.paths import is_url, is_web, open_filesystem, without_secret
from chunkq.storage.array import Array, Voxels, box_error
from chunkq.storage.formats.tiff_file import check_size, read_image
from chunkq.storage.formats.tiff_pages import PagesArray
from chunkq.system import buffers

MAGIC = frozenset("*?[")
"""Characters that make a path a pattern."""
MAX_OPEN = 1024
"""Parsed files that an array keeps."""
MAX_REQUESTS = 16
"""Files at a URL that are read concurrently."""
NUMBER = re.compile(r"(\d+)")


def is_pattern(path: str) -> bool:
    """Return whether a path is a pattern of files, and not the name of a local file."""
    return bool(MAGIC & set(path)) and (is_url(path) or not os.path.lexists(path))


def matching_files(pattern: str, access: Access) -> list[str]:
    """Return the files that match a pattern, in natural order: `z2.tif` before `z10.tif`.

    Raises OSError if the storage fails, and StoreError for a web server, which lists no files.
    """
    if is_web(pattern):
        raise StoreError(
            f"input: {without_secret(pattern)}: a web server lists no files; download them, or "
            "list the files",
            code=ErrorCode.STORE_UNSUPPORTED,
        )
    if not is_url(pattern):
        return sorted(filter(os.path.isfile, glob.iglob(pattern)), key=natural_key)
    filesystem, inner = open_filesystem(pattern, access)
    scheme = pattern.partition("://")[0]
    names = (filesystem.unstrip_protocol(name) for name in filesystem.glob(inner))
    return sorted((f"{scheme}://{n.partition('://')[2]}" for n in names), key=natural_key)


def natural_key(path: str) -> tuple[Any, ...]:
    """Return the key by which paths are sorted: runs of digits count as numbers."""
    parts = NUMBER.split(path)
    return (*((part, 0) if n % 2 == 0 else ("", int(part)) for n, part in enumerate(parts)), path)


def gaps(files: Sequence[str]) -> tuple[str, ...]:
    """Return a line if numbers are missing between the names of files in natural order.

    The names differ in one number. Its smallest step is the distance between two files.
    """
    parts = [NUMBER.split(path.rpartition("/")[2]) for path in files]
    if len(files) < 3 or any(len(part) != len(parts[0]) for part in parts):
        return ()
    columns = [column for column in zip(*parts, strict=True) if len(set(column)) > 1]
    if len(columns) != 1 or not all(text.isdecimal() for text in columns[0]):
        return ()
    numbers = [int(text) for text in columns[0]]
    steps = [after - before for before, after in pairwise(numbers)]
    step = min(steps)
    if step < 1 or set(steps) == {step}:
        return ()
    count = sum((gap - 1) // step for gap in steps)
    first = next(number for number, gap in enumerate(steps) if gap > step)
    before, after = (path.rpartition("/")[2] for path in files[first : first + 2])
    return (
        f"numbers of {count} files are missing, the first one between {before} and {after}, and "
        "the slices on both sides become neighbours; add the missing files if there are any",
    )


def names_hash(files: Iterable[str]) -> str:
    """Return a hash of the names of files, in their order."""
    names = "\n".join(path.rpartition("/")[2] for path in files)
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def stack_axes(count: int, axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Return the axes of a stack of so many files whose images have these axes."""
    names = [axis.name for axis in axes]
    first = None if "z" in names else "z"
    return named_axes(
        [first, *names],
        [count, *(axis.size for axis in axes)],
        [1.0, *(axis.scale for axis in axes)],
        [0.0, *(axis.translation for axis in axes)],
        [None, *(axis.unit for axis in axes)],
    )


def check_slices(files: Sequence[str], first: PagesArray, level: int, access: Access) -> None:
    """Raise StoreError unless the images of all files have the shape and dtype of the first one."""

    def check(path: str) -> None:
        array = read_image(path, access, level).array
        _check_slice(path, array, first)
        check_size(array, access)

    for _ in _mapped(check, files, is_url(first.path)):
        pass


def _check_slice(path: str, array: PagesArray, first: PagesArray) -> None:
    if (array.shape, array.dtype) != (first.shape, first.dtype):
        raise StoreError(
            f"input: {without_secret(path)} has shape {list(array.shape)} and dtype {array.dtype}, "
            f"expected {list(first.shape)} and {first.dtype} as {without_secret(first.path)}; use "
            "slices of one shape and dtype",
            code=ErrorCode.STORE_UNSUPPORTED,
        )


def _mapped(function: Callable[..., Any], values: Sequence[Any], is_remote: bool) -> Iterable[Any]:
    """Return the results of a function, called concurrently for files at a URL."""
    if not is_remote:
        return map(function, values)
    with ThreadPoolExecutor(MAX_REQUESTS) as pool:
        return list(pool.map(function, values))


class StackArray(Array):
    """Array (slices, *image) of files that are opened when they are read."""

    def __init__(
        self, path: str, files: Sequence[str], first: PagesArray, level: int, access: Access
    ) -> None:
        self.path, self.dtype = path, first.dtype
        self.shape = (len(files), *first.shape)
        self._files, self._first, self._level, self._access = files, first, level, access
        self._open: OrderedDict[str, PagesArray] = OrderedDict()
        self._lock = Lock()

    @override
    def read(self, box: Box) -> Voxels:
        values = buffers.zeros(box.shape, self.dtype)
        inner = Box(box.start[1:], box.stop[1:])

        def read_slice(number: int) -> None:
            values[number - box.start[0]] = self._slice(self._files[number]).read(inner)

        try:
            numbers = range(box.start[0], box.stop[0])
            for _ in _mapped(read_slice, numbers, is_url(self.path)):
                pass
        except (StoreError, ChunkReadError) as error:
            raise ChunkReadError(box_error(self.path, box, "read", error)) from error
        return values

    def _slice(self, path: str) -> PagesArray:
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
                return self._open[path]
        array = read_image(path, self._access, self._level).array
        _check_slice(path, array, self._first)
        with self._lock:
            self._open[path] = array
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
        return array
