"""Padding as index arithmetic along one axis, with the same results as `np.pad`."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

PadMode = Literal["constant", "reflect", "symmetric", "edge"]
IntArray = npt.NDArray[np.int64]


def source_indices(start: int, stop: int, size: int, mode: PadMode) -> IntArray:
    """Return the index in `[0, size)` of the voxel shown at each position of `[start, stop)`.

    Shape (stop - start,), int64; -1 stands for the pad value. Equals the result of `np.pad` on an
    axis of `size` voxels, for any pad width.
    """
    position = np.arange(start, stop, dtype=np.int64)
    if mode == "edge":
        return np.clip(position, 0, size - 1)
    if mode == "constant":
        return np.where((position >= 0) & (position < size), position, -1)
    if mode == "symmetric":
        folded = position % (2 * size)
        return np.where(folded < size, folded, 2 * size - 1 - folded)
    if size == 1:
        return np.zeros_like(position)
    folded = position % (2 * size - 2)
    return np.where(folded < size, folded, 2 * size - 2 - folded)


def source_range(
    start: IntArray, stop: IntArray, size: int, mode: PadMode
) -> tuple[IntArray, IntArray]:
    """Return the smallest range that holds all voxels shown in each window `[start, stop)`.

    Works elementwise on arrays of windows. Each window intersects `[0, size)` or is empty; the
    range of an empty window is empty.
    """
    low = np.clip(start, 0, size)
    high = np.clip(stop, low, size)
    if mode in ("reflect", "symmetric"):
        skip = 0 if mode == "symmetric" else 1
        mirrored_top = np.clip(skip - start, 0, size)
        mirrored_bottom = np.clip(2 * size - skip - stop, 0, size)
        high = np.where((start < 0) & (stop > start), np.maximum(high, mirrored_top), high)
        low = np.where((stop > size) & (stop > start), np.minimum(low, mirrored_bottom), low)
    return low, high
