"""Cells of a coarser or finer grid along one axis, and the cell in which a voxel lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from chunkq.geometry.axes import Axis
from chunkq.geometry.padding import IntArray

ROUNDING = 1e-9
"""A center that lies so little before a cell, in cells, lies in it."""


@dataclass(frozen=True, slots=True)
class CellAxis:
    """Cells `[0, count)` along one axis; each is `scale` voxels long.

    A voxel lies in the cell of its center: voxel i in `floor((i + 1/2 + shift) / scale)`.
    """

    count: int
    scale: float = 1.0
    shift: float = 0.0

    def cells(self, start: int, stop: int) -> IntArray:
        """Return the cell of each voxel of `[start, stop)`, ascending; some can be outside."""
        return self.cell(np.arange(start, stop, dtype=np.int64))

    def cell(self, voxels: IntArray) -> IntArray:
        """Return the cell of each voxel; it can be outside."""
        cells: IntArray = np.floor((voxels + (0.5 + self.shift)) / self.scale + ROUNDING).astype(
            np.int64
        )
        return cells

    def of_scale(self, factor: Fraction) -> CellAxis:
        """Return the same cells for voxels of which each is `factor` of these long."""
        return CellAxis(self.count, float(self.scale / factor), float(self.shift / factor))

    @property
    def covered(self) -> tuple[float, float]:
        """The range of voxels that the cells cover; voxel i is `[i, i + 1)`."""
        return -self.shift + 0.0, self.count * self.scale - self.shift

    @classmethod
    def between(cls, voxels: Axis, cells: Axis) -> CellAxis:
        """Return cells that lie as the voxel sizes and positions of two axes say.

        Positions are those of the centers of the first voxels.
        """
        scale = cells.scale / voxels.scale
        shift = (voxels.translation - cells.translation) / voxels.scale + (scale - 1) / 2
        return cls(cells.size, scale, shift)


def storage_cells(shape: Sequence[int], chunks: Sequence[int]) -> tuple[CellAxis, ...]:
    """Return the storage chunks of an array as cells along each axis."""
    pairs = zip(shape, chunks, strict=True)
    return tuple(CellAxis(-(-size // chunk), float(chunk)) for size, chunk in pairs)
