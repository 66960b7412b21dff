"""How often each storage chunk of an input is fetched, and what a cache of them has to hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from chunkq.geometry.grids import AxisGeometry
from chunkq.plan.costs import BLOCKS_PER_BATCH


@dataclass(frozen=True, slots=True)
class AxisFetches:
    """Storage chunks along one axis.

    used     those that any block reads
    most     the largest number that one block reads
    fetched  their number summed over the blocks
    """

    used: int
    most: int
    fetched: int


@dataclass(frozen=True)
class Fetches:
    """Storage chunks of one array, axis by axis in the order of nested loops over its blocks.

    `chunk_bytes` is the size of one in memory. A worker that computes all blocks in this order
    reads a storage chunk again while it is in the worker's cache of the least recently used ones.
    """

    axes: tuple[AxisFetches, ...]
    chunk_bytes: int

    @property
    def storage_chunks(self) -> int:
        """Number of storage chunks that the job reads."""
        return prod(axis.used for axis in self.axes)

    @property
    def are_repeated(self) -> bool:
        """Whether several blocks read the same storage chunk."""
        return any(axis.fetched > axis.used for axis in self.axes)

    @property
    def useful_bytes(self) -> int:
        """Size of the cache (bytes) with which each storage chunk is fetched once."""
        return self.storage_chunks * self.chunk_bytes if self.are_repeated else 0

    def average(self, cache_bytes: int) -> float:
        """Return how often one worker fetches each storage chunk, on average.

        Between two uses of a storage chunk by neighbors along an axis, the worker reads what all
        blocks along the faster axes read. Within that much cache the chunk is fetched once.
        """
        factor, needed = 1.0, prod(axis.most for axis in self.axes) * self.chunk_bytes
        for axis in reversed(self.axes):
            if needed > cache_bytes:
                factor *= axis.fetched / max(1, axis.used)
            needed = needed // max(1, axis.most) * axis.used
        return factor


def axis_fetches(axis: AxisGeometry, storage: int) -> AxisFetches:
    """Return the storage chunks of `storage` voxels that the blocks of an axis read.

    At the sides of a region, what a batch reads beside the patches that are needed is not counted.
    """
    used, most, fetched, end = 0, 0, 0, 0
    for low in axis.active[::BLOCKS_PER_BATCH]:
        blocks = np.arange(low, min(low + BLOCKS_PER_BATCH, axis.active.stop), dtype=np.int64)
        start, stop = axis.read(blocks)
        first, after = start // storage, np.where(stop > start, -(-stop // storage), 0)
        order = np.argsort(first, kind="stable")
        ends = np.maximum.accumulate([end, *after[order]])
        used += int(np.maximum(0, after[order] - np.maximum(first[order], ends[:-1])).sum())
        lengths = np.maximum(0, after - first)
        most = max(most, int(lengths.max()))
        fetched += int(lengths.sum())
        end = int(ends[-1])
    return AxisFetches(used, most, fetched)


def picked_fetches(picks: Sequence[int], storage: int, *, at_once: bool) -> AxisFetches:
    """Return the storage chunks along an axis of which `picks` are read, together or one by one."""
    used = len({pick // storage for pick in picks})
    return AxisFetches(used, used, used) if at_once else AxisFetches(used, 1, len(picks))
