"""Read which voxels of a volume are inside a mask, box by box."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt

from chunkq.geometry.box import Box
from chunkq.geometry.cells import CellAxis
from chunkq.geometry.grid_spec import Scale
from chunkq.storage.array import Array
from chunkq.system import buffers

HELD_VOXELS = 32 << 20
"""A mask of at most so many voxels is read once and stays in memory, one byte per voxel."""
Bools = npt.NDArray[np.bool_]


class Mask:
    """A mask of a volume: an array (*M) of numbers, with one axis per axis of the volume.

    Voxels of the mask are inside if they are greater than `above`; NaN is not. `axes` says in which
    voxel of the mask each voxel of the volume lies. Voxels beyond the mask are outside.
    Thread-safe.
    """

    def __init__(self, array: Array, axes: Sequence[CellAxis], above: float) -> None:
        self.array, self.axes, self.above = array, tuple(axes), above

    def inside(self, box: Box, scale: Scale | None = None) -> Bools:
        """Return which voxels of a box are inside, bool (*box.shape).

        The box is in voxels of the volume, or of an output with this scale. Raises ChunkReadError
        if the mask cannot be read.
        """
        result: Bools = buffers.zeros(box.shape, np.bool_)
        cells, valid, starts, stops = [], [], [], []
        for axis, low, high in zip(self.of_scale(scale), box.start, box.stop, strict=True):
            along = axis.cells(low, high)
            first, last = np.searchsorted(along, (0, axis.count)).tolist()
            if first == last:
                return result
            along = along[first:last]
            valid.append(slice(first, last))
            starts.append(int(along[0]))
            stops.append(int(along[-1]) + 1)
            cells.append(along - along[0])
        result[tuple(valid)] = self.read(Box(tuple(starts), tuple(stops)))[np.ix_(*cells)]
        return result

    def of_scale(self, scale: Scale | None) -> tuple[CellAxis, ...]:
        """Return the voxels of the mask as cells of the voxels of an output with this scale."""
        if scale is None:
            return self.axes
        return tuple(axis.of_scale(factor) for axis, factor in zip(self.axes, scale, strict=True))

    def read(self, cells: Box) -> Bools:
        """Return which voxels of a box of the mask are inside, bool (*cells.shape)."""
        if prod(self.array.shape) <= HELD_VOXELS:
            return self._held[cells.slices((0,) * len(cells.start))]
        return self._read(cells)

    @cached_property
    def _held(self) -> Bools:
        return self._read(Box.of_shape(self.array.shape))

    def _read(self, cells: Box) -> Bools:
        return np.asarray(self.array.read(cells) > self.above)
