"""Read windows of an array that extend beyond it, padded like `np.pad`."""

from __future__ import annotations

import numpy as np

from chunkq.geometry.box import Box
from chunkq.geometry.padding import PadMode, source_indices, source_range
from chunkq.storage.array import Array, Voxels
from chunkq.system import buffers


def read_padded(array: Array, window: Box, mode: PadMode, value: float) -> Voxels:
    """Read a window of an array ([C,] *S), padded like `np.pad` without limit.

    `window` has the spatial axes only and must intersect the array. The result has all channels,
    ([C,] *window.shape).
    """
    leading = array.shape[: len(array.shape) - len(window.shape)]
    start, stop = (*(0 for _ in leading), *window.start), (*leading, *window.stop)
    axes = list(zip(start, stop, array.shape, strict=True))
    bounds = [
        source_range(np.asarray(low), np.asarray(high), size, mode) for low, high, size in axes
    ]
    source_box = Box(tuple(int(b[0]) for b in bounds), tuple(int(b[1]) for b in bounds))
    values = array.read(source_box)
    for axis, (low, high, size) in enumerate(axes):
        if low >= 0 and high <= size:
            continue
        indices = source_indices(low, high, size, mode)
        shape = (*values.shape[:axis], len(indices), *values.shape[axis + 1 :])
        padded = buffers.zeros(shape, values.dtype)
        positions = np.maximum(indices - source_box.start[axis], 0)
        # mode="clip", because np.take copies `out` with mode="raise"
        np.take(values, positions, axis=axis, out=padded, mode="clip")
        if mode == "constant":
            padded[(slice(None),) * axis + (indices < 0,)] = value
        values = padded
    return values
