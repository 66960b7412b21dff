"""Patch positions and block ownership along one axis, in integers.

Every value is a closed form of the patch number or the block number, so memory and time do not
depend on the length of the axis. Functions of block or patch numbers work elementwise on int64
arrays of any shape, also 0-d.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, overload

import numpy as np

from chunkq.geometry.padding import IntArray, PadMode, source_range

Edge = Literal["pad", "shift"]
EMPTY_RANGE = 1 << 61
"""Start of a range without elements; larger than any position."""
BLOCKS_CACHED = 1 << 14
"""Entries in the cache of axis blocks; adjacent chunks share all but one of them."""


class AxisPatch(NamedTuple):
    """One patch along one axis.

    It reads `[start, stop)`, which can extend beyond the volume. `[low, high)` are its kept voxels
    inside the volume; there can be none.
    """

    number: int
    start: int
    stop: int
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class AxisGrid:
    """The patches of one grid along one axis, by ascending start.

    Patch k reads `[start(k), start(k) + patch)` and predicts the `kept` voxels from
    `start(k) + lead` on. Blocks cover the part `[low, high)` of the volume `[0, volume)`. The
    widest output of the job has `reach` voxels more on both sides. It decides which block owns a
    patch. Only patches `[first_kept, end_kept)` predict voxels of that part, of the widest output.
    """

    volume: int
    patch: int
    kept: int
    lead: int
    stride: int
    first: int
    last: int
    count: int
    low: int
    high: int
    reach: int = 0

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
        part: tuple[int, int] | None = None,
        reach: int = 0,
        unit: int = 1,
    ) -> AxisGrid:
        """Return the grid whose first patch starts at `offset - pad`.

        Its last patch is the first one that reaches `volume + pad`. With `edge == "shift"` the last
        patch is moved back to end exactly there, or at the next multiple of `unit`, unless it is
        also the first. Blocks cover the range `part` of the volume, by default all of it.
        """
        first = offset - pad
        count = max(0, -(-(volume + pad - patch - first) // stride)) + 1
        last = first + (count - 1) * stride
        if edge == "shift" and count > 1:
            last = -(-(volume + pad - patch) // unit) * unit
        low, high = part or (0, volume)
        return cls(volume, patch, kept, lead, stride, first, last, count, low, high, reach)

    @overload
    def start(self, number: int) -> int: ...
    @overload
    def start(self, number: IntArray) -> IntArray: ...
    def start(self, number: int | IntArray) -> int | IntArray:
        """Return the first voxel of input patch `number`; it can lie outside the volume."""
        if isinstance(number, int):
            return self.last if number == self.count - 1 else self.first + number * self.stride
        regular = self.first + number * self.stride
        return np.where(number == self.count - 1, self.last, regular).astype(np.int64)

    def kept_in_volume(self, number: int) -> tuple[int, int]:
        """Return the range of the kept voxels of a patch inside the volume; it can be empty."""
        start = self.start(number) + self.lead
        low = min(max(0, start), self.volume)
        return low, max(low, min(start + self.kept, self.volume))

    def patch_at(self, number: int) -> AxisPatch:
        """Return patch `number`."""
        start = self.start(number)
        return AxisPatch(number, start, start + self.patch, *self.kept_in_volume(number))

    def count_below(self, position: IntArray, reach: int = 0) -> IntArray:
        """Return the number of patches whose kept voxels start before `position`.

        With `reach`, as many voxels before the kept ones count as kept.
        """
        lead = self.lead - reach
        regular = np.clip(-(-(position - self.first - lead) // self.stride), 0, self.count - 1)
        return regular + (self.last + lead < position)

    @property
    def first_kept(self) -> int:
        """Number of the first patch that predicts voxels of `[low, high)`, of the widest output."""
        return self.reaching(self.low, self.high).start

    @property
    def end_kept(self) -> int:
        """One past the number of the last patch that predicts voxels of `[low, high)`."""
        return self.reaching(self.low, self.high).stop

    def owned(self, block: IntArray, size: int | IntArray) -> tuple[IntArray, IntArray]:
        """Return the range of patches that block `block` owns.

        A block owns the patches whose kept voxels of the widest output, clipped to `[low, high)`,
        start in it. Blocks are `size` voxels long, the first starts at `low`. The ranges of all
        blocks partition `[first_kept, end_kept)`.
        """
        kept, start = self.reaching(self.low, self.high), self.low + block * size
        low = np.where(block == 0, kept.start, self.count_below(start, self.reach))
        low = np.clip(low, kept.start, kept.stop)
        high = np.clip(self.count_below(start + size, self.reach), low, kept.stop)
        return low, high

    def owners(self, size: int, numbers: range | None = None) -> range:
        """Return the blocks of `size` voxels from the first to the last that owns a patch.

        Only the patches `numbers` count, by default all that predict voxels of `[low, high)`. Every
        block between them owns one if the patches leave no gap and `size` is at least the length of
        the kept voxels.
        """
        if numbers is None:
            numbers = self.reaching(self.low, self.high)
        if not numbers:
            return range(0)
        lead = self.lead - self.reach
        first = max(0, self.start(numbers[0]) + lead - self.low)
        last = max(0, self.start(numbers[-1]) + lead - self.low)
        return range(first // size, last // size + 1)

    def touching(self, start: int, stop: int) -> range:
        """Return the numbers of the patches whose kept voxels intersect `[start, stop)`."""
        return self._intersecting(start, stop, 0)

    def reaching(self, start: int, stop: int) -> range:
        """Return the patches whose kept voxels of the widest output intersect `[start, stop)`."""
        return self._intersecting(start, stop, self.reach)

    def _intersecting(self, start: int, stop: int, reach: int) -> range:
        low = int(self.count_below(np.asarray(start - self.kept - 2 * reach + 1), reach))
        high = int(self.count_below(np.asarray(stop), reach))
        return range(low, max(low, high))

    def gap(self, start: int = 0, stop: int | None = None) -> int | None:
        """Return a voxel of `[start, stop)` without a patch, between voxels with one, or None.

        `stop` is by default the end of the volume.
        """
        numbers = self.touching(start, self.volume if stop is None else stop)
        if len(numbers) > 1:
            for number in (numbers[0], numbers[-2]):
                end = self.start(number) + self.lead + self.kept
                if self.start(number + 1) + self.lead > end:
                    return end
        return None

    def span(self, start: int = 0, stop: int | None = None) -> tuple[int, int]:
        """Return the range from the first to the last voxel of `[start, stop)` that has a patch.

        `stop` is by default the end of the volume. The range is (start, start) if there is none.
        """
        stop = self.volume if stop is None else stop
        numbers = self.touching(start, stop)
        if not numbers:
            return start, start
        low = self.start(numbers[0]) + self.lead
        high = self.start(numbers[-1]) + self.lead + self.kept
        return max(start, low), min(stop, high)


@dataclass(frozen=True, slots=True)
class AxisBlock:
    """One block along one axis; all lengths are in voxels.

    `band` and `aligned_band` start at the block's low side, `upper_overlap` at its stop. `owned[g]`
    holds the numbers of its patches of grid g, `needed[g]` those of them that predict voxels of the
    region. `halo` is the input window of the needed ones, empty if there is none.
    """

    start: int
    stop: int
    band: int
    aligned_band: int
    upper_overlap: int
    halo: tuple[int, int]
    owned: tuple[range, ...]
    needed: tuple[range, ...]


@dataclass(frozen=True, slots=True)
class AxisGeometry:
    """One axis of the volume: its blocks, and the patches of every grid along it.

    Blocks are clipped to the region `[low, high)` of the volume. A block is `chunk` voxels long, a
    storage chunk or shard of the output `storage` voxels. Invariant: the kept voxels of a patch end
    in the block that owns it or in the next one.
    """

    volume: int
    chunk: int
    storage: int
    grids: tuple[AxisGrid, ...]
    pad_mode: PadMode
    low: int
    high: int

    @property
    def origin(self) -> int:
        """First voxel of block 0, before it is clipped."""
        return self.grids[0].low

    @property
    def numbers(self) -> range:
        """Numbers of the blocks with voxels; they cover `[low, high)` exactly once."""
        first = (self.low - self.origin) // self.chunk
        return range(first, -(-(self.high - self.origin) // self.chunk))

    @property
    def blocks(self) -> int:
        """Number of blocks with voxels."""
        return len(self.numbers)

    def block(self, number: int) -> AxisBlock:
        """Return block `number`; one outside of `numbers` is empty."""
        return _axis_block(self, number)

    def patch_at(self, g: int, number: int) -> AxisPatch:
        """Return a patch of grid `g`."""
        return self.grids[g].patch_at(number)

    def start(self, block: IntArray) -> IntArray:
        """Return the first voxel of each block."""
        return np.clip(self.origin + block * self.chunk, self.low, self.high)

    def stop(self, block: IntArray) -> IntArray:
        """Return the end of each block, exclusive; the last block ends with the region."""
        return np.clip(self.origin + (block + 1) * self.chunk, self.low, self.high)

    @property
    def active(self) -> range:
        """Blocks from the first to the last that owns a patch which the region needs."""
        owners = [
            grid.owners(self.chunk, grid.reaching(self.low, self.high)) for grid in self.grids
        ]
        starts, stops = [o.start for o in owners if o], [o.stop for o in owners if o]
        return range(min(starts), max(stops)) if starts else range(0)

    def needed(self, grid: AxisGrid, block: IntArray) -> tuple[IntArray, IntArray]:
        """Return the range of the patches owned by each block that predict voxels of the region."""
        low, high = grid.owned(block, self.chunk)
        reaching = grid.reaching(self.low, self.high)
        low = np.clip(low, reaching.start, reaching.stop)
        return low, np.clip(high, low, reaching.stop)

    @property
    def all_needed(self) -> bool:
        """Whether all patches that blocks own predict voxels of the region."""
        return all(
            grid.reaching(self.low, self.high) == range(grid.first_kept, grid.end_kept)
            for grid in self.grids
        )

    def upper_overlap(self, block: IntArray) -> IntArray:
        """Return how many voxels of the next block the patches of each block predict."""
        patches_end = self.stop(block)
        for grid in self.grids:
            low, high = grid.owned(block, self.chunk)
            end = np.minimum(grid.start(high - 1) + grid.lead + grid.kept, self.high)
            patches_end = np.maximum(patches_end, np.where(high > low, end, 0))
        return patches_end - self.stop(block)

    def band(self, block: IntArray) -> IntArray:
        """Return how many voxels at each block's low side the lower neighbor also predicts."""
        below: IntArray = np.maximum(block - 1, 0)
        return np.where(block > 0, self.upper_overlap(below), 0)

    def aligned_band(self, block: IntArray) -> IntArray:
        """Return the band rounded up to whole storage chunks, at most the block's length."""
        rounded: IntArray = -(-self.band(block) // self.storage) * self.storage
        length = self.stop(block) - self.start(block)
        return np.where(rounded < length, rounded, length)

    def halo(self, block: IntArray) -> tuple[IntArray, IntArray]:
        """Return the input window of the patches that the region needs; (0, 0) if there is none."""
        low = np.full_like(block, EMPTY_RANGE)
        high = np.full_like(block, -EMPTY_RANGE)
        for grid in self.grids:
            begin, end = self.needed(grid, block)
            owns_patches = end > begin
            low = np.where(owns_patches, np.minimum(low, grid.start(begin)), low)
            high = np.where(owns_patches, np.maximum(high, grid.start(end - 1) + grid.patch), high)
        is_empty = low == EMPTY_RANGE
        return np.where(is_empty, 0, low), np.where(is_empty, 0, high)

    def read(self, block: IntArray) -> tuple[IntArray, IntArray]:
        """Return the range of the volume's voxels from which the halo is read or padded."""
        return source_range(*self.halo(block), self.volume, self.pad_mode)

    def voxels_read(self, start: int, stop: int) -> int:
        """Return how many voxels are read for the window `[start, stop)`; see `source_range`."""
        low, high = source_range(np.asarray(start), np.asarray(stop), self.volume, self.pad_mode)
        return int(high - low)


@lru_cache(maxsize=BLOCKS_CACHED)
def _axis_block(axis: AxisGeometry, number: int) -> AxisBlock:
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
        needed=tuple(range(*(int(end) for end in axis.needed(grid, block))) for grid in axis.grids),
    )
