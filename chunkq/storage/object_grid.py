"""Which objects store an array, by their names and positions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Protocol

from chunkq.geometry.box import Box
from chunkq.storage.formats.zarr_chunks import Keys, document_keys


class ObjectKeys(Keys, Protocol):
    """Names of the objects of an array, from which their indices follow."""

    def index(self, name: str) -> tuple[int, ...]:
        """Return the index of the object with a name that matches the pattern."""


@dataclass(frozen=True)
class ObjectGrid:
    """The objects of an array: one for each storage chunk, or for each shard of a Zarr array.

    `shape` is the shape of the array, and `chunk` that of what one object stores, in the order of
    the stored axes.
    """

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    keys: ObjectKeys

    @classmethod
    def of_document(cls, text: str, zarr_format: int) -> ObjectGrid:
        """Return the objects of the array that has this metadata document."""
        document = json.loads(text)
        if zarr_format == 2:
            chunk = document["chunks"]
        else:
            chunk = document["chunk_grid"]["configuration"]["chunk_shape"]
        keys = document_keys(document, zarr_format)
        return cls(tuple(document["shape"]), tuple(chunk), keys)

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of objects along each axis."""
        return tuple(-(-size // step) for size, step in zip(self.shape, self.chunk, strict=True))

    def indices(self, box: Box) -> Box:
        """Return the indices of the objects that hold voxels of a box, which is not empty."""
        start = tuple(low // step for low, step in zip(box.start, self.chunk, strict=True))
        stop = tuple(-(-high // step) for high, step in zip(box.stop, self.chunk, strict=True))
        return Box(start, stop)

    def names(self, box: Box) -> Iterator[str]:
        """Yield the names of the objects that hold voxels of a box, in C order."""
        if not box.size:
            return
        indices = self.indices(box)
        yield from map(self.keys.name, product(*map(range, indices.start, indices.stop)))

    def index_of(self, name: str) -> tuple[int, ...] | None:
        """Return the index of the object with this name, or None if the array has none."""
        if not self._pattern.fullmatch(name):
            return None
        index = self.keys.index(name)
        is_inside = all(i < count for i, count in zip(index, self.counts, strict=True))
        return index if is_inside and self.keys.name(index) == name else None

    def slabs(self, box: Box, voxels: int) -> Iterator[Box]:
        """Yield boxes of whole objects that cover a box in C order, each of about `voxels` voxels.

        The names of a box follow those of the box before. A box has at least one object.
        """
        if not box.size:
            return
        indices = self.indices(box)
        per_object = 1
        for step, low, high in zip(self.chunk, box.start, box.stop, strict=True):
            per_object *= min(step, high - low)
        for part in indices.slabs(max(1, voxels // per_object)):
            corners = zip(box.start, box.stop, part.start, part.stop, self.chunk, strict=True)
            start, stop = zip(
                *((max(low, a * step), min(high, b * step)) for low, high, a, b, step in corners),
                strict=True,
            )
            yield Box(start, stop)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return self.keys.pattern(len(self.shape))
