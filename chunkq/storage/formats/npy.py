"""Format of NumPy's `.npy` files."""

from __future__ import annotations

import io
import os
import threading

import numpy as np
from typing_extensions import override

from chunkq.access import Access
from chunkq.errors import ChunkReadError, StoreError
from chunkq.geometry.axes import plain_axes
from chunkq.geometry.box import Box
from chunkq.paths import is_url
from chunkq.storage.array import Array, Voxels, box_error
from chunkq.storage.formats import suffixes
from chunkq.storage.formats.base import (
    NO_OPTIONS,
    NUMBERS,
    ArrayInfo,
    Format,
    Options,
    native_dtype,
)
from chunkq.storage.formats.single_file import SingleFile, StoredVoxels, opening_error
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
        self._file = SingleFile(path, access)
        self._file.require_parts()
        header = io.BytesIO(self._file.head(MAX_HEADER_BYTES))
        try:
            with HEADER_LOCK:
                version = np.lib.format.read_magic(header)
                if version not in HEADER_READERS:
                    raise ValueError(f"unsupported version {version[0]}.{version[1]}")
                shape, self._is_fortran, stored = HEADER_READERS[version](header)
        except (ValueError, EOFError) as error:
            problem = f"invalid .npy file: {error}; save it again with numpy.save"
            raise self._file.error(problem) from None
        if stored.kind not in NUMBERS:
            raise self._file.error(
                f"unsupported dtype {stored}; save the .npy file with a dtype of numbers, such as "
                "uint8 or float32"
            )
        self.dtype, self.shape = native_dtype(stored), tuple(shape)
        # A file in Fortran order is the file in C order of the transposed array.
        self._order = slice(None, None, -1) if self._is_fortran else slice(None)
        self._voxels = StoredVoxels(self._file, header.tell(), self.shape[self._order], stored)

    def check_size(self) -> None:
        """Raise StoreError if the file is shorter than its header says."""
        size = self._file.size()
        if size is not None and size < self._voxels.end:
            raise self._file.error(
                f"truncated, expected {self._voxels.end} bytes for shape {list(self.shape)} and "
                f"dtype {self.dtype}, found {size}; save it again with numpy.save, or copy it again"
            )

    @override
    def read(self, box: Box) -> Voxels:
        try:
            region = self._voxels.read(box.slices((0,) * len(self.shape))[self._order])
            return buffers.cast(region.T if self._is_fortran else region, self.dtype)
        except Exception as error:  # each file system raises different errors
            raise ChunkReadError(box_error(self.path, box, "read", error)) from error


class NpyFormat(Format):
    """`.npy` files, recognized by their suffix.

    The identity has the size, the time of modification (at a URL, the unique key of fsspec) and the
    hash of the header.
    """

    @override
    def detects(self, path: str, options: Options = NO_OPTIONS) -> bool:
        return path.endswith(suffixes.NPY) and (is_url(path) or not os.path.isdir(path))

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
        return SingleFile(path, Access.of(options)).identity(HEADER_BYTES)

    @staticmethod
    def _open(path: str, options: Options) -> NpyArray:
        try:
            return NpyArray(path, Access.of(options))
        except StoreError:
            raise
        except Exception as error:  # each file system raises different errors
            raise opening_error(path, error) from None
