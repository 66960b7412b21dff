"""Where patches start along one axis, and which block owns them. Integers only.

Everything is a closed form of the patch number or the block number, so an axis of any length
costs nothing until one of its blocks is asked for. Functions of block or patch numbers take
scalars or int64 arrays alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, overload

import numpy as np

from chunkq.padding import IntArray, PadMode, source_range

Edge = Literal["pad", "shift"]
EMPTY_RANGE = 1 << 61
BLOCKS_CACHED = 1 << 14
"""Neighbouring chunks share all but one of their axis blocks."""


@dataclass(frozen=True, slots=True)
class AxisGrid:
    """The patches of one grid along one axis, in rising order of their starts.

    Patch k reads `[start(k), start(k) + patch)` and speaks for the `kept` voxels from
    `start(k) + lead`. Only patches `[first_kept, end_kept)` meet the volume `[0, volume)`.
    """

    volume: int
    patch: int
    kept: int
    lead: int
    stride: int
    first: int
    last: int
    count: int

    @classmethod
    def create(
        cls,
        *,
        volume: int,
        patch: int,
        kept: int,
        lead: int,
        stride: int,
        pad: int,
        offset: int,
        edge: Edge,
    ) -> AxisGrid:
        """Lay patches from `offset - pad` on, up to the first that reaches `volume + pad`.

        With `edge == "shift"` that last one, unless it is also the first, ends exactly there.
        """
        first = offset - pad
        count = max(0, -(-(volume + pad - patch - first) // stride)) + 1
        last = first + (count - 1) * stride
        if edge == "shift" and count > 1:
            last = volume + pad - patch
        return cls(volume, patch, kept, lead, stride, first, last, count)

    @overload
    def start(self, number: int) -> int: ...
    @overload
    def start(self, number: IntArray) -> IntArray: ...
    def start(self, number: int | IntArray) -> int | IntArray:
        """Return where input patch `number` starts; may lie outside the volume."""
        if isinstance(number, int):
            return self.last if number == self.count - 1 else self.first + number * self.stride
        regular = self.first + number * self.stride
        return np.where(number == self.count - 1, self.last, regular).astype(np.int64)

    def count_below(self, position: IntArray) -> IntArray:
        """Return how many patches have kept voxels that start before `position`."""
        origin = self.first + self.lead
        regular = np.clip(-(-(position - origin) // self.stride), 0, self.count - 1)
        return regular + (self.last + self.lead < position)

    @property
    def first_kept(self) -> int:
        """Number of the first patch whose kept voxels meet the volume."""
        return int(self.count_below(np.asarray(1 - self.kept)))

    @property
    def end_kept(self) -> int:
        """One past the last patch whose kept voxels meet the volume."""
        return max(self.first_kept, int(self.count_below(np.asarray(self.volume))))

    def owned(self, block: IntArray, size: int) -> tuple[IntArray, IntArray]:
        """Return the range of patches whose kept voxels, clipped, start in block `block`.

        Blocks are `size` wide from 0 on. The ranges of all blocks cut
        `[first_kept, end_kept)` without gap or overlap.
        """
        low = np.where(block == 0, self.first_kept, self.count_below(block * size))
        low = np.clip(low, self.first_kept, self.end_kept)
        high = np.clip(self.count_below((block + 1) * size), low, self.end_kept)
        return low, high

    def touching(self, start: int, stop: int) -> range:
        """Return the numbers of the patches whose kept voxels meet `[start, stop)`."""
        low = int(self.count_below(np.asarray(start - self.kept + 1)))
        high = int(self.count_below(np.asarray(stop)))
        return range(low, max(low, high))

    def gap(self) -> int | None:
        """Return a voxel between the first and the last kept patch that none covers, or None."""
        low, high = self.first_kept, self.end_kept
        if high - low > 1:
            for number in (low, high - 2):
                end = self.start(number) + self.lead + self.kept
                if self.start(number + 1) + self.lead > end:
                    return end
        return None

    def span(self) -> tuple[int, int]:
        """Return the range of volume voxels from the first to the last kept patch."""
        if self.first_kept == self.end_kept:
            return 0, 0
        low = self.start(self.first_kept) + self.lead
        high = self.start(self.end_kept - 1) + self.lead + self.kept
        return max(0, low), min(self.volume, high)


@dataclass(frozen=True, slots=True)
class AxisBlock:
    """One block along one axis, in voxels: its range, its bands, its halo, the patches it owns.

    `halo` is empty where no patch is owned; `owned[g]` numbers the patches of grid g.
    """

    start: int
    stop: int
    band: int
    aligned_band: int
    upper_overlap: int
    halo: tuple[int, int]
    owned: tuple[range, ...]


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the volume cut into blocks, with the patches of every grid along it.

    Invariant: a patch owned by a block ends in that block or in the next one.
    """

    volume: int
    chunk: int
    storage: int
    grids: tuple[AxisGrid, ...]
    pad_mode: PadMode

    @property
    def blocks(self) -> int:
        """Number of blocks; they cover `[0, volume)` exactly once."""
        return -(-self.volume // self.chunk)

    def block(self, number: int) -> AxisBlock:
        """Return one block."""
        return _axis_block(self, number)

    def start(self, block: IntArray) -> IntArray:
        """Return where each block starts."""
        return block * self.chunk

    def stop(self, block: IntArray) -> IntArray:
        """Return where each block ends; the last one at the volume's end."""
        return np.minimum((block + 1) * self.chunk, self.volume)

    def upper_overlap(self, block: IntArray) -> IntArray:
        """Return how far the patches a block owns reach into the next block, in voxels."""
        reach = self.stop(block)
        for grid in self.grids:
            low, high = grid.owned(block, self.chunk)
            end = np.minimum(grid.start(high - 1) + grid.lead + grid.kept, self.volume)
            reach = np.maximum(reach, np.where(high > low, end, 0))
        stop = self.stop(block)
        return np.where(stop < self.volume, reach - stop, 0)

    def band(self, block: IntArray) -> IntArray:
        """Return how many voxels at a block's low side the block below reaches into."""
        below: IntArray = np.maximum(block - 1, 0)
        return np.where(block > 0, self.upper_overlap(below), 0)

    def aligned_band(self, block: IntArray) -> IntArray:
        """Return the band rounded up to whole storage chunks, within the block."""
        rounded: IntArray = -(-self.band(block) // self.storage) * self.storage
        length = self.stop(block) - self.start(block)
        return np.where(rounded < length, rounded, length)

    def halo(self, block: IntArray) -> tuple[IntArray, IntArray]:
        """Return the window of input the owned patches read; empty where none is owned."""
        low = np.full_like(block, EMPTY_RANGE)
        high = np.full_like(block, -EMPTY_RANGE)
        for grid in self.grids:
            begin, end = grid.owned(block, self.chunk)
            some = end > begin
            low = np.where(some, np.minimum(low, grid.start(begin)), low)
            high = np.where(some, np.maximum(high, grid.start(end - 1) + grid.patch), high)
        none = low == EMPTY_RANGE
        return np.where(none, 0, low), np.where(none, 0, high)

    def read(self, block: IntArray) -> tuple[IntArray, IntArray]:
        """Return the range of real voxels behind the halo."""
        return source_range(*self.halo(block), self.volume, self.pad_mode)


@lru_cache(maxsize=BLOCKS_CACHED)
def _axis_block(axis: Axis, number: int) -> AxisBlock:
    block = np.asarray(number, dtype=np.int64)
    low, high = axis.halo(block)
    return AxisBlock(
        start=int(axis.start(block)),
        stop=int(axis.stop(block)),
        band=int(axis.band(block)),
        aligned_band=int(axis.aligned_band(block)),
        upper_overlap=int(axis.upper_overlap(block)),
        halo=(int(low), int(high)),
        owned=tuple(
            range(*(int(end) for end in grid.owned(block, axis.chunk))) for grid in axis.grids
        ),
    )
