"""Arrays of a chunk's size, in memory pages of their own.

On the heap they would lie among a network's batches and small objects, which stay where they went:
freed room falls to pieces, and a worker's memory grows chunk by chunk, each time differently. Pages
of their own go back to the kernel with the array, so that what coexists is what is taken.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

LARGE_BYTES = 1 << 20
"""Smaller arrays lie on the heap: a mapping costs some microseconds and whole pages."""
HUGE_PAGE_BYTES = 2 << 20


def zeros(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return an array of zeros in C order; a large one in pages of its own.

    Raises MemoryError as NumPy does.
    """
    dtype, shape = np.dtype(dtype), tuple(shape)
    size = prod(shape) * dtype.itemsize
    if size < LARGE_BYTES:
        return np.zeros(shape, dtype)
    try:
        room = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no room for an array {shape} of {dtype}: {error.strerror}") from None
    if size >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        room.madvise(mmap.MADV_HUGEPAGE)  # faulted in 4 KiB at a time it would take twice as long
    # The array holds the mapping, and unmaps it when it goes.
    return np.frombuffer(room, dtype, prod(shape)).reshape(shape)


def contiguous(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the array in C order: itself, or else a copy as `zeros` would make it."""
    return array if array.flags.c_contiguous else cast(array, array.dtype)


def cast(array: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return a copy in another dtype and C order, made as `zeros` would; casts as `astype`."""
    copy = zeros(array.shape, dtype)
    np.copyto(copy, array, casting="unsafe")
    return copy
