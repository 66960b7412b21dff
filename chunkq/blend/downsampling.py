"""Reduction of voxels by 2 along some axes: mean, mode and nearest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.plan.pyramid import Method

SLAB_VOXELS = 1 << 18
"""Cells of which the mode is computed at a time, while they are in the CPU's cache."""
SUM_DTYPES = {
    "u1": np.uint16,
    "i1": np.int16,
    "u2": np.uint32,
    "i2": np.int32,
    "u4": np.uint64,
    "i4": np.int64,
}
"""Dtype of integers -> dtype that holds the sum of 16 of them."""

Voxels = npt.NDArray[Any]


def downsample(values: Voxels, factors: Sequence[int], method: Method) -> Voxels:
    """Return an array reduced along its last axes by `factors`, each 1 or 2; same dtype.

    Sizes are rounded up: the last voxel of an odd axis stands alone. `nearest` takes voxel 2i.
    `mode` is the most frequent value; of equally frequent ones it is the smallest. `mean` is
    computed in float64, of integers exactly; these are rounded half to even.
    """
    axes = [values.ndim - len(factors) + a for a, factor in enumerate(factors) if factor == 2]
    if not axes or not values.size:
        return values
    if method == "nearest":
        return np.ascontiguousarray(values[_every_second(values.ndim, axes)])
    return _mean(values, axes) if method == "mean" else _mode(values, axes)


def _every_second(rank: int, axes: Sequence[int], firsts: Sequence[int] = ()) -> tuple[slice, ...]:
    starts = dict(zip(axes, firsts or (0,) * len(axes), strict=True))
    return tuple(slice(starts[a], None, 2) if a in starts else slice(None) for a in range(rank))


def _mean(values: Voxels, axes: Sequence[int]) -> Voxels:
    dtype, count = values.dtype, 1 << len(axes)
    if dtype.kind not in "iu":
        # Divided first: the sum of large float64 does not fit. By a power of 2 that is exact.
        parts = values / count if dtype == np.float64 else values
        total = _sums(parts, axes, np.dtype(np.float64))
        return (total if dtype == np.float64 else total / count).astype(dtype, copy=False)
    if (integers := SUM_DTYPES.get(dtype.str[1:])) is not None:
        total = _sums(values, axes, np.dtype(integers))
        quotient, rest = total >> len(axes), total & (count - 1)
    else:  # the sum of 64 bits does not fit, those of its halves do
        high, low = (_sums(part, axes, dtype) for part in (values >> 32, values & 0xFFFFFFFF))
        quotient, rest = (high << (32 - len(axes))) + (low >> len(axes)), low & (count - 1)
    half = count >> 1
    quotient += (rest > half) | ((rest == half) & ((quotient & 1) == 1))
    return quotient.astype(dtype, copy=False)


def _sums(values: Voxels, axes: Sequence[int], dtype: np.dtype[Any]) -> Voxels:
    """Return the sums of cells."""
    # The first axis first: its sums are of whole planes.
    for axis in axes:
        values = _pairs(values, axis, dtype)
    return values


def _pairs(values: Voxels, axis: int, dtype: np.dtype[Any]) -> Voxels:
    """Return the sums of pairs along an axis; a single last voxel counts twice."""

    def along(start: int, stop: int | None, step: int) -> tuple[slice, ...]:
        return (*(slice(None),) * axis, slice(start, stop, step))

    length = values.shape[axis]
    pairs = length // 2
    shape = (*values.shape[:axis], pairs + length % 2, *values.shape[axis + 1 :])
    total = np.empty(shape, dtype)
    first, second = values[along(0, 2 * pairs, 2)], values[along(1, None, 2)]
    np.add(first, second, out=total[along(0, pairs, 1)], dtype=dtype)
    if length % 2:
        last = values[along(length - 1, None, 1)]
        np.add(last, last, out=total[along(pairs, None, 1)], dtype=dtype)
    return total


def _mode(values: Voxels, axes: Sequence[int]) -> Voxels:
    """Return the most frequent values of cells; a single last voxel counts twice."""
    odd = [(0, n % 2 if a in axes else 0) for a, n in enumerate(values.shape)]
    if any(after for _, after in odd):
        values = np.pad(values, odd, mode="edge")
    firsts = list(product((0, 1), repeat=len(axes)))
    corners = [values[_every_second(values.ndim, axes, first)] for first in firsts]
    result = np.empty(corners[0].shape, values.dtype)
    rows = len(result)
    step = max(1, SLAB_VOXELS * rows // result.size)
    for start in range(0, rows, step):
        slab = slice(start, start + step)
        _mode_of([corner[slab] for corner in corners], result[slab])
    return result


def _mode_of(corners: Sequence[Voxels], result: Voxels) -> None:
    """Write the most frequent of several arrays' values, element by element, into `result`."""
    result[...] = corners[0]
    is_mixed = np.zeros(result.shape, np.bool_)
    for corner in corners[1:]:
        is_mixed |= corner != result
    # Most cells have one label.
    cells = np.stack([corner[is_mixed] for corner in corners])
    if not cells.size:
        return
    cells.sort(axis=0)
    best, best_run = cells[0].copy(), np.ones(cells.shape[1], np.uint8)
    run = best_run.copy()
    for before, value in pairwise(cells):
        run = np.where(value == before, run + np.uint8(1), np.uint8(1))
        is_longer = run > best_run  # an equal run of a smaller label came first
        best[is_longer] = value[is_longer]
        np.maximum(best_run, run, out=best_run)
    result[is_mixed] = best
