"""Boxes in which an array is copied: tiles of one shape that follow each other in C order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.geometry.box import Box

COPY_BYTES = 64 << 20
"""Size (bytes) of a block, unless the smallest possible one is larger."""
DECODED_BYTES = 128 << 20
"""Size (bytes) of the storage chunks that one read decodes, unless a single one is larger."""


@dataclass(frozen=True)
class Blocks:
    """Boxes of the shape `block` that cover an array, in C order; the last ones are clipped."""

    shape: tuple[int, ...]
    block: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of blocks along each axis."""
        return tuple(-(-size // edge) for size, edge in zip(self.shape, self.block, strict=True))

    @property
    def count(self) -> int:
        """Number of blocks."""
        return prod(self.grid)

    def boxes(self, first: int = 0) -> Iterator[Box]:
        """Yield the blocks from number `first` on."""
        for index in islice(product(*map(range, self.grid)), first, None):
            start = tuple(n * edge for n, edge in zip(index, self.block, strict=True))
            axes = zip(start, self.block, self.shape, strict=True)
            yield Box(start, tuple(min(low + edge, size) for low, edge, size in axes))


def slabs(shape: Sequence[int], itemsize: int, edges: Sequence[int] = ()) -> Blocks:
    """Return blocks whose voxels follow each other in C order, for files that are written in order.

    A slab covers one position along the first axes, some along one axis, and all of the axes behind
    it. It has at most `COPY_BYTES`, unless one position along the last axis but one has more.
    `edges` are those of the storage chunks that are read: along its axis a slab has whole storage
    chunks, or an equal part of one.
    """
    shape = tuple(shape)
    axis, last = 0, max(0, len(shape) - 2)
    while axis < last and prod(shape[axis + 1 :]) * itemsize > COPY_BYTES:
        axis += 1
    most = max(1, COPY_BYTES // max(1, prod(shape[axis + 1 :]) * itemsize))
    edge = edges[axis] if edges else 1
    if most >= edge:
        thickness = most // edge * edge
    else:
        thickness = next(n for n in range(most, 0, -1) if edge % n == 0)
    thickness = max(1, min(thickness, shape[axis])) if shape else 1
    return Blocks(shape, ((1,) * axis + (thickness, *shape[axis + 1 :])) if shape else ())


def tiles(shape: Sequence[int], itemsize: int, chunk: Sequence[int]) -> Blocks:
    """Return blocks of whole storage chunks of this shape, for arrays whose chunks are objects.

    A block has at most `COPY_BYTES`, unless a storage chunk has more.
    """
    block = [min(edge, size) for edge, size in zip(chunk, shape, strict=True)]
    axes = [n for n in reversed(range(len(block))) if chunk[n] > 1] or []
    while axes:
        axis = min(axes, key=lambda n: block[n])  # compact blocks share few input chunks
        if block[axis] >= shape[axis] or 2 * prod(block) * itemsize > COPY_BYTES:
            axes.remove(axis)
        else:
            block[axis] *= 2
    return Blocks(tuple(shape), tuple(block))


def reads(box: Box, edges: Sequence[int], itemsize: int) -> Iterator[Box]:
    """Yield boxes that cover exactly this box, each for one read.

    A read decodes storage chunks, of the shape `edges`, of at most `DECODED_BYTES`, or one chunk: a
    storage can decode all chunks of a read before it copies the first one. Without `edges` any
    voxel can be read alone.
    """
    if not edges:
        yield box
        return
    firsts = [low // edge for low, edge in zip(box.start, edges, strict=True)]
    counts = [
        -(-high // edge) - first for high, edge, first in zip(box.stop, edges, firsts, strict=True)
    ]
    if max(counts, default=0) <= 1 or prod(counts) * prod(edges) * itemsize <= DECODED_BYTES:
        yield box
        return
    axis = counts.index(max(counts))
    middle = (firsts[axis] + counts[axis] // 2) * edges[axis]
    for low, high in ((box.start[axis], middle), (middle, box.stop[axis])):
        start = (*box.start[:axis], low, *box.start[axis + 1 :])
        stop = (*box.stop[:axis], high, *box.stop[axis + 1 :])
        yield from reads(Box(start, stop), edges, itemsize)


def as_bytes(values: npt.NDArray[Any]) -> memoryview:
    """Return the bytes of an array in C order; of a contiguous one without a copy."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
