"""Borders between blocks, and layers of voxels inside them to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil, prod

from chunkq.geometry.box import Box
from chunkq.plan.plan import Plan

MIN_EDGE = 64
"""Voxels along each side of a border that are compared, if the border is as long."""


@dataclass(frozen=True, slots=True)
class Border:
    """A part of the border between two blocks along one axis, two layers of voxels thick.

    `at_border` has one layer on each side of the border. `inside` has the layers of the same voxels
    on both sides of a plane that is a quarter of a block away.
    """

    axis: int
    at_border: Box
    inside: Box


def count_borders(plan: Plan, axis: int) -> int:
    """Return the number of borders between blocks along an axis that have a plane to compare."""
    others = prod(len(a.numbers) for n, a in enumerate(plan.axes) if n != axis)
    return len(_planes(plan, axis)) * others


def select_borders(plan: Plan, axis: int, limit: int, pairs: int) -> Iterator[Border]:
    """Yield at most `limit` borders along an axis, evenly spaced among all in C order.

    Of each border a part about its middle is used, from the start of a storage chunk on: as much as
    gives `pairs` pairs of voxels in all, and at least `MIN_EDGE` voxels along each side.
    """
    count = count_borders(plan, axis)
    chosen = min(count, limit)
    if not chosen:
        return
    sides = max(1, plan.rank - 1)
    edge = max(MIN_EDGE, ceil((pairs / chosen) ** (1 / sides)))
    planes = _planes(plan, axis)
    sizes = [len(planes) if n == axis else len(a.numbers) for n, a in enumerate(plan.axes)]
    for number in range(chosen):
        index, rest = [0] * plan.rank, number * count // chosen
        for n in reversed(range(plan.rank)):
            rest, index[n] = divmod(rest, sizes[n])
        border, inside = planes[index[axis]]
        low, high = [], []
        for n, a in enumerate(plan.axes):
            block = a.block(a.numbers[0] + (0 if n == axis else index[n]))
            start = (block.start + block.stop) // 2 - edge // 2
            start -= (start - a.low) % a.storage  # few storage chunks are read
            low.append(max(block.start, start))
            high.append(min(block.stop, low[-1] + edge))
        yield Border(axis, *(_layers(low, high, axis, plane) for plane in (border, inside)))


def _planes(plan: Plan, axis: int) -> list[tuple[int, int]]:
    """Return the border of each block with the one below along an axis, and the plane beside it.

    The plane is a quarter of a block below the border, or above it if there is not enough room.
    """
    along, quarter = plan.axes[axis], plan.chunksize[axis] // 4
    starts = [along.block(number).start for number in islice(along.numbers, 1, None)]
    first, stop = along.low, along.high
    pairs = []
    for start in starts:
        plane = start - quarter if start - quarter > first else start + quarter
        if quarter and plane < stop:
            pairs.append((start, plane))
    return pairs


def _layers(low: list[int], high: list[int], axis: int, plane: int) -> Box:
    """Return the voxels of a rectangle on both sides of a plane along an axis."""
    start = (*low[:axis], plane - 1, *low[axis + 1 :])
    return Box(start, (*high[:axis], plane + 1, *high[axis + 1 :]))
