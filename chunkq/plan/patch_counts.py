"""Count the patches of each chunk that a mask, or the storage chunks that exist, leave to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

import numpy as np
import numpy.typing as npt

from chunkq.geometry.box import Box
from chunkq.geometry.cells import CellAxis
from chunkq.geometry.grids import AxisGeometry, AxisGrid
from chunkq.geometry.padding import IntArray
from chunkq.plan.empty_rule import Bools
from chunkq.plan.plan import Plan

MAX_CELLS = 16 << 20
"""Cells of a condition, or patches, that are looked at in one array operation."""
Counts = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Condition:
    """A patch runs only if its window has a voxel in an occupied cell.

    `axes` are the cells along each axis of `plan`, the plan of an output, or of the plan whose
    patches are counted if it is None. `read` returns which cells of a box are
    occupied, bool (*box.shape). The window is the whole input patch inside the volume if
    `of_input`, else the kept voxels.
    """

    axes: tuple[CellAxis, ...]
    read: Callable[[Box], Bools]
    of_input: bool = False
    plan: Plan | None = None


Conditions = Sequence[Sequence[Condition]]
"""A patch runs if it meets one condition of each group."""


def count_patches(plan: Plan, conditions: Conditions) -> Counts:
    """Return how many patches of each chunk meet the conditions.

    The result is uint32 of the shape of `plan.index_bounds`, 0 for chunks that are no tasks. Memory
    is bounded by MAX_CELLS, or by the window of one chunk, beside the result.
    """
    bounds = plan.index_bounds
    counts: Counts = np.zeros(bounds.shape, np.uint32)
    for chunks in plan.active:
        for tile in _tiles(plan, conditions, chunks):
            part = counts[tile.slices(bounds.start)]
            for number in range(len(plan.axes[0].grids)):
                part += _count(plan, conditions, tile, number)
    return counts


def _tiles(plan: Plan, conditions: Conditions, blocks: Box) -> Iterator[Box]:
    """Yield disjoint boxes of blocks, each with a bounded number of cells and patches."""
    lengths = []
    for a, axis in enumerate(plan.axes):
        count = blocks.stop[a] - blocks.start[a]
        voxels = count * axis.chunk
        cells = max(
            count * (c.plan or plan).axes[a].chunk / c.axes[a].scale
            for group in conditions
            for c in group
        )
        patches = max(voxels / grid.stride for grid in axis.grids)
        lengths.append(max(cells, patches, 1.0))
    splittable = [a for a in range(plan.rank) if blocks.shape[a] > 1]
    if prod(lengths) <= MAX_CELLS or not splittable:
        yield blocks
        return
    a = max(splittable, key=lambda a: lengths[a])
    middle = (blocks.start[a] + blocks.stop[a]) // 2
    stop = (*blocks.stop[:a], middle, *blocks.stop[a + 1 :])
    start = (*blocks.start[:a], middle, *blocks.start[a + 1 :])
    yield from _tiles(plan, conditions, Box(blocks.start, stop))
    yield from _tiles(plan, conditions, Box(start, blocks.stop))


def _count(plan: Plan, conditions: Conditions, tile: Box, number: int) -> npt.NDArray[np.uint32]:
    """Return how many patches of a grid meet the conditions, for each block of a tile."""
    axes = _tile_axes(plan, tile, number)
    if not all(len(axis.numbers) for axis in axes):
        return np.zeros(tile.shape, np.uint32)
    runs: Bools = np.ones([len(axis.numbers) for axis in axes], np.bool_)
    for group in conditions:
        met = (
            _meets(c, axes if c.plan is None else _tile_axes(c.plan, tile, number)) for c in group
        )
        runs &= reduce(np.logical_or, met)
        if not runs.any():
            return np.zeros(tile.shape, np.uint32)
    counts = runs.astype(np.uint32)
    for a, axis in enumerate(axes):
        sums = np.zeros((*counts.shape[:a], counts.shape[a] + 1, *counts.shape[a + 1 :]), np.uint32)
        np.cumsum(counts, axis=a, out=sums[(slice(None),) * a + (slice(1, None),)])
        counts = sums.take(axis.high, axis=a) - sums.take(axis.low, axis=a)
    return counts


def _tile_axes(plan: Plan, tile: Box, number: int) -> list[_TileAxis]:
    """Return the patches of a grid that the blocks of a tile own, along each axis."""
    return [
        _TileAxis.of(axis, axis.grids[number], low, high)
        for axis, low, high in zip(plan.axes, tile.start, tile.stop, strict=True)
    ]


@dataclass(frozen=True)
class _TileAxis:
    """The patches of a grid that the blocks of a tile own along one axis.

    Block n of the tile owns `numbers[low[n]:high[n]]`.
    """

    axis: AxisGeometry
    grid: AxisGrid
    numbers: IntArray
    low: IntArray
    high: IntArray

    @classmethod
    def of(cls, axis: AxisGeometry, grid: AxisGrid, first: int, stop: int) -> _TileAxis:
        low, high = grid.owned(np.arange(first, stop, dtype=np.int64), axis.chunk)
        start = int(low[0])
        numbers = np.arange(start, int(high[-1]), dtype=np.int64)
        return cls(axis, grid, numbers, low - start, high - start)

    def windows(self, *, of_input: bool) -> tuple[IntArray, IntArray]:
        """Return the ranges of voxels of the volume that the patches read, or predict."""
        begin = self.grid.start(self.numbers)
        lead, length = (0, self.grid.patch) if of_input else (self.grid.lead, self.grid.kept)
        start = np.maximum(begin + lead, 0)
        return start, np.minimum(begin + lead + length, self.grid.volume)


def _meets(condition: Condition, axes: Sequence[_TileAxis]) -> Bools:
    """Return which patches of a tile have an occupied cell in their windows."""
    picks, ranges = [], []
    for cells, axis in zip(condition.axes, axes, strict=True):
        start, stop = axis.windows(of_input=condition.of_input)
        used = np.unique(cells.cells(int(start.min()), int(stop.max())))
        used = used[(used >= 0) & (used < cells.count)]
        first = np.searchsorted(used, cells.cell(start))
        last = np.searchsorted(used, cells.cell(stop - 1), side="right")
        picks.append(used)
        ranges.append((first, last))
    if not all(len(used) for used in picks):
        return np.zeros([len(axis.numbers) for axis in axes], np.bool_)
    box = Box(tuple(int(u[0]) for u in picks), tuple(int(u[-1]) + 1 for u in picks))
    occupied = condition.read(box)
    for a, (used, low) in enumerate(zip(picks, box.start, strict=True)):
        if len(used) < occupied.shape[a]:
            occupied = occupied.take(used - low, axis=a)
    for a, (first, last) in enumerate(ranges):
        occupied = _any_in_ranges(occupied, first, last, a)
    return occupied


def _any_in_ranges(values: Bools, first: IntArray, last: IntArray, axis: int) -> Bools:
    """Return whether any value of `[first, last)` along an axis is true, for each range."""
    padding = [(0, 1) if a == axis else (0, 0) for a in range(values.ndim)]
    padded = np.pad(values, padding)  # an index of reduceat is less than the length
    bounds = np.stack([first, last], axis=1).ravel()
    result = np.logical_or.reduceat(padded, bounds, axis=axis)
    result = result[(slice(None),) * axis + (slice(None, None, 2),)]
    is_empty = first >= last
    if is_empty.any():
        result[(slice(None),) * axis + (is_empty,)] = False
    return result
