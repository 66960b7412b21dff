"""Borders between blocks, and layers of voxels inside them to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil, prod

from chunkq.geometry.box import Box
from chunkq.plan.plan import Plan

MIN_SIDE = 32
"""Voxels on each side of a corner that are compared, if the blocks are twice as long."""
BLOCKS_PER_CORNER = 100
"""Of larger outputs one corner is compared for this many blocks, which bounds what is read."""


@dataclass(frozen=True, slots=True)
class Border:
    """A part of the border between two blocks along one axis, two layers of voxels thick.

    `at_border` has one layer on each side of the border. `inside` has the layers of the same voxels
    on both sides of a plane that is a quarter of a block away.
    """

    axis: int
    at_border: Box
    inside: Box


def count_corners(plan: Plan) -> int:
    """Return the number of points at which borders along all axes meet.

    Axes without a border that has a plane to compare are left out; 0 if there is none.
    """
    planes = [_planes(plan, axis) for axis in range(plan.rank)]
    return prod(max(1, len(along)) for along in planes) if any(planes) else 0


def select_corners(plan: Plan, limit: int, pairs: int) -> Iterator[tuple[Border, ...]]:
    """Yield the borders along each axis about some corners, evenly spaced among all in C order.

    There are as many corners as give `pairs` pairs of voxels along each axis, or one per
    `BLOCKS_PER_CORNER` blocks if these are more, and at most `limit`. The borders of a corner are
    in the same storage chunks, so the caller should read them together: whole storage chunks on
    both sides of the corner where they are shorter than half a block. No pair is in two corners.
    """
    planes = [_planes(plan, axis) for axis in range(plan.rank)]
    total = count_corners(plan)
    if not min(total, limit):
        return
    sides = _sides(plan, planes, pairs / min(total, limit))
    spans = [2 * side if along else side for side, along in zip(sides, planes, strict=True)]
    faces = [prod(spans) // span for span, along in zip(spans, planes, strict=True) if along]
    blocks = prod(len(along.numbers) for along in plan.axes)
    chosen = min(total, limit, max(ceil(pairs / min(faces)), blocks // BLOCKS_PER_CORNER))
    for number in range(chosen):
        rest, at = number * total // chosen, [0] * plan.rank
        for n in reversed(range(plan.rank)):
            rest, at[n] = divmod(rest, max(1, len(planes[n])))
        low, high = [], []
        for n, along in enumerate(plan.axes):
            if planes[n]:
                start = planes[n][at[n]][0] - sides[n]
            else:
                middle = (along.high - along.low) // 2
                start = along.low + middle - middle % sides[n]
            low.append(max(along.low, start))
            high.append(min(along.high, start + spans[n]))
        yield tuple(
            Border(axis, *(_layers(low, high, axis, plane) for plane in planes[axis][at[axis]]))
            for axis in range(plan.rank)
            if planes[axis]
        )


def _sides(plan: Plan, planes: list[list[tuple[int, int]]], pairs: float) -> list[int]:
    """Return the voxels on each side of a corner, along each axis.

    They are whole storage chunks, as many as give at least `pairs` pairs of voxels per corner, but
    at most half a block where other borders follow, so that no two corners share a pair.
    """
    least = max(MIN_SIDE, ceil(pairs ** (1 / max(1, plan.rank - 1)) / 2))
    sides = []
    for axis, along in enumerate(planes):
        storage = plan.storage_chunks[axis]
        most = plan.chunksize[axis] // 2 if along else plan.chunksize[axis]
        sides.append(max(1, min(most, storage * ceil(least / storage))))
    return sides


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
