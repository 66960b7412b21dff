"""Format of NumPy's `.npy` files."""

from __future__ import annotations

import hashlib
import os
import threading
from math import prod
from typing import Any

import numpy as np
from typing_extensions import override

from chunkq.errors import ChunkReadError, ErrorCode, StoreError
from chunkq.geometry.axes import plain_axes
from chunkq.geometry.box import Box
from chunkq.paths import is_url, open_filesystem, without_secret
from chunkq.storage.array import Array, Voxels, box_error
from chunkq.storage.formats.base import (
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


class NpyArray(Array):
    """`.npy` file in C order. Local files are memory-mapped, URLs are read in byte ranges."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._filesystem, self._inner = open_filesystem(path)
        try:
            with HEADER_LOCK, self._filesystem.open(self._inner, "rb") as file:
                version = np.lib.format.read_magic(file)
                read_header = np.lib.format.read_array_header_1_0
                if version != (1, 0):
                    read_header = np.lib.format.read_array_header_2_0
                self.shape, is_fortran, self._stored_dtype = read_header(file)
                self._data_offset = file.tell()
        except (ValueError, EOFError) as error:
            raise StoreError(
                f"input: {without_secret(path)}: invalid .npy file: {error}; "
                "save it again with numpy.save",
                code=ErrorCode.STORE_UNSUPPORTED,
            ) from None
        if is_fortran or self._stored_dtype.hasobject:
            order = "Fortran order" if is_fortran else f"dtype {self._stored_dtype}"
            raise StoreError(
                f"input: {without_secret(path)}: unsupported {order}; "
                "save the .npy file in C order with a numeric dtype",
                code=ErrorCode.STORE_UNSUPPORTED,
            )
        self.dtype = native_dtype(self._stored_dtype)

    @override
    def read(self, box: Box) -> Voxels:
        try:
            region = self._read_file(box) if is_url(self.path) else self._map_file(box)
            return buffers.cast(region, self.dtype)
        except (OSError, ValueError) as error:
            raise ChunkReadError(box_error(self.path, box, "read", error)) from error

    def _map_file(self, box: Box) -> Voxels:
        mapped = np.memmap(self._inner, self._stored_dtype, "r", self._data_offset, self.shape)
        return mapped[box.slices((0,) * len(self.shape))]

    def _read_file(self, box: Box) -> Voxels:
        start, stop = box.start[0], box.stop[0]
        row_bytes = prod(self.shape[1:]) * self._stored_dtype.itemsize
        content = self._filesystem.cat_file(
            self._inner,
            start=self._data_offset + start * row_bytes,
            end=self._data_offset + stop * row_bytes,
        )
        # Raises ValueError if the file is truncated.
        rows = np.frombuffer(content, self._stored_dtype).reshape(stop - start, *self.shape[1:])
        return rows[(slice(None), *box.slices((0,) * len(self.shape))[1:])]


class NpyFormat(Format):
    """`.npy` files, recognized by their suffix.

    The identity has the size, the time of modification (at a URL, the unique key of fsspec) and the
    hash of the header.
    """

    @override
    def detects(self, path: str) -> bool:
        return path.endswith(".npy") and (is_url(path) or not os.path.isdir(path))

    @override
    def find(self, path: str) -> ArrayInfo:
        array = self._open(path)
        return ArrayInfo(path, plain_axes(array.shape), str(array.dtype))

    @override
    def open(self, path: str, options: Options) -> Array:
        return self._open(path)

    @override
    def identity(self, path: str, options: Options) -> str | None:
        filesystem, inner = open_filesystem(path)
        try:
            header = filesystem.cat_file(inner, start=0, end=HEADER_BYTES)
            return f"{_file_state(path, inner, filesystem)} {hashlib.sha256(header).hexdigest()}"
        except FileNotFoundError:
            return None

    @staticmethod
    def _open(path: str) -> NpyArray:
        try:
            return NpyArray(path)
        except FileNotFoundError:
            raise missing_error(path) from None
        except OSError as error:
            raise unreadable_error(path, error) from None


def _file_state(path: str, inner: str, filesystem: Any) -> str:
    if is_url(path):
        return str(filesystem.ukey(inner))
    status = os.stat(inner)
    return f"{status.st_size} {status.st_mtime_ns}"
