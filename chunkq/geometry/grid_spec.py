"""Geometry of one image: its patches, chunks and storage chunks, as numbers alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from chunkq.geometry.box import Box
from chunkq.geometry.grids import AxisGeometry, AxisGrid, Edge
from chunkq.geometry.padding import PadMode

Shape = tuple[int, ...]


@dataclass(frozen=True)
class GridSpec:
    """Where the patches, chunks and storage chunks of an image lie.

    All tuples have one entry per spatial axis, in voxels. See docs/design.md, section "Geometry".

    shape          shape of the image
    patch          shape of the input patch
    output_patch   shape of the output patch, which is centered in the input patch
    margin         voxels that are cropped from each side of the output patch
    strides        step between patches
    pads           voxels by which the first patch starts before the image
    offsets        shift of each grid of patches; the first grid is not shifted
    edge, pad_mode placement of the last patch, and values outside of the image
    chunk          shape of a block, the output voxels of one chunk
    storage        shape of a storage chunk of the output
    shard          shape of a shard of the output, a whole number of storage chunks; None without
    region         voxels of the output; None for the whole image
    batch          patches in a batch; a chunk that needs some of its patches for the region runs
                   whole batches
    """

    shape: Shape
    patch: Shape
    output_patch: Shape
    margin: Shape
    strides: Shape
    pads: Shape
    offsets: tuple[Shape, ...]
    edge: Edge
    pad_mode: PadMode
    chunk: Shape
    storage: Shape
    region: Box | None = None
    batch: int = 1
    shard: Shape | None = None

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.shape)

    @property
    def kept(self) -> Shape:
        """Shape of the output patch without its margin."""
        pairs = zip(self.output_patch, self.margin, strict=True)
        return tuple(q - 2 * m for q, m in pairs)

    @property
    def lead(self) -> Shape:
        """Offset of the kept voxels in the input patch."""
        axes = zip(self.patch, self.output_patch, self.margin, strict=True)
        return tuple((p - q) // 2 + m for p, q, m in axes)

    @property
    def written(self) -> Shape:
        """Shape of what is written at once: a shard, or a storage chunk."""
        return self.shard or self.storage

    @property
    def is_aligned(self) -> bool:
        """Whether the region starts at storage chunks, or shards, of the whole image's output.

        Then blocks, and the patches that they own, are those of the whole image. Else blocks start
        at the region's start.
        """
        if self.region is None:
            return True
        return not any(n % s for n, s in zip(self.region.start, self.written, strict=True))

    @cached_property
    def axes(self) -> tuple[AxisGeometry, ...]:
        """The blocks and the patches of all grids, axis by axis."""
        return tuple(self._axis(a) for a in range(self.rank))

    def _axis(self, a: int) -> AxisGeometry:
        low, high = 0, self.shape[a]
        if self.region is not None:
            low, high = self.region.start[a], self.region.stop[a]
        grids = tuple(
            AxisGrid.create(
                volume=self.shape[a],
                patch=self.patch[a],
                kept=self.kept[a],
                lead=self.lead[a],
                stride=self.strides[a],
                pad=self.pads[a],
                offset=offset[a],
                edge=self.edge,
                part=None if self.is_aligned else (low, high),
            )
            for offset in self.offsets
        )
        return AxisGeometry(
            self.shape[a], self.chunk[a], self.written[a], grids, self.pad_mode, low, high
        )
