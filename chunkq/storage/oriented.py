"""Present a stored array with its axes permuted and flipped."""

from __future__ import annotations

from typing_extensions import override

from chunkq.geometry.box import Box
from chunkq.storage.array import Array, Voxels
from chunkq.system import buffers

Orientation = tuple[tuple[int, int], ...]
"""For each presented axis the number of the stored axis, and its direction: 1, or -1 if the first
presented voxel is the last one that is stored."""


class OrientedArray(Array):
    """A read-only view of a stored array; its shape is that of the presented axes."""

    def __init__(self, array: Array, orientation: Orientation) -> None:
        self.path, self.dtype = array.path, array.dtype
        self._stored, self._orientation = array, orientation
        self.shape = tuple(array.shape[number] for number, _ in orientation)

    @override
    def read(self, box: Box) -> Voxels:
        ranges = [(0, 0)] * len(self.shape)
        for axis, (number, direction) in enumerate(self._orientation):
            size, start, stop = self.shape[axis], box.start[axis], box.stop[axis]
            ranges[number] = (start, stop) if direction > 0 else (size - stop, size - start)
        values = self._stored.read(Box(tuple(r[0] for r in ranges), tuple(r[1] for r in ranges)))
        permuted = values.transpose([number for number, _ in self._orientation])
        steps = tuple(slice(None, None, direction) for _, direction in self._orientation)
        return buffers.contiguous(permuted[steps])
