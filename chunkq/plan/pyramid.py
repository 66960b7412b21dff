"""Which units of the levels of an output's pyramid are tasks, what each waits for, and costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Literal

import numpy as np

from chunkq.geometry.box import Box
from chunkq.geometry.grids import AxisGeometry
from chunkq.geometry.levels import Level
from chunkq.geometry.padding import IntArray
from chunkq.plan.chunk import Index
from chunkq.plan.empty_rule import Bools
from chunkq.plan.item_tasks import ItemTasks, sum_of_products
from chunkq.plan.plan import Plan

if TYPE_CHECKING:
    from chunkq.plan.object_sizes import Along, ObjectSizes, StoredSize

Method = Literal["mean", "mode", "nearest"]
"""How a voxel of a level is computed from those that become it."""


@dataclass(frozen=True)
class LevelCosts:
    """Tasks of a level, and the bytes that they read and write, of uncompressed voxels."""

    tasks: int
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class Pyramid:
    """The levels above level 0 of one output of an item.

    `plan` has the geometry of the output, `tasks` are those of the item. `levels[n]` is level
    n + 1. A unit is a task if something that it is made of is written: a block of level 0, or a
    unit of the level below.
    """

    plan: Plan
    tasks: ItemTasks
    levels: tuple[Level, ...]
    method: Method

    def units(self, number: int) -> Iterator[Index]:
        """Yield the units of level `number` that are tasks, in C order."""
        written = self._written(number)
        if written is None:
            return product(*map(range, self.levels[number - 1].units))
        return map(tuple, np.argwhere(written).tolist())

    def has_unit(self, number: int, index: Index) -> bool:
        """Return whether a unit of level `number` exists and is a task."""
        if not 1 <= number <= len(self.levels):
            return False
        units = self.levels[number - 1].units
        if len(index) != len(units) or any(i >= n for i, n in zip(index, units, strict=True)):
            return False
        written = self._written(number)
        return written is None or bool(written[index])

    def blocks_below(self, index: Index) -> list[Index]:
        """Return the blocks with voxels that a unit of level 1 is made of, in C order."""
        level = self.levels[0]
        source = level.source(level.box(index))
        ranges = []
        for axis, low, high in zip(self.plan.axes, source.start, source.stop, strict=True):
            first, end = _blocks(axis, np.asarray(low), np.asarray(high))
            ranges.append(range(int(first), int(end)))
        return list(product(*ranges))

    def units_below(self, number: int, index: Index) -> list[Index]:
        """Return the units of level `number` - 1 that a unit is made of and that are tasks."""
        level, below = self.levels[number - 1], self.levels[number - 2]
        source = level.source(level.box(index))
        ranges = [
            range(low // u, -(-high // u))
            for low, high, u in zip(source.start, source.stop, below.unit, strict=True)
        ]
        return [unit for unit in product(*ranges) if self.has_unit(number - 1, unit)]

    def units_above_block(self, index: Index) -> list[Index]:
        """Return the units of level 1 that voxels of a block become, in C order."""
        if not self.levels:
            return []
        origin = self.plan.region.start
        block = self.plan.chunk(index).block
        start = tuple(n - o for n, o in zip(block.start, origin, strict=True))
        stop = tuple(n - o for n, o in zip(block.stop, origin, strict=True))
        return list(self.levels[0].units_of(Box(start, stop))) if block.size else []

    def units_above(self, number: int, index: Index) -> list[Index]:
        """Return the units of level `number` + 1 that voxels of a unit become, in C order."""
        if number >= len(self.levels):
            return []
        return list(self.levels[number].units_of(self.levels[number - 1].box(index)))

    @cached_property
    def costs(self) -> tuple[LevelCosts, ...]:
        """The costs of each level."""
        return tuple(self._costs(number) for number in range(1, len(self.levels) + 1))

    def _costs(self, number: int) -> LevelCosts:
        level, written = self.levels[number - 1], self._written(number)
        voxel_bytes = self.plan.output.voxel_bytes
        read, stored = [], []
        axes = zip(_unit_bounds(level), level.factors, level.below, strict=True)
        for (starts, stops), factor, below in axes:
            read.append(np.minimum(stops * factor, below) - starts * factor)
            stored.append(stops - starts)
        return LevelCosts(
            prod(level.units) if written is None else int(written.sum()),
            sum_of_products(written, read) * voxel_bytes,
            sum_of_products(written, stored) * voxel_bytes,
        )

    def stored_size(self, number: int, sizes: ObjectSizes) -> StoredSize:
        """Return the size of what the tasks of level `number` store."""
        level, written = self.levels[number - 1], self._written(number)
        bounds = _unit_bounds(level)

        def total(along: Along) -> int:
            numbers = [along(a, stops - starts) for a, (starts, stops) in enumerate(bounds)]
            return sum_of_products(written, numbers)

        return sizes.stored(total)

    def _written(self, number: int) -> Bools | None:
        """Return which units of a level are tasks; None if all are."""
        return None if self._all_written is None else self._all_written[number - 1]

    @cached_property
    def _all_written(self) -> list[Bools] | None:
        blocks = self.tasks.written_blocks
        if blocks is None:
            return None
        result: list[Bools] = []
        for number, level in enumerate(self.levels, start=1):
            ranges = []
            bounds = zip(self.plan.axes, _unit_bounds(level), strict=True)
            for a, (axis, (starts, stops)) in enumerate(bounds):
                low = starts * level.factors[a]
                high = np.minimum(stops * level.factors[a], level.below[a])
                if number == 1:
                    first, end = _blocks(axis, low, high)
                    origin = self.plan.index_bounds.start[a]
                    ranges.append((first - origin, end - origin))
                else:
                    size = self.levels[number - 2].unit[a]
                    ranges.append((low // size, -(-high // size)))
            below = blocks if number == 1 else result[-1]
            result.append(reduce(_any_along, enumerate(ranges), below))
        return result


def _unit_bounds(level: Level) -> list[tuple[IntArray, IntArray]]:
    """Return where the units of a level start and stop along each axis, in voxels."""
    bounds = []
    for count, unit, size in zip(level.units, level.unit, level.shape, strict=True):
        starts = np.arange(count, dtype=np.int64) * unit
        bounds.append((starts, np.minimum(starts + unit, size)))
    return bounds


def _blocks(axis: AxisGeometry, low: IntArray, high: IntArray) -> tuple[IntArray, IntArray]:
    """Return the range of the blocks with the voxels `[low, high)` of the output along an axis."""
    offset = axis.low - axis.origin
    return (low + offset) // axis.chunk, -(-(high + offset) // axis.chunk)


def _any_along(values: Bools, ranges: tuple[int, tuple[IntArray, IntArray]]) -> Bools:
    """Return whether any value of each range along an axis is true."""
    axis, (starts, stops) = ranges
    shape = (*values.shape[:axis], 1, *values.shape[axis + 1 :])
    counts = np.concatenate([np.zeros(shape, np.int64), values.cumsum(axis)], axis)
    is_any: Bools = counts.take(stops, axis) > counts.take(starts, axis)
    return is_any
