"""Chunks, their patches and their pieces, as a plan describes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, product

from chunkq.geometry.box import Box

Index = tuple[int, ...]
"""Number of a chunk, or of its block, along each axis."""


@dataclass(frozen=True, slots=True)
class Patch:
    """One patch: its grid and its number along each axis.

    `source` is the input window. `target` holds the kept voxels inside the volume, those that the
    patch predicts. It can be empty in the plan of an output that is narrower than others.
    """

    grid: int
    numbers: tuple[int, ...]
    source: Box
    target: Box


@dataclass(frozen=True, slots=True)
class Piece:
    """Partial sums that chunk `source` stores for block `target`.

    `box` is the part of the target's block that they cover. `name` is unique among the pieces of
    one target.
    """

    source: Index
    target: Index
    box: Box

    @property
    def name(self) -> str:
        """One digit per axis: 1 if the target is one block above the source, else 0."""
        return "".join(str(t - s) for s, t in zip(self.source, self.target, strict=True))


@dataclass(frozen=True, slots=True)
class Chunk:
    """One unit of work.

    block      output voxels that the chunk owns; empty outside of the region of the job
    interior   part of the block that no other chunk predicts; ends where the block ends
    core       part of the interior whose storage chunks contain no voxel of the band; ends where
               the block ends
    overlap    number of voxels of the next block along each axis that its patches predict
    region     voxels for which it has sums: the block and the overlap. For a region of the volume,
               also the voxels outside of it that its patches predict
    halo       input window of its patches; can extend beyond the volume
    owned      `owned[g][a]` is the range of its patch numbers of grid g along axis a
    runs       positions of the patches that it computes among those that it owns; all of them,
               unless the job has a region
    """

    index: Index
    block: Box
    interior: Box
    core: Box
    overlap: Index
    region: Box
    halo: Box
    owned: tuple[tuple[range, ...], ...]
    runs: tuple[range, ...]

    @property
    def is_active(self) -> bool:
        """Return whether the chunk computes a patch; if not, its whole block is band.

        Only active chunks are tasks.
        """
        return bool(self.runs)

    @property
    def patches(self) -> int:
        """Number of patches that the chunk computes."""
        return sum(map(len, self.runs))

    @property
    def has_band(self) -> bool:
        """Return whether other chunks contribute to the block, which must then be finalized."""
        return self.block.size > 0 and self.interior != self.block

    @property
    def band_boxes(self) -> tuple[Box, ...]:
        """The band as disjoint boxes: the block without its interior."""
        return tuple(self.block.without_corner(self.interior.start))

    @property
    def rest_boxes(self) -> tuple[Box, ...]:
        """The interior voxels whose storage chunks contain band voxels, as disjoint boxes."""
        return tuple(self.interior.without_corner(self.core.start))

    @property
    def touched_boxes(self) -> tuple[Box, ...]:
        """The storage chunks that contain band voxels, as disjoint boxes: block without core."""
        return tuple(self.block.without_corner(self.core.start))


def shared_offsets(shared: Iterable[int]) -> Iterator[Index]:
    """Yield the offsets to upper neighbors with which a chunk shares voxels.

    They are the non-empty sets of axes as tuples of 0 and 1, in binary counting order. `shared` has
    the number of shared voxels along each axis.
    """
    offsets = product(*((0, 1) if voxels else (0,) for voxels in shared))
    return islice(offsets, 1, None)
