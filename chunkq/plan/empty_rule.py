"""Which voxels of an input are empty: those that equal a value, or lie below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.system import buffers

PART_VOXELS = 1 << 18
"""Voxels that are compared at a time, while they are in the CPU's cache."""
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class EmptyRule:
    """A voxel is empty if it equals `value`, or with `is_limit` if it is less.

    NaN equals NaN and is not less than any value. `value` is compared in the dtype of the voxels.
    """

    value: float
    is_limit: bool = False

    def fits(self, dtype: npt.DTypeLike) -> bool:
        """Return whether voxels of a real dtype can equal the value; a limit fits every dtype."""
        kind = np.dtype(dtype)
        if self.is_limit:
            return self.value == self.value
        if kind.kind == "b":
            return self.value in (0, 1)
        if kind.kind in "iu":
            low, high = np.iinfo(kind).min, np.iinfo(kind).max
            return isfinite(self.value) and low <= self.value <= high and self.value % 1 == 0
        return not isfinite(self.value) or abs(self.value) <= float(np.finfo(kind).max)

    def occupied(self, values: npt.NDArray[Any], rank: int) -> Bools:
        """Return whether a voxel is not empty in any channel: values ([C,] *S), result (*S)."""
        channels = values.reshape(-1, *values.shape[values.ndim - rank :])
        result: Bools = buffers.zeros(channels.shape[1:], np.bool_)
        for channel in channels:
            step = max(1, PART_VOXELS * len(channel) // max(1, channel.size))
            for first in range(0, len(channel), step):
                part = slice(first, first + step)
                result[part] |= self._is_occupied(channel[part])
        return result

    def _is_occupied(self, values: npt.NDArray[Any]) -> Bools:
        dtype = values.dtype
        if not self.is_limit:
            if self.value != self.value:
                return ~np.isnan(values) if dtype.kind == "f" else np.ones(values.shape, np.bool_)
            return np.asarray(values != dtype.type(self.value))
        if dtype.kind == "f":
            with np.errstate(over="ignore"):
                limit = dtype.type(self.value)
            if float(limit) < self.value:  # the nearest number of the dtype is too small
                limit = np.nextafter(limit, dtype.type(np.inf))
            return np.asarray(~(values < limit))
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        if self.value > high:
            return np.zeros(values.shape, np.bool_)
        if self.value <= low:
            return np.ones(values.shape, np.bool_)
        return np.asarray(values >= dtype.type(ceil(self.value)))


def occupied_in(rule: EmptyRule, halos: Sequence[npt.NDArray[Any]], rank: int) -> Bools:
    """Return whether a voxel is not empty in any channel of any input: arrays ([C,] *S)."""
    total = rule.occupied(halos[0], rank)
    for halo in halos[1:]:
        total |= rule.occupied(halo, rank)
    return total
