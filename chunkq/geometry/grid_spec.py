"""Geometry of one image: its patches, chunks and storage chunks, as numbers alone."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil

from chunkq.geometry.box import Box
from chunkq.geometry.grids import AxisGeometry, AxisGrid, Edge
from chunkq.geometry.padding import PadMode

Shape = tuple[int, ...]
Scale = tuple[Fraction, ...]
"""Voxels of the input per voxel of an output, one factor per spatial axis."""


@dataclass(frozen=True)
class GridSpec:
    """Where the patches, chunks and storage chunks of an image lie.

    All tuples have one entry per spatial axis, in voxels. See docs/design.md, section "Geometry".
    Where a job has several outputs, the grid of the plan is that of the widest one, in voxels of
    the input. `of_output` returns that of each output, in its own voxels.

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
    region         voxels of the output; None for the whole image
    batch          patches in a batch; a chunk that needs some of its patches for the region runs
                   whole batches
    reach          voxels by which the widest output extends beyond the kept ones on each side; it
                   decides which block owns a patch. None for 0
    alignment      a region that starts at multiples of these has the blocks of the whole image;
                   None for the shards or storage chunks
    unit           the last patch that `edge` `shift` moves starts at a multiple of this; None for 1
    scale          voxels of the input per voxel of this grid; None for 1
    shard          shape of a shard of the output, a whole number of storage chunks; None without
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
    reach: Shape | None = None
    alignment: Shape | None = None
    unit: Shape | None = None
    scale: Scale | None = None
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
        return not any(n % s for n, s in zip(self.region.start, self.aligned_steps, strict=True))

    @property
    def aligned_steps(self) -> Shape:
        """Multiples at which a region starts that has the blocks of the whole image."""
        return self.alignment or self.written

    def of_output(
        self, scale: Scale, patch: Shape, storage: Shape, shard: Shape | None = None
    ) -> GridSpec:
        """Return the same patches and blocks in voxels of an output, of which each is `scale` long.

        `patch` is the output patch, `storage` a storage chunk and `shard` a shard, in voxels of the
        output. The patches, chunks, margins, steps and the starts of regions of this grid are
        multiples of `scale`.
        """

        def scaled(lengths: Shape) -> Shape:
            return tuple(_exact(n / s) for n, s in zip(lengths, scale, strict=True))

        def rounded_up(lengths: Shape) -> Shape:
            return tuple(ceil(n / s) for n, s in zip(lengths, scale, strict=True))

        region, inner = self.region, scaled(self.patch)
        if region is not None:
            region = Box(scaled(region.start), rounded_up(region.stop))
        margin, widest = scaled(self.margin), scaled(self.output_patch)
        steps = scaled(self.aligned_steps)
        return GridSpec(
            shape=rounded_up(self.shape),
            patch=inner,
            output_patch=patch,
            margin=margin,
            strides=scaled(self.strides),
            pads=scaled(self.pads),
            offsets=tuple(map(scaled, self.offsets)),
            edge=self.edge,
            pad_mode=self.pad_mode,
            chunk=scaled(self.chunk),
            storage=storage,
            region=region,
            batch=self.batch,
            reach=_unless(0, tuple((w - q) // 2 for w, q in zip(widest, patch, strict=True))),
            alignment=None
            if (steps := scaled(self.aligned_steps)) == (shard or storage)
            else steps,
            unit=_unless(1, scaled(self.unit or (1,) * self.rank)),
            scale=None if set(scale) == {1} else scale,
            shard=shard,
        )

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
                reach=self.reach[a] if self.reach else 0,
                unit=self.unit[a] if self.unit else 1,
            )
            for offset in self.offsets
        )
        return AxisGeometry(
            self.shape[a], self.chunk[a], self.written[a], grids, self.pad_mode, low, high
        )


def _unless(default: int, lengths: Shape) -> Shape | None:
    """Return lengths, or None if all have the default."""
    return None if set(lengths) == {default} else lengths


def _exact(length: Fraction | float) -> int:
    """Return a length that is a whole number. Raises ValueError if it is not."""
    if length != int(length):
        raise ValueError(f"{length} is no whole number of voxels of the output")
    return int(length)
