"""The storage chunks of an array that exist, and those of them that an item reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chunkq.geometry.box import Box
from chunkq.geometry.cells import CellAxis, storage_cells

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class StoredChunks:
    """The storage chunks of a whole array that exist.

    `chunks` is the shape of what one object stores, a chunk or a shard. `indices` has one row per
    existing object, int64 (n, rank of the array).
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    indices: npt.NDArray[np.int64]

    def spatial(self, order: Sequence[int], read: Mapping[int, Sequence[int]]) -> StoredCells:
        """Return the existing chunks along the spatial axes, which have the numbers `order`.

        `read` has the positions that are read along each other axis.
        """
        used = np.ones(len(self.indices), np.bool_)
        for axis, positions in read.items():
            chunks = {position // self.chunks[axis] for position in positions}
            used &= np.isin(self.indices[:, axis], list(chunks))
        shape = [self.shape[axis] for axis in order]
        chunk = [self.chunks[axis] for axis in order]
        cells = storage_cells(shape, chunk)
        occupied: Bools = np.zeros([axis.count for axis in cells], np.bool_)
        occupied[tuple(self.indices[used][:, list(order)].T)] = True
        return StoredCells(tuple(chunk), occupied)


@dataclass(frozen=True)
class StoredCells:
    """Which storage chunks along the spatial axes exist: bool, one entry per storage chunk.

    `chunk` is the shape of a storage chunk in voxels.
    """

    chunk: tuple[int, ...]
    occupied: Bools

    @property
    def axes(self) -> tuple[CellAxis, ...]:
        """The storage chunks as cells."""
        pairs = zip(self.occupied.shape, self.chunk, strict=True)
        return tuple(CellAxis(count, float(chunk)) for count, chunk in pairs)

    def read(self, cells: Box) -> Bools:
        """Return which storage chunks of a box of storage chunks exist."""
        return self.occupied[cells.slices((0,) * len(self.chunk))]

    def any(self, box: Box) -> bool:
        """Return whether a storage chunk with a voxel of a box of the volume exists."""
        cells = tuple(
            slice(low // size, -(-high // size))
            for low, high, size in zip(box.start, box.stop, self.chunk, strict=True)
        )
        return bool(self.occupied[cells].any())
