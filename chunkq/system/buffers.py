"""Allocate large arrays outside the heap, in anonymous memory mappings.

On the heap, large arrays alternate with a network's batches and small objects. The heap fragments,
and the memory of a worker grows with each chunk. A mapping returns to the kernel as soon as its
array is deleted, so peak memory is the size of the arrays that exist at the same time.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from math import inf, prod
from typing import Any

import numpy as np
import numpy.typing as npt

LARGE_BYTES = 1 << 20
"""Arrays below this size are on the heap; a mapping costs microseconds and whole pages."""
HUGE_PAGE_BYTES = 2 << 20
"""A transparent huge page replaces 512 page faults, which take twice as long in all."""
MOST_UNUSED = 1 / 4
"""The last huge page is used if at most this share of the array's size is unused memory in it."""


def zeros(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return an array of zeros in C order, in a mapping if it has at least `LARGE_BYTES`.

    Raises MemoryError like `numpy.zeros`.
    """
    dtype, shape = np.dtype(dtype), tuple(shape)
    size = prod(shape) * dtype.itemsize
    if size < LARGE_BYTES:
        return np.zeros(shape, dtype)
    # Linux aligns a mapping of whole huge pages to them; of another one it uses those inside.
    whole = -(-size // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    try:
        mapping = mmap.mmap(-1, whole, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(
            f"cannot allocate an array of shape {shape} and dtype {dtype}: {error.strerror}"
        ) from None
    huge = whole if whole - size <= size * MOST_UNUSED else whole - HUGE_PAGE_BYTES
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE, 0, huge)
    # The array references the mapping, which is unmapped when the array is deleted.
    return np.frombuffer(memoryview(mapping)[:size], dtype).reshape(shape)


def contiguous(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the array if it is in C order, else a copy that is, allocated by `zeros`."""
    return array if array.flags.c_contiguous else cast(array, array.dtype)


def compact(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the array if it is all of the memory that it keeps, else a copy in C order.

    A view keeps the whole memory of the array that it shows. The copy is allocated by `zeros`.
    """
    return array if _kept_bytes(array) <= array.nbytes else cast(array, array.dtype)


def _kept_bytes(array: npt.NDArray[Any]) -> float:
    """Return the size of the memory that an array keeps; infinity if its owner does not say it."""
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    if owner.base is None:
        return owner.nbytes
    try:
        return memoryview(owner.base).nbytes
    except TypeError:  # such as a tensor, which can itself be a view
        return inf


def cast(array: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return a copy in another dtype and in C order, allocated by `zeros`; casts like `astype`."""
    copy = zeros(array.shape, dtype)
    np.copyto(copy, array, casting="unsafe")
    return copy
