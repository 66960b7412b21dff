"""Format of NumPy's `.npy` files."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from math import prod
from typing import Any

import numpy as np
from typing_extensions import override

from chunkq.access import Access, sends_parts
from chunkq.errors import ChunkReadError, ErrorCode, StoreError
from chunkq.geometry.axes import plain_axes
from chunkq.geometry.box import Box
from chunkq.paths import is_url, is_web, open_filesystem, without_secret
from chunkq.storage.array import Array, Voxels, box_error
from chunkq.storage.formats.base import (
    NO_OPTIONS,
    NUMBERS,
    ArrayInfo,
    Format,
    Options,
    missing_error,
    native_dtype,
    unreadable_error,
)
from chunkq.system import buffers

HEADER_LOCK = threading.Lock()
"""Lock for reading a header. NumPy parses it as Python code, which is not thread-safe in CPython
before 3.13."""
HEADER_BYTES = 128
"""Number of bytes at the start of a file that contain dtype and shape."""
MAX_HEADER_BYTES = 1 << 16
"""Number of bytes in which the header of an array of numbers ends."""
HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    (3, 0): np.lib.format.read_array_header_2_0,  # in UTF-8, for names of fields
}
"""Version of the file format -> function that reads the header of an array of numbers."""


class NpyArray(Array):
    """`.npy` file in C or Fortran order. Local files are memory-mapped, URLs are read in ranges."""

    def __init__(self, path: str, access: Access) -> None:
        self.path = path
        self._filesystem, self._inner = open_filesystem(path, access)
        header = io.BytesIO(self._header())
        try:
            with HEADER_LOCK:
                version = np.lib.format.read_magic(header)
                if version not in HEADER_READERS:
                    raise ValueError(f"unsupported version {version[0]}.{version[1]}")
                shape, is_fortran, self._stored_dtype = HEADER_READERS[version](header)
        except (ValueError, EOFError) as error:
            problem = f"invalid .npy file: {error}; save it again with numpy.save"
            raise self._error(problem) from None
        if self._stored_dtype.kind not in NUMBERS:
            raise self._error(
                f"unsupported dtype {self._stored_dtype}; save the .npy file with a dtype of "
                "numbers, such as uint8 or float32"
            )
        self._offset, self.dtype = header.tell(), native_dtype(self._stored_dtype)
        self.shape, self._is_fortran = tuple(shape), is_fortran

    def check_size(self) -> None:
        """Raise StoreError if the file is shorter than its header says."""
        expected = self._offset + prod(self.shape) * self._stored_dtype.itemsize
        size = self._size()
        if size is not None and size < expected:
            raise self._error(
                f"truncated, expected {expected} bytes for shape {list(self.shape)} and dtype "
                f"{self.dtype}, found {size}; save it again with numpy.save, or copy it again"
            )

    def _error(self, problem: str) -> StoreError:
        return StoreError(
            f"input: {without_secret(self.path)}: {problem}", code=ErrorCode.STORE_UNSUPPORTED
        )

    def _header(self) -> bytes:
        """Return the first bytes of the file. Raises OSError."""
        if is_web(self.path) and not sends_parts(self._filesystem, self._inner):
            raise self._error(
                "the server does not send parts of files; download the file, or convert it to Zarr"
            )
        content: bytes = self._filesystem.cat_file(self._inner, start=0, end=MAX_HEADER_BYTES)
        return content

    def _size(self) -> int | None:
        """Return the size of the file (bytes), or None if a server does not tell it."""
        if not is_url(self.path):
            return os.path.getsize(self._inner)
        size: int | None = self._filesystem.info(self._inner).get("size")
        return size

    @override
    def read(self, box: Box) -> Voxels:
        try:
            return buffers.cast(self._region(box), self.dtype)
        except Exception as error:  # each file system raises different errors
            raise ChunkReadError(box_error(self.path, box, "read", error)) from error

    def _region(self, box: Box) -> Voxels:
        """Return a box in the stored dtype.

        A file in Fortran order is the file in C order of the transposed array.
        """
        order = slice(None, None, -1) if self._is_fortran else slice(None)
        shape, slices = self.shape[order], box.slices((0,) * len(self.shape))[order]
        read = self._read_rows if is_url(self.path) else self._map_file
        region = read(shape, slices)
        return region.T if self._is_fortran else region

    def _map_file(self, shape: tuple[int, ...], slices: tuple[slice, ...]) -> Voxels:
        mapped = np.memmap(self._inner, self._stored_dtype, "r", self._offset, shape)
        return mapped[slices]

    def _read_rows(self, shape: tuple[int, ...], slices: tuple[slice, ...]) -> Voxels:
        start, stop = slices[0].start, slices[0].stop
        row_bytes = prod(shape[1:]) * self._stored_dtype.itemsize
        content = self._filesystem.cat_file(
            self._inner,
            start=self._offset + start * row_bytes,
            end=self._offset + stop * row_bytes,
        )
        # Raises ValueError if the file is truncated.
        rows = np.frombuffer(content, self._stored_dtype).reshape(stop - start, *shape[1:])
        return rows[(slice(None), *slices[1:])]


class NpyFormat(Format):
    """`.npy` files, recognized by their suffix.

    The identity has the size, the time of modification (at a URL, the unique key of fsspec) and the
    hash of the header.
    """

    @override
    def detects(self, path: str, options: Options = NO_OPTIONS) -> bool:
        return path.endswith(".npy") and (is_url(path) or not os.path.isdir(path))

    @override
    def find(self, path: str, options: Options = NO_OPTIONS) -> ArrayInfo:
        array = self._open(path, options)
        array.check_size()
        return ArrayInfo(
            path, plain_axes(array.shape), str(array.dtype), Access.of(options).options
        )

    @override
    def open(self, path: str, options: Options) -> Array:
        return self._open(path, options)

    @override
    def identity(self, path: str, options: Options) -> str | None:
        filesystem, inner = open_filesystem(path, Access.of(options))
        try:
            header = filesystem.cat_file(inner, start=0, end=HEADER_BYTES)
            return f"{_file_state(path, inner, filesystem)} {hashlib.sha256(header).hexdigest()}"
        except FileNotFoundError:
            return None

    @staticmethod
    def _open(path: str, options: Options) -> NpyArray:
        try:
            return NpyArray(path, Access.of(options))
        except StoreError:
            raise
        except FileNotFoundError as error:
            # fsspec raises it for every answer of a web server but a success.
            cause = error.__cause__
            if cause is not None and getattr(cause, "status", None) != 404 and is_web(path):
                raise unreadable_error(path, cause) from None
            raise missing_error(path) from None
        except Exception as error:  # each file system raises different errors
            raise unreadable_error(path, error) from None


def _file_state(path: str, inner: str, filesystem: Any) -> str:
    if is_url(path):
        return str(filesystem.ukey(inner))
    status = os.stat(inner)
    return f"{status.st_size} {status.st_mtime_ns}"
