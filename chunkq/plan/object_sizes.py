"""`ObjectSizes`: bytes of the objects that store an array; `StoredSize`: bytes that are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

from chunkq.geometry.padding import IntArray

Shape = tuple[int, ...]
Along = Callable[[int, IntArray], IntArray]
"""Returns a number for each of some lengths (voxels) along the axis with a number."""


@dataclass(frozen=True, slots=True)
class StoredSize:
    """What is stored of an array, or in a file.

    objects       number of objects, those included that are absent because their voxels are all
                  the fill value
    bytes         bytes of all of them
    object_bytes  bytes of the largest one
    is_exact      whether objects have these bytes, without compression; else at most these
    """

    objects: int
    bytes: int
    object_bytes: int
    is_exact: bool

    @classmethod
    def of_file(cls, size: int, *, is_exact: bool) -> StoredSize:
        """Return the size of one file."""
        return cls(1, size, size, is_exact)

    @classmethod
    def total(cls, sizes: Iterable[StoredSize]) -> StoredSize:
        """Return the size of several together, at least one."""
        parts = list(sizes)
        return cls(
            sum(part.objects for part in parts),
            sum(part.bytes for part in parts),
            max(part.object_bytes for part in parts),
            all(part.is_exact for part in parts),
        )


@dataclass(frozen=True, slots=True)
class ObjectSizes:
    """The objects that store an array: their shape along the spatial axes, and their bytes.

    An object consists of parts of one shape, those at the upper end of an axis included. Parts
    without a voxel of the array are not stored.

    shape         shape of what one object stores, in voxels
    part          shape of a part, in voxels
    part_bytes    bytes of a part
    object_bytes  bytes of an object beside its parts
    repeats       number of objects that store the same voxels, such as one per channel
    is_exact      whether a part has exactly `part_bytes`, or at most so many
    """

    shape: Shape
    part: Shape
    part_bytes: int
    object_bytes: int = 0
    repeats: int = 1
    is_exact: bool = True

    def stored(self, total: Callable[[Along], int]) -> StoredSize:
        """Return the size of the boxes of whole objects that are written.

        `total` returns the sum over these boxes of the product of one number per axis.
        """
        objects, parts = total(self._objects_along), total(self._parts_along)
        per_object = prod(-(-edge // p) for edge, p in zip(self.shape, self.part, strict=True))
        return StoredSize(
            self.repeats * objects,
            self.repeats * (objects * self.object_bytes + parts * self.part_bytes),
            self.object_bytes + per_object * self.part_bytes,
            self.is_exact,
        )

    def _objects_along(self, axis: int, lengths: IntArray) -> IntArray:
        return -(-lengths // self.shape[axis])

    def _parts_along(self, axis: int, lengths: IntArray) -> IntArray:
        edge, part = self.shape[axis], self.part[axis]
        return lengths // edge * -(-edge // part) - (-(lengths % edge) // part)
