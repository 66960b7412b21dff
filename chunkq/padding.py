"""What lies outside the volume: `np.pad`'s rules as index arithmetic, one axis at a time."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

PadMode = Literal["constant", "reflect", "symmetric", "edge"]
IntArray = npt.NDArray[np.int64]


def source_indices(start: int, stop: int, size: int, mode: PadMode) -> IntArray:
    """Return, for each position in `[start, stop)`, the voxel of `[0, size)` it shows.

    Shape (stop - start,), int64. Equals what `np.pad` on an axis of `size` voxels would put
    there, however wide the pad; -1 stands for the constant.
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
    """Return the smallest range of real voxels that shows up in each window `[start, stop)`.

    Elementwise over arrays of windows, each of which meets `[0, size)` or is empty; an empty
    window gives an empty range.
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
