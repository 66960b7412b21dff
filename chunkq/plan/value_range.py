"""`ValueRange`: values of a fixed range, stored as the integers of a dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.system import buffers

PART_VALUES = 1 << 18
"""Values that are converted at a time, while they are in the CPU's cache."""


@dataclass(frozen=True)
class ValueRange:
    """A linear map of the values from `low` to `high` to all integers of a dtype.

    `low` becomes the smallest integer, `high` the largest. Values beyond are clipped, others are
    rounded, half to even. A value is `stored * scale + offset`, within half of `scale`.
    """

    low: float
    high: float
    dtype: str

    @property
    def scale(self) -> float:
        """Difference of the values of two neighboring integers."""
        return (self.high - self.low) / self.steps

    @property
    def offset(self) -> float:
        """Value of the integer 0, which can lie outside of the range."""
        return self.low - self.smallest * self.scale

    @property
    def text(self) -> str:
        """The range as text: `0 to 20 as uint8`."""
        return f"{self.low:.6g} to {self.high:.6g} as {self.dtype}"

    def stored(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return finite values as integers: a new array of the same shape, in C order."""
        result = buffers.zeros(values.shape, self.dtype)
        for part in _parts(values.shape):
            self._convert(values[part], result[part])
        return result

    def values(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return the values of stored integers, float32."""
        result = buffers.zeros(stored.shape, np.float32)
        for part in _parts(stored.shape):
            result[part] = np.multiply(stored[part], self.scale, dtype=np.float64) + self.offset
        return result

    def _convert(self, values: npt.NDArray[Any], target: npt.NDArray[Any]) -> None:
        # In this order, `low`, `high` and values halfway between two integers are exact.
        steps = np.subtract(values, self.low, dtype=np.float64)
        steps *= self.steps
        steps /= self.high - self.low
        np.clip(steps, 0, self.steps, out=steps)
        np.rint(steps, out=steps)
        steps += self.smallest
        np.copyto(target, steps, casting="unsafe")

    @property
    def smallest(self) -> int:
        """The smallest integer, that of `low`."""
        return int(np.iinfo(self.dtype).min)

    @property
    def steps(self) -> int:
        """Steps between the smallest and the largest integer."""
        return int(np.iinfo(self.dtype).max) - self.smallest


def _parts(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Yield slices of the first two axes that cover an array part by part."""
    if len(shape) < 2:
        step = [PART_VALUES] * len(shape)
    else:
        row = max(1, prod(shape[2:]))
        step = [max(1, PART_VALUES // (row * shape[1] or 1)), max(1, PART_VALUES // row)]
    starts = (range(0, size, width) for size, width in zip(shape, step, strict=False))
    for first in product(*starts):
        yield tuple(slice(a, a + width) for a, width in zip(first, step, strict=True))
