"""Half-open, axis-aligned boxes of voxels with integer corners, of any rank.

What is done for every patch calls functions of `operator`: Python code that runs for each axis
would keep other threads waiting for the interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from operator import gt, sub
from types import EllipsisType


@dataclass(frozen=True, slots=True)
class Box:
    """The voxels x with `start[a] <= x[a] < stop[a]` on every axis a.

    `start[a] <= stop[a]` on every axis; they are equal where the box is empty. Raises ValueError
    otherwise, or if the corners differ in rank.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop):
            raise ValueError(f"start {self.start} and stop {self.stop} differ in rank")
        if any(map(gt, self.start, self.stop)):
            raise ValueError(f"stop {self.stop} is less than start {self.start}")

    @classmethod
    def of_shape(cls, shape: Sequence[int]) -> Box:
        """Return the box of a shape whose first voxel is the origin."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of voxels along each axis."""
        return tuple(map(sub, self.stop, self.start))

    @property
    def size(self) -> int:
        """Number of voxels."""
        return prod(self.shape)

    def __and__(self, other: Box) -> Box:
        """Return the intersection; if it has no voxel, an empty box inside `self`."""
        start = tuple(
            min(max(a, c), b) for a, b, c in zip(self.start, self.stop, other.start, strict=True)
        )
        stop = tuple(
            max(lo, min(b, d)) for lo, b, d in zip(start, self.stop, other.stop, strict=True)
        )
        return Box(start, stop)

    def __contains__(self, other: object) -> bool:
        """Return whether every voxel of `other` lies in this box."""
        if not isinstance(other, Box):
            return False
        return all(
            a <= c and d <= b
            for a, b, c, d in zip(self.start, self.stop, other.start, other.stop, strict=True)
        )

    def slices(self, origin: Sequence[int]) -> tuple[slice, ...]:
        """Return the slices that select this box in an array whose first voxel is `origin`."""
        if len(origin) != len(self.start):
            raise ValueError(f"origin {tuple(origin)} and start {self.start} differ in rank")
        return tuple(map(slice, map(sub, self.start, origin), map(sub, self.stop, origin)))

    def index(self, origin: Sequence[int]) -> tuple[slice | EllipsisType, ...]:
        """Return the index that selects this box in an array (…, *S) whose first voxel is `origin`.

        Leading axes, such as channels, are kept whole. The result of indexing is a view.
        """
        return (..., *self.slices(origin))

    def slabs(self, max_size: int) -> Iterator[Box]:
        """Yield disjoint, non-empty boxes of at most `max_size` voxels that cover exactly this box.

        They follow each other in C order. `max_size` is at least 1.
        """
        if self.size <= max(1, max_size):
            if self.size:
                yield self
            return
        axis = next(a for a, length in enumerate(self.shape) if length > 1)
        step = max(1, max_size * self.shape[axis] // self.size)
        low, high = self.start[axis], self.stop[axis]
        for start in range(low, high, step):
            stop = min(start + step, high)
            part = Box(
                (*self.start[:axis], start, *self.start[axis + 1 :]),
                (*self.stop[:axis], stop, *self.stop[axis + 1 :]),
            )
            yield from part.slabs(max_size)

    def without_corner(self, corner: Sequence[int]) -> Iterator[Box]:
        """Yield disjoint, non-empty boxes that cover exactly `self` without `[corner, stop)`.

        Requires `start <= corner <= stop`. Yields at most one box per axis.
        """
        for axis, edge in enumerate(corner):
            start = (*corner[:axis], *self.start[axis:])
            stop = (*self.stop[:axis], edge, *self.stop[axis + 1 :])
            slab = Box(start, stop)
            if slab.size:
                yield slab

    def minus(self, other: Box) -> Iterator[Box]:
        """Yield disjoint, non-empty boxes that cover exactly the voxels of `self` not in `other`.

        Yields at most two boxes per axis.
        """
        inner = self & other
        if not inner.size:
            if self.size:
                yield self
            return
        yield from Box(self.start, inner.stop).without_corner(inner.start)
        start, stop = self.start, list(self.stop)
        for axis, edge in enumerate(inner.stop):
            high = Box((*start[:axis], edge, *start[axis + 1 :]), tuple(stop))
            if high.size:
                yield high
            stop[axis] = edge
