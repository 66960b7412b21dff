"""An image with all selected time points and channels as one array."""

from __future__ import annotations

import numpy as np
from typing_extensions import override

from chunkq.geometry.axes import Axis
from chunkq.geometry.box import Box
from chunkq.storage.array import Array, Voxels
from chunkq.storage.images import ImageSource


def whole_axes(source: ImageSource) -> tuple[Axis, ...]:
    """Return the axes of `WholeImage`: time and channels unless there is one, then the spatial."""
    leading = (source.time_axis, source.channel_axis)
    series = [axis for axis in leading if axis is not None and axis.size > 1]
    return (*series, *source.spatial_axes)


def whole_storage(source: ImageSource) -> tuple[int, ...]:
    """Return the shape of a storage chunk along the axes of `WholeImage`; empty without any."""
    if not source.storage:
        return ()
    numbers = [source.number(kind) for kind in ("time", "channel")]
    sizes = [len(source.time), len(source.channels)]
    series = [n for n, size in zip(numbers, sizes, strict=True) if n is not None and size > 1]
    return tuple(source.storage[n] for n in (*series, *source.spatial_numbers))


class WholeImage(Array):
    """A read-only view ([T,] [C,] *S) of the open array of a source."""

    def __init__(self, source: ImageSource, array: Array) -> None:
        self._source, self._array, self.path = source, array, source.path
        self.dtype = array.dtype
        self.shape = tuple(axis.size for axis in whole_axes(source))
        self._has_time = len(source.time) > 1

    @override
    def read(self, box: Box) -> Voxels:
        if not self._has_time:
            return self._source.present(self._array).read(box)
        inner = Box(box.start[1:], box.stop[1:])
        times = range(box.start[0], box.stop[0])
        return np.stack([self._source.present(self._array, time).read(inner) for time in times])
