"""The batches of a chunk that contain a patch of the job's region.

Batches are those of the whole image, so that each prediction has the bytes that it has without a
region. A chunk therefore computes more patches than it needs. Patches have the order of
`Plan.patches`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import numpy as np
import numpy.typing as npt

from chunkq.geometry.grids import AxisBlock, AxisGeometry

Along = tuple[tuple[int, int, int], ...]
"""The patches of a block along one axis: for each grid the number that it owns, and the range of
those that the region needs, counted from the first owned one."""
BLOCKS_PER_BATCH = 1 << 16
"""Blocks of one axis that are examined in one array operation."""
SELECTIONS_CACHED = 1 << 12
"""Entries in the cache of selected batches; most chunks at one side of a region share theirs."""


@dataclass(frozen=True, slots=True)
class NeededBatches:
    """Whole batches of a chunk.

    runs    positions of their patches among all that the chunk owns
    bounds  for each grid the smallest and the largest number of a patch along each axis, counted
            from the first owned one; None if no patch of the grid is in a batch
    """

    runs: tuple[range, ...]
    bounds: tuple[tuple[tuple[int, ...], tuple[int, ...]] | None, ...]

    @property
    def patches(self) -> int:
        """Number of patches."""
        return sum(map(len, self.runs))


def along(block: AxisBlock) -> Along:
    """Return the patches of a block along its axis."""
    firsts = [owned.start for owned in block.owned]
    return tuple(
        (len(owned), needed.start - first, needed.stop - first) if needed else (len(owned), 0, 0)
        for owned, needed, first in zip(block.owned, block.needed, firsts, strict=True)
    )


@lru_cache(maxsize=SELECTIONS_CACHED)
def needed_batches(chunk: tuple[Along, ...], batch: int) -> NeededBatches:
    """Return the batches of `batch` patches that contain a needed patch.

    `chunk` has the patches of a chunk along each axis. The last batch of a chunk can be smaller.
    """
    shapes, positions, first = [], [], 0
    for grid in zip(*chunk, strict=True):
        shape = tuple(count for count, _, _ in grid)
        needed = np.ix_(*(np.arange(low, high) for _, low, high in grid))
        if prod(shape):
            flat = np.ravel_multi_index(needed, shape)
            positions.append(first + np.asarray(flat, np.int64).ravel())
        shapes.append(shape)
        first += prod(shape)
    every = np.concatenate([np.empty(0, np.int64), *positions])
    numbers = np.unique(every // batch)
    breaks = np.flatnonzero(np.diff(numbers) > 1) + 1
    runs = tuple(
        range(int(part[0]) * batch, min((int(part[-1]) + 1) * batch, first))
        for part in np.split(numbers, breaks)
        if len(part)
    )
    return NeededBatches(runs, tuple(_bounds(shapes, runs)))


def _bounds(
    shapes: Sequence[tuple[int, ...]], runs: Sequence[range]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]] | None]:
    """Yield the bounds of each grid; see `NeededBatches`."""
    first = 0
    for shape in shapes:
        stop = first + prod(shape)
        parts = [np.arange(max(r.start, first), min(r.stop, stop)) - first for r in runs]
        inside = np.concatenate([np.empty(0, np.int64), *parts])
        first = stop
        if not len(inside):
            yield None
            continue
        numbers = np.unravel_index(inside, shape)
        yield tuple(int(n.min()) for n in numbers), tuple(int(n.max()) for n in numbers)


def window(
    axis: AxisGeometry, block: AxisBlock, number: int, batches: NeededBatches
) -> tuple[int, int]:
    """Return the input window of a chunk's batches along axis `number`, on which `block` lies.

    Where the region needs all patches of the block it is the halo of the block.
    """
    if block.needed == block.owned:
        return block.halo
    low, high = [], []
    for grid, owned, bounds in zip(axis.grids, block.owned, batches.bounds, strict=True):
        if bounds is not None:
            low.append(grid.start(owned.start + bounds[0][number]))
            high.append(grid.start(owned.start + bounds[1][number]) + grid.patch)
    return min(low), max(high)


def needed_totals(axes: Sequence[AxisGeometry], batch: int) -> tuple[int, int]:
    """Return the patches that all chunks compute, and the voxels that they read.

    Takes time linear in the blocks along one axis: blocks with the same numbers of patches are
    counted together, except the few in which the region needs only some.
    """
    patches = voxels = 0
    for kinds in product(*map(_kinds, axes)):
        batches = needed_batches(tuple(kind.along for kind in kinds), batch)
        if not batches.runs:
            continue
        patches += batches.patches * prod(kind.count for kind in kinds)
        voxels += prod(
            kind.read
            if kind.block is None
            else axis.voxels_read(*window(axis, kind.block, number, batches))
            for number, (axis, kind) in enumerate(zip(axes, kinds, strict=True))
        )
    return patches, voxels


@dataclass(frozen=True, slots=True)
class _Kind:
    """Blocks along one axis with the same numbers of patches.

    `count` is their number, `read` the sum of the voxels that they read. `block` is the only one
    if the region needs only some of its patches, else None.
    """

    along: Along
    count: int
    read: int
    block: AxisBlock | None


def _kinds(axis: AxisGeometry) -> list[_Kind]:
    """Return the kinds of blocks along an axis that own a patch of the region."""
    partial: list[_Kind] = []
    totals: dict[Along, tuple[int, int]] = {}
    for low in axis.active[::BLOCKS_PER_BATCH]:
        blocks = np.arange(low, min(low + BLOCKS_PER_BATCH, axis.active.stop), dtype=np.int64)
        counts, is_full = [], np.ones(len(blocks), np.bool_)
        for grid in axis.grids:
            counts.append(_length(*grid.owned(blocks, axis.chunk)))
            is_full &= _length(*axis.needed(grid, blocks)) == counts[-1]
        for number in blocks[~is_full].tolist():
            block = axis.block(number)
            partial.append(_Kind(along(block), 1, 0, block))
        rows, kind = np.unique(np.stack(counts)[:, is_full], axis=1, return_inverse=True)
        read = _length(*axis.read(blocks))[is_full]
        for n, row in enumerate(rows.T.tolist()):
            of_kind = kind.reshape(-1) == n
            key = tuple((count, 0, count) for count in row)
            count, voxels = totals.get(key, (0, 0))
            totals[key] = count + int(of_kind.sum()), voxels + int(read[of_kind].sum())
    return partial + [_Kind(key, count, read, None) for key, (count, read) in totals.items()]


def _length(low: npt.NDArray[np.int64], high: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return high - low
