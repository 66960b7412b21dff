"""A file that holds one array: its identity, its size, and voxels at an offset."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, BinaryIO, cast

import numpy as np

from chunkq.access import Access, sends_parts
from chunkq.errors import ErrorCode, StoreError
from chunkq.paths import is_url, is_web, open_filesystem, without_secret
from chunkq.storage.array import Voxels
from chunkq.storage.formats.base import missing_error, unreadable_error
from chunkq.terminal import argument
from chunkq.web_requests import CountedStream

LOCAL_IDENTITY = re.compile(r"(?P<size>\d+) (?P<time>\d+) (?P<head>[0-9a-f]{64})")
"""Identity of a local file: size, time of modification (ns) and hash of its first bytes."""
SPATIAL_RANK = 3
"""The last axes of a file at a URL that are read in one request; one per index of the others."""
STREAM_BYTES = 8 << 20
"""Bytes of a file in a bucket that are requested at a time while it is read as a stream."""


class SingleFile:
    """A local file, or one at a URL. `path` is the user's name of it."""

    def __init__(self, path: str, access: Access) -> None:
        self.path = path
        self.filesystem, self.inner = open_filesystem(path, access)

    def error(self, problem: str) -> StoreError:
        """Return the error for a file that is not what its name says."""
        return StoreError(
            f"input: {without_secret(self.path)}: {problem}", code=ErrorCode.STORE_UNSUPPORTED
        )

    def head(self, size: int) -> bytes:
        """Return at most `size` bytes from the start of the file. Raises OSError."""
        if is_web(self.path):  # a server that does not send parts would send the whole file
            with self.stream() as file:
                return read_exactly(file, size)
        content: bytes = self.filesystem.cat_file(self.inner, start=0, end=size)
        return content

    def stream(self) -> BinaryIO:
        """Open the file for reading it once from its start. Raises OSError."""
        if not is_url(self.path):
            return open(self.inner, "rb")
        if self.path.startswith("memory://"):  # whose files share one position
            return io.BytesIO(self.filesystem.cat_file(self.inner))
        # fsspec streams a response of a web server if there are no blocks.
        if is_web(self.path):
            stream = CountedStream(self.filesystem.open(self.inner, "rb", block_size=0))
            return cast(BinaryIO, stream)
        file: BinaryIO = self.filesystem.open(self.inner, "rb", block_size=STREAM_BYTES)
        return file

    def require_parts(self, advice: str = "download the file, or convert it to Zarr") -> None:
        """Raise StoreError if the file is on a web server that does not send parts of files."""
        if is_web(self.path) and not sends_parts(self.filesystem, self.inner):
            raise self.error(f"the server does not send parts of files; {advice}")

    def size(self) -> int | None:
        """Return the size of the file (bytes), or None if a server does not tell it."""
        if not is_url(self.path):
            return os.path.getsize(self.inner)
        size: int | None = self.filesystem.info(self.inner).get("size")
        return size

    def identity(self, head: int) -> str | None:
        """Return a string of size, time of modification and the first bytes; None if missing.

        A file at a URL has the unique key of fsspec instead of size and time. Raises OSError.
        """
        try:
            first = self.head(head)
            return f"{self.state()} {hashlib.sha256(first).hexdigest()}"
        except FileNotFoundError:
            return None

    def state(self) -> str:
        """Return size and time of modification; at a URL the unique key of fsspec."""
        if is_url(self.path):
            return str(self.filesystem.ukey(self.inner))
        status = os.stat(self.inner)
        return f"{status.st_size} {status.st_mtime_ns}"


def replaced_text(path: str, since: str, before: str, now: str) -> str:
    """Return that an input has changed, and what to do; `before` and `now` are its identities.

    If only the time of a local file differs, the message has the time that the job knows.
    """
    known, found = LOCAL_IDENTITY.fullmatch(before), LOCAL_IDENTITY.fullmatch(now)
    is_same = known and found and known["size"] == found["size"] and known["head"] == found["head"]
    if known is None or not is_same:
        return (
            f"{without_secret(path)} was replaced since {since} (its size or time of change "
            "differs); restore it together with its time, or use --overwrite to start again"
        )
    seconds, nanoseconds = divmod(int(known["time"]), 10**9)
    return (
        f"{path} was replaced since {since} (its time of change differs); if the content is the "
        f"same, run `touch -d @{seconds}.{nanoseconds:09} {argument(path)}`, else use --overwrite "
        "to start again"
    )


def read_exactly(file: BinaryIO, size: int) -> bytes:
    """Return `size` bytes, or all that are left if these are fewer."""
    parts = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def opening_error(path: str, error: Exception) -> StoreError:
    """Return the error for a single file that cannot be opened."""
    if not isinstance(error, FileNotFoundError):
        return unreadable_error(path, error)
    # fsspec raises FileNotFoundError for every answer of a web server but a success.
    cause = error.__cause__
    if cause is not None and getattr(cause, "status", None) != 404 and is_web(path):
        return unreadable_error(path, cause)
    return missing_error(path)


@dataclass(frozen=True)
class StoredVoxels:
    """An array in C order in a file: its first byte, and its shape and dtype as stored."""

    file: SingleFile
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def end(self) -> int:
        """The first byte behind the array."""
        return self.offset + prod(self.shape) * self.dtype.itemsize

    def read(self, slices: Sequence[slice]) -> Voxels:
        """Return a box in the stored dtype. Raises ValueError if the file is truncated.

        A local file is mapped into memory, a file at a URL is read in ranges.
        """
        if is_url(self.file.path):
            return self._read_ranges(slices)
        mapped = np.memmap(self.file.inner, self.dtype, "r", self.offset, self.shape)
        return mapped[tuple(slices)]

    def _read_ranges(self, slices: Sequence[slice]) -> Voxels:
        """Read whole rows along the last axes, for each index of the axes before them."""
        lead = max(0, len(self.shape) - SPATIAL_RANK)
        rows, inner = slices[lead], self.shape[lead + 1 :]
        row_bytes = prod(inner) * self.dtype.itemsize
        starts = []
        for index in product(*(range(part.start, part.stop) for part in slices[:lead])):
            flat = 0
            for number, size in zip(index, self.shape[:lead], strict=True):
                flat = flat * size + number
            starts.append(self.offset + (flat * self.shape[lead] + rows.start) * row_bytes)
        length = (rows.stop - rows.start) * row_bytes
        contents = [
            self.file.filesystem.cat_file(self.file.inner, start=start, end=start + length)
            for start in starts
        ]
        parts = [
            np.frombuffer(content, self.dtype).reshape(rows.stop - rows.start, *inner)
            for content in contents
        ]
        cut = (slice(None), *slices[lead + 1 :])
        leading = [part.stop - part.start for part in slices[:lead]]
        values = np.stack([part[cut] for part in parts]) if lead else parts[0][cut]
        return values.reshape(*leading, *values.shape[1:]) if lead else values
