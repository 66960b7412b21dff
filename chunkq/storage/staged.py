"""Copies in Zarr of arrays that cannot be read by region, written slab by slab.

Every storage chunk is written, also one of fill values only. A chunk that is missing is therefore
an error, never zeros.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal

import numpy as np
from typing_extensions import override

from chunkq.access import DEFAULT_ACCESS
from chunkq.errors import ChunkReadError, StoreError
from chunkq.geometry.axes import Axis
from chunkq.geometry.box import Box
from chunkq.paths import join, read_bytes, without_secret
from chunkq.storage import documents
from chunkq.storage.array import Array, Voxels
from chunkq.storage.formats.tensorstore_arrays import kvstore
from chunkq.storage.formats.zarr_arrays import TensorStoreArray, ZarrPythonArray
from chunkq.storage.formats.zarr_writing import array_metadata
from chunkq.storage.objects import ObjectFolder

SLAB_BYTES = 64 << 20
"""Size (bytes) of a slab, unless a single plane is larger."""
CHUNK_EDGE, SLAB_EDGE = 128, 64
"""Longest edges of a storage chunk (voxels), along most axes and along the axis of the slabs."""
ZARR_FORMAT: Literal[3] = 3
DOCUMENT = "zarr.json"
CHUNK_FOLDER = "c"


@dataclass(frozen=True)
class Slabs:
    """The order in which an array is copied: slabs that follow each other in C order.

    A slab covers one position along the axes before `axis`, at most `thickness` along it, and all
    of the axes behind it. It is a whole number of storage chunks, whose shape is `chunks`.
    """

    shape: tuple[int, ...]
    axis: int
    thickness: int
    chunks: tuple[int, ...]

    @classmethod
    def of(cls, axes: Sequence[Axis], itemsize: int) -> Slabs:
        """Return the slabs of an array with these axes, in stored order.

        Axes before the first spatial one have storage chunks of 1, because chunks of a job read one
        time point, and the channels in requests of their own.
        """
        shape = tuple(axis.size for axis in axes)
        axis = next((n for n, axis in enumerate(axes) if axis.kind == "space"), 0)
        while axis < len(shape) - 1 and prod(shape[axis + 1 :]) * itemsize > SLAB_BYTES:
            axis += 1
        most = max(1, SLAB_BYTES // (prod(shape[axis + 1 :]) * itemsize))
        thickness = min(SLAB_EDGE, 1 << (most.bit_length() - 1), shape[axis])
        rest = (min(CHUNK_EDGE, size) for size in shape[axis + 1 :])
        return cls(shape, axis, thickness, ((1,) * axis + (thickness, *rest)))

    @property
    def count(self) -> int:
        """Number of slabs."""
        return prod(self.shape[: self.axis]) * -(-self.shape[self.axis] // self.thickness)

    @property
    def size(self) -> int:
        """Number of voxels."""
        return prod(self.shape)

    @property
    def chunk_count(self) -> int:
        """Number of storage chunks."""
        return prod(-(-size // edge) for size, edge in zip(self.shape, self.chunks, strict=True))

    def boxes(self, first: int = 0) -> Iterator[Box]:
        """Yield the slabs from number `first` on."""
        length, rest = self.shape[self.axis], self.shape[self.axis + 1 :]
        starts = range(0, length, self.thickness)
        leading = product(*map(range, self.shape[: self.axis]), starts)
        for number, (*index, start) in enumerate(leading):
            if number >= first:
                stop = min(start + self.thickness, length)
                yield Box(
                    (*index, start, *(0 for _ in rest)), (*(n + 1 for n in index), stop, *rest)
                )


class StagedCopy:
    """A copy below a folder of objects: its metadata, its storage chunks, and its progress.

    Methods raise OSError if the storage fails.
    """

    def __init__(self, folder: ObjectFolder, name: str, slabs: Slabs, dtype: str) -> None:
        self._folder, self._name = folder, f"{name}.zarr"
        self._progress = f"{name}.json"
        self.path = join(folder.path, self._name)
        self.slabs, self.dtype = slabs, np.dtype(dtype)

    def create(self) -> None:
        """Write the metadata of the array."""
        metadata = array_metadata(
            self._name,
            shape=self.slabs.shape,
            chunks=self.slabs.chunks,
            dtype=self.dtype,
            zarr_format=ZARR_FORMAT,
            fill_value=0,
            axes=None,
        )
        for name, text in metadata.items():
            self._folder.put(name, text.encode())

    def slabs_written(self) -> int:
        """Return how many slabs are known to be written."""
        content = self._folder.get(self._progress)
        values = documents.decode(content) if content is not None else None
        return int((values or {}).get("slabs", 0))

    def record_slabs(self, count: int) -> None:
        """Record that the first `count` slabs are written. A lost record costs time only."""
        self._folder.put(self._progress, documents.encode({"slabs": count}), durable=False)

    def forget_slabs(self) -> None:
        """Delete the record, so that every slab is written again."""
        self._folder.delete(self._progress)

    def is_complete(self) -> bool:
        """Return whether every storage chunk exists. Makes one listing."""
        return ObjectFolder(join(self.path, CHUNK_FOLDER)).count() >= self.slabs.chunk_count

    def open(self, *, write: bool = False, cached: bool = False) -> Array:
        """Open the array. Raises StoreError if its metadata are missing.

        `cached` keeps storage chunks in the cache of this process.
        """
        try:
            return StagedArray(self, write=write, cached=cached)
        except (ValueError, OSError, RuntimeError, KeyError, TypeError) as error:
            raise StoreError(
                f"{without_secret(self.path)}: the staged input cannot be opened: {error}"
            ) from error


class StagedArray(Array):
    """The array of a copy. A storage chunk that is missing is an error."""

    def __init__(self, copy: StagedCopy, *, write: bool, cached: bool) -> None:
        self._copy, self._is_complete, self.path = copy, False, copy.path
        self._array = self._open(write, cached)
        self.shape, self.dtype = self._array.shape, self._array.dtype

    def _open(self, write: bool, cached: bool) -> Array:
        if kvstore(self.path) is not None:
            return TensorStoreArray(
                self.path, ZARR_FORMAT, write=write, cached=cached, is_whole=True
            )
        from chunkq.storage.formats.zarr_python import open_array, open_store

        metadata = json.loads(read_bytes(join(self.path, DOCUMENT)))
        store = open_store(self.path, DEFAULT_ACCESS, write=write)
        array = open_array(store, metadata, {"write_empty_chunks": True})
        return ZarrPythonArray(self.path, array, self._check)

    def _check(self) -> None:
        """Raise ChunkReadError if a storage chunk is missing, which zarr-python reads as zeros."""
        self._is_complete = self._is_complete or self._copy.is_complete()
        if not self._is_complete:
            raise ChunkReadError(f"{without_secret(self.path)}: storage chunks are missing")

    @override
    def read(self, box: Box) -> Voxels:
        return self._array.read(box)

    @override
    def write(self, box: Box, values: Voxels) -> None:
        self._array.write(box, values)
