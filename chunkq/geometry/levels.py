"""Levels of a pyramid: shapes, factors, and the boxes that tasks write, along spatial axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from chunkq.geometry.box import Box

FACTOR = 2
"""Voxels that become one along an axis that is reduced."""
MAX_RATIO = 1.5
"""An axis is reduced if its voxel size is at most so many times the smallest one."""
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Level:
    """One level of a pyramid above level 0. All tuples have one entry per spatial axis.

    below     shape of the level that it is made from, in voxels
    factors   voxels of that level per voxel, 1 or 2
    total     voxels of level 0 per voxel
    unit      shape of what one task writes: a whole number of storage units, unless one covers
              the axis
    storage   shape of a storage unit, which is written at once: a storage chunk, or a shard
    """

    below: Shape
    factors: Shape
    total: Shape
    unit: Shape
    storage: Shape

    @property
    def shape(self) -> Shape:
        """Shape in voxels: that of the level below divided by the factors, rounded up."""
        return _divided(self.below, self.factors)

    @property
    def units(self) -> Shape:
        """Number of units along each axis; together they cover every voxel exactly once."""
        return _divided(self.shape, self.unit)

    def box(self, index: Sequence[int]) -> Box:
        """Return the voxels of a unit."""
        return _tile(index, self.unit) & Box.of_shape(self.shape)

    def writes(self, index: Sequence[int], max_voxels: int) -> Iterator[Box]:
        """Yield boxes of whole storage units, which are disjoint and cover a unit, in C order.

        Each has at most `max_voxels` voxels, or is one storage unit.
        """
        box = self.box(index)
        start = tuple(low // s for low, s in zip(box.start, self.storage, strict=True))
        stop = tuple(-(-high // s) for high, s in zip(box.stop, self.storage, strict=True))
        for part in Box(start, stop).slabs(max(1, max_voxels // prod(self.storage))):
            corners = (
                tuple(n * s for n, s in zip(corner, self.storage, strict=True))
                for corner in (part.start, part.stop)
            )
            yield box & Box(*corners)

    def source(self, box: Box) -> Box:
        """Return the voxels of the level below from which a box is made."""
        start = tuple(n * f for n, f in zip(box.start, self.factors, strict=True))
        stop = tuple(n * f for n, f in zip(box.stop, self.factors, strict=True))
        return Box(start, stop) & Box.of_shape(self.below)

    def units_of(self, box: Box) -> Iterator[Shape]:
        """Yield the units with voxels that are made from a box of the level below, in C order."""
        if box.size:
            steps = [u * f for u, f in zip(self.unit, self.factors, strict=True)]
            yield from _numbers(box, steps)

    def parts(self, box: Box, chunk: Shape, max_voxels: int) -> Iterator[Box]:
        """Yield disjoint boxes that cover a box of whole storage units, in C order.

        The source of each is a whole number of storage chunks, of the shape `chunk`, of the level
        below. It has at most `max_voxels` voxels, or the smallest such number of chunks.
        """
        # An odd storage chunk and the next one become one.
        steps = [c // f if c % f == 0 else c for c, f in zip(chunk, self.factors, strict=True)]
        for a in reversed(range(len(steps))):
            while steps[a] < box.shape[a] and FACTOR * self._source_voxels(steps) <= max_voxels:
                steps[a] *= FACTOR
        yield from _tiles(box, steps)

    def _source_voxels(self, shape: Sequence[int]) -> int:
        return prod(n * f for n, f in zip(shape, self.factors, strict=True))


def level_factors(shape: Sequence[int], sizes: Sequence[float]) -> Shape:
    """Return by how much each axis is reduced for the next level: 1 or 2.

    Axes are reduced whose voxel size is at most MAX_RATIO times the smallest of `sizes`. Axes of
    one voxel are left out.
    """
    smallest = min((size for n, size in zip(shape, sizes, strict=True) if n > 1), default=0.0)
    return tuple(
        FACTOR if n > 1 and size <= MAX_RATIO * smallest else 1
        for n, size in zip(shape, sizes, strict=True)
    )


def pyramid_levels(
    shape: Shape,
    sizes: Sequence[float],
    chunk: Shape,
    storage: Shape,
    block: Shape,
    count: int | None,
) -> tuple[Level, ...]:
    """Return the levels above level 0, which has this shape.

    `sizes` are the voxel sizes of level 0 in one unit, greater than 0. There are `count` levels
    together with level 0; if it is None, as many as it takes until every axis fits one storage
    chunk, of the shape `chunk`. There are fewer if a level has one voxel.

    A task writes the voxels that one block, of the shape `block`, becomes, as far as these are
    whole storage units, of the shape `storage`, and at least one storage unit.
    """
    levels: list[Level] = []
    total = (1,) * len(shape)
    while any(n > 1 for n in shape):
        fits = all(n <= c for n, c in zip(shape, chunk, strict=True))
        if fits if count is None else len(levels) + 1 >= count:
            break
        factors = level_factors(shape, [s * t for s, t in zip(sizes, total, strict=True)])
        total = tuple(t * f for t, f in zip(total, factors, strict=True))
        unit = tuple(max(1, b // t // s) * s for b, t, s in zip(block, total, storage, strict=True))
        levels.append(Level(shape, factors, total, unit, storage))
        shape = levels[-1].shape
    return tuple(levels)


def _divided(numbers: Sequence[int], divisors: Sequence[int]) -> Shape:
    return tuple(-(-n // d) for n, d in zip(numbers, divisors, strict=True))


def _tile(index: Sequence[int], shape: Sequence[int]) -> Box:
    start = tuple(i * n for i, n in zip(index, shape, strict=True))
    return Box(start, tuple(low + n for low, n in zip(start, shape, strict=True)))


def _tiles(box: Box, shape: Sequence[int]) -> Iterator[Box]:
    """Yield the parts of a box in the tiles of a grid that begins at 0, in C order."""
    for index in _numbers(box, shape):
        yield box & _tile(index, shape)


def _numbers(box: Box, shape: Sequence[int]) -> Iterator[Shape]:
    """Yield the indices of the tiles that a box with voxels intersects, in C order."""
    axes = zip(box.start, box.stop, shape, strict=True)
    return product(*(range(low // n, -(-high // n)) for low, high, n in axes))
