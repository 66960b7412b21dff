"""The plan of a job: chunks, patches, pieces and costs, computed on demand and without I/O.

A chunk owns the patches whose kept voxels, clipped to the volume, start in its block. Each patch is
therefore computed exactly once, and a chunk's patches end in its block or in the next block along
each axis. The band of a block is the part at its low sides that lower neighbors also predict.
Blocks are clipped to the region of the job, if it has one. A plan of several outputs has the
geometry of the widest one, in voxels of the input; `Plan.of_output` has that of each.
See docs/design.md, sections "Geometry" and "Blocks and pieces".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, cached_property
from itertools import islice, product
from math import prod
from operator import getitem, sub
from typing import Any

import numpy as np

from chunkq.geometry.box import Box
from chunkq.geometry.grid_spec import GridSpec
from chunkq.geometry.grids import AxisBlock, AxisGeometry, AxisPatch
from chunkq.plan.batches import NeededBatches, along, needed_batches, window
from chunkq.plan.chunk import Chunk, Index, Patch, Piece, shared_offsets
from chunkq.plan.costs import Costs, costs_of
from chunkq.plan.outputs import Head, OutputSpec
from chunkq.plan.volume import Volume
from chunkq.summaries import html_table, lengths, one_line


@dataclass(frozen=True)
class Plan:
    """The chunks, patches, pieces and costs of one item of a job.

    `grid` determines the geometry, `outputs` what is stored of each prediction. `volume` has the
    shape of the grid. If the grid has a region, the output has only its voxels.

    Chunks, blocks, patches and who owns them are the same for all outputs. What an output stores of
    them, in its own voxels, is that of the plan `of_output`: the boxes of chunks and pieces, the
    targets of patches, the shapes and boxes of the stored array, the blend weights. A plan without
    outputs, that of a list of images, has chunks of rows only.
    """

    volume: Volume
    grid: GridSpec
    outputs: tuple[OutputSpec, ...]

    def __repr__(self) -> str:
        return one_line("Plan", self._summary())

    def _repr_html_(self) -> str:
        return html_table("Plan", self._summary())

    def _summary(self) -> dict[str, str]:
        return {
            "volume": f"{lengths(self.volume.shape)} {self.volume.dtype}",
            **({"region": lengths(self.region.shape)} if self.grid.region else {}),
            "patch": lengths(self.input_patch),
            "strides": lengths(self.grid.strides),
            "chunks": f"{self.costs.chunks} of {lengths(self.chunksize)}",
            "patches": str(self.costs.patches),
            **{
                f"output {view.output.name}".rstrip(): (
                    f"{lengths(view.output_shape)} {view.output_dtype}"
                )
                for view in self.views
            },
        }

    @property
    def axes(self) -> tuple[AxisGeometry, ...]:
        """The blocks and patches along each axis."""
        return self.grid.axes

    @property
    def region(self) -> Box:
        """Voxels of the volume that are computed: those of the output."""
        return self.grid.region or Box.of_shape(self.volume.shape)

    @property
    def output(self) -> OutputSpec:
        """The only output. Raises ValueError if there are several; see `of_output`."""
        if len(self.outputs) != 1:
            raise ValueError("the plan has several outputs")
        return self.outputs[0]

    def of_output(self, number: int) -> Plan:
        """Return the plan of one output, in voxels of that output.

        It has the same chunks and patches, with the same indices and numbers. It is this plan if
        the output is the only one and has no grid of its own.
        """
        return self.views[number]

    @cached_property
    def views(self) -> tuple[Plan, ...]:
        """The plan of each output; see `of_output`."""
        return tuple(map(self._view, self.outputs))

    def _view(self, output: OutputSpec) -> Plan:
        is_own = bool(output.patch or output.storage or output.shard or output.scale)
        if len(self.outputs) == 1 and not is_own:
            return self
        grid = self.grid.of_output(
            output.scale or (Fraction(1),) * self.rank,
            output.patch or self.output_patch,
            output.storage or self.storage_chunks,
            output.shard or (None if output.storage else self.grid.shard),
        )
        if grid == self.grid:
            grid = self.grid
        volume = replace(self.volume, shape=grid.shape)
        return Plan(volume, grid, (replace(output, patch=(), storage=(), shard=(), scale=()),))

    def own_patches(self, plan: Plan, patches: Sequence[Patch]) -> Sequence[Patch]:
        """Return patches of a plan with the boxes that they have in this plan, a view of it."""
        if self.grid is plan.grid:
            return patches
        along = [cache(axis.patch_at) for axis in self.axes]  # patches share positions
        return [
            _patch(
                patch.grid, [at(patch.grid, n) for at, n in zip(along, patch.numbers, strict=True)]
            )
            for patch in patches
        ]

    @cached_property
    def heads(self) -> tuple[Head, ...]:
        """The different arrays of the network's return value that the outputs use, in order."""
        heads = {
            output.head: Head(output.head, output.returned_channels, view.output_patch)
            for output, view in zip(self.outputs, self.views, strict=True)
        }
        return tuple(heads.values())

    @property
    def stored_voxels(self) -> int:
        """Number of voxels of all outputs."""
        return sum(view.region.size for view in self.views)

    @property
    def input_patch(self) -> tuple[int, ...]:
        """Shape of the input patch."""
        return self.grid.patch

    @property
    def output_patch(self) -> tuple[int, ...]:
        """Shape of the output patch."""
        return self.grid.output_patch

    @property
    def margin(self) -> tuple[int, ...]:
        """Voxels that are cropped from each side of the output patch."""
        return self.grid.margin

    @property
    def channels(self) -> int:
        """Number of channels of a prediction of the only output."""
        return self.output.channels

    @property
    def channel_axis(self) -> bool:
        """Whether the channels are the first axis of the output."""
        return self.output.channel_axis

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.axes)

    @property
    def chunksize(self) -> tuple[int, ...]:
        """Block shape in voxels; the outer blocks along an axis can be smaller."""
        return self.grid.chunk

    @property
    def storage_chunks(self) -> tuple[int, ...]:
        """Shape of an output storage chunk along the spatial axes."""
        return self.grid.storage

    @property
    def storage_shards(self) -> tuple[int, ...] | None:
        """Shape of a shard of the output along the spatial axes; None without shards."""
        return self.grid.shard

    @property
    def blocks(self) -> tuple[int, ...]:
        """Number of blocks along each axis."""
        return tuple(axis.blocks for axis in self.axes)

    @property
    def output_dtype(self) -> np.dtype[Any]:
        """Dtype of the output volume."""
        return self.output.dtype

    @property
    def stored_channels(self) -> int:
        """Number of values stored per voxel of the output."""
        return self.output.stored_channels

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the output: ([C,] *S)."""
        return self.output_box(self.region).shape

    def output_box(self, box: Box) -> Box:
        """Return the box of the output array ([C,] *S) that holds all values of a box of voxels."""
        origin = self.region.start
        start, stop = (
            tuple(n - o for n, o in zip(corner, origin, strict=True))
            for corner in (box.start, box.stop)
        )
        if not self.channel_axis:
            return Box(start, stop)
        return Box((0, *start), (self.channels, *stop))

    @cached_property
    def block_indices(self) -> Box:
        """The indices of the blocks with voxels, which cover the region exactly once."""
        numbers = [axis.numbers for axis in self.axes]
        return Box(tuple(n.start for n in numbers), tuple(n.stop for n in numbers))

    @cached_property
    def index_bounds(self) -> Box:
        """The smallest box of indices with all blocks and all active chunks."""
        boxes = [self.block_indices, *self.active]
        starts = zip(*(box.start for box in boxes), strict=True)
        stops = zip(*(box.stop for box in boxes), strict=True)
        return Box(tuple(map(min, starts)), tuple(map(max, stops)))

    def indices(self) -> Iterator[Index]:
        """Yield the index of every block and every active chunk in C order (last axis fastest)."""
        return product(*map(range, self.index_bounds.start, self.index_bounds.stop))

    @cached_property
    def active(self) -> tuple[Box, ...]:
        """The indices of the chunks that compute a patch, as disjoint boxes of indices.

        These own a patch that predicts voxels of the region. Along each axis the blocks that own
        such patches of a grid follow each other.
        """
        by_grid = []
        for g in range(len(self.axes[0].grids)):
            owners = [
                axis.grids[g].owners(axis.chunk, axis.grids[g].reaching(axis.low, axis.high))
                for axis in self.axes
            ]
            by_grid.append(Box(tuple(o.start for o in owners), tuple(o.stop for o in owners)))
        disjoint: list[Box] = []
        for box in sorted(by_grid, key=lambda box: -box.size):
            rest = [box]
            for other in disjoint:
                rest = [part for outer in rest for part in outer.minus(other)]
            disjoint += [part for part in rest if part.size]
        return tuple(disjoint)

    def is_active(self, index: Index) -> bool:
        """Return whether the chunk at `index` exists and computes a patch."""
        return any(
            all(low <= i < high for low, i, high in zip(box.start, index, box.stop, strict=True))
            for box in self.active
        )

    def active_indices(self) -> Iterator[Index]:
        """Yield the index of every chunk that computes a patch in C order (last axis fastest)."""
        if len(self.active) == 1:
            (box,) = self.active
            return product(*map(range, box.start, box.stop))
        return filter(self.is_active, self.indices())

    def count_patches(self, chunks: Sequence[Index]) -> int:
        """Return the number of patches that chunks compute together.

        Indices of chunks that do not exist count as chunks without patches.
        """
        indices = np.array([i for i in chunks if len(i) == self.rank], np.int64)
        indices = indices.reshape(-1, self.rank)
        if not self.is_whole:
            return sum(self._batches(self._parts(index)).patches for index in indices.tolist())
        total = np.zeros(len(indices), np.int64)
        for g in range(len(self.axes[0].grids)):
            patches = np.ones(len(indices), np.int64)
            for axis, numbers in zip(self.axes, indices.T, strict=True):
                low, high = axis.grids[g].owned(numbers, axis.chunk)
                patches *= high - low
            total += patches
        return int(total.sum())

    @cached_property
    def is_whole(self) -> bool:
        """Whether every chunk computes all patches that it owns.

        Else the region needs only some of the patches of the chunks at its sides.
        """
        return all(axis.all_needed for axis in self.axes)

    def _parts(self, index: Sequence[int]) -> list[AxisBlock]:
        return [axis.block(i) for axis, i in zip(self.axes, index, strict=True)]

    def _batches(self, parts: Sequence[AxisBlock]) -> NeededBatches:
        return needed_batches(tuple(map(along, parts)), self.grid.batch)

    def chunk(self, index: Index) -> Chunk:
        """Return the chunk at `index`."""
        parts = self._parts(index)
        start, stop = tuple(p.start for p in parts), tuple(p.stop for p in parts)
        overlap = tuple(p.upper_overlap for p in parts)
        region = Box(start, tuple(b + o for b, o in zip(stop, overlap, strict=True)))
        owned = tuple(tuple(p.owned[g] for p in parts) for g in range(len(self.axes[0].grids)))
        windows = [p.halo for p in parts]
        if self.is_whole:
            count = sum(prod(map(len, ranges)) for ranges in owned)
            runs: tuple[range, ...] = (range(count),) if count else ()
        else:
            batches = self._batches(parts)
            runs = batches.runs
            windows = [
                window(axis, part, a, batches) if runs else (0, 0)
                for a, (axis, part) in enumerate(zip(self.axes, parts, strict=True))
            ]
        halo = Box(tuple(low for low, _ in windows), tuple(high for _, high in windows))
        if self.grid.region is not None and runs:
            region = self._with_predicted(region, halo)
        return Chunk(
            index=index,
            block=Box(start, stop),
            interior=Box(tuple(p.start + p.band for p in parts), stop),
            core=Box(tuple(p.start + p.aligned_band for p in parts), stop),
            overlap=overlap,
            region=region,
            halo=halo,
            owned=owned,
            runs=runs,
        )

    def _with_predicted(self, region: Box, halo: Box) -> Box:
        """Return the smallest box with a region and the voxels that patches of a halo predict."""
        start, stop = [], []
        for a, axis in enumerate(self.axes):
            lead, kept = self.grid.lead[a], self.grid.kept[a]
            tail = self.input_patch[a] - lead - kept
            start.append(min(region.start[a], max(0, halo.start[a] + lead)))
            stop.append(max(region.stop[a], min(axis.volume, halo.stop[a] - tail)))
        return Box(tuple(start), tuple(stop))

    def patches(self, chunk: Chunk) -> Iterator[Patch]:
        """Yield the patches of a chunk, grid by grid, each grid in C order (last axis fastest).

        A chunk that needs some of its patches yields those of whole batches.
        """
        owned = (
            (g, patch) for g, ranges in enumerate(chunk.owned) for patch in self._along(g, ranges)
        )
        position = 0
        for run in chunk.runs:
            for g, place in islice(owned, run.start - position, run.stop - position):
                yield _patch(g, place)
            position = run.stop

    def _along(self, g: int, ranges: Sequence[range]) -> Iterator[tuple[AxisPatch, ...]]:
        """Yield the patches of a grid with these numbers along the axes, in C order."""
        return product(
            *(
                [axis.patch_at(g, number) for number in numbers]
                for axis, numbers in zip(self.axes, ranges, strict=True)
            )
        )

    def patch(self, g: int, numbers: tuple[int, ...]) -> Patch:
        """Return a patch by its grid and its number along each axis."""
        return _patch(g, [axis.patch_at(g, k) for axis, k in zip(self.axes, numbers, strict=True)])

    def outgoing_pieces(self, chunk: Chunk) -> list[Piece]:
        """Return the pieces that a chunk stores for its upper neighbors, in a fixed order."""
        if not chunk.is_active:
            return []
        return [
            Piece(chunk.index, target, box)
            for up in shared_offsets(chunk.overlap)
            for target, box in [self._upper_neighbor(chunk, up)]
            if box.size
        ]

    def incoming_pieces(self, chunk: Chunk) -> list[Piece]:
        """Return the pieces that lower neighbors store for a chunk's block, in a fixed order."""
        block, inner = chunk.block, chunk.interior.start
        stops = tuple(zip(block.stop, inner, strict=True))
        return [
            Piece(source, chunk.index, Box(block.start, tuple(map(getitem, stops, up))))
            for source, up in self._sources(chunk.index)
        ]

    def _sources(self, index: Index) -> Iterator[tuple[Index, Index]]:
        """Yield the chunks that predict a part of the block above them, in a fixed order.

        With each is an offset, which has a 1 for each axis along which the block is above it.
        """
        parts = self._parts(index)
        if any(part.start == part.stop for part in parts):
            return
        for up in shared_offsets(part.band for part in parts):
            source = tuple(map(sub, index, up))
            if self.is_active(source):
                yield source, up

    def contributors(self, index: Index) -> list[Index]:
        """Return the chunks that must be committed before the block can be finalized.

        The block's own chunk is the first one if it owns a patch.
        """
        own = [index] if self.is_active(index) else []
        return own + [source for source, _ in self._sources(index)]

    def has_band(self, index: Index) -> bool:
        """Return whether the block has a band and must therefore be finalized."""
        parts = [axis.block(i) for axis, i in zip(self.axes, index, strict=True)]
        return any(part.band for part in parts) and all(part.start < part.stop for part in parts)

    def to_finalize(self) -> Iterator[Index]:
        """Yield the blocks that have a band in C order (last axis fastest)."""
        box, has_band = self.block_indices, []
        for axis in self.axes:
            numbers = np.arange(axis.numbers.start, axis.numbers.stop, dtype=np.int64)
            has_band.append((axis.band(numbers) > 0).tolist())
        for index in product(*map(range, box.start, box.stop)):
            if any(
                flags[i - low] for flags, i, low in zip(has_band, index, box.start, strict=True)
            ):
                yield index

    @cached_property
    def costs(self) -> Costs:
        """Exact totals over all chunks. Takes time linear in the blocks along one axis."""
        return costs_of(self)

    def _upper_neighbor(self, chunk: Chunk, up: Index) -> tuple[Index, Box]:
        """Return the index of an upper neighbor and the part of its block that the chunk predicts.

        `up` has a 1 for each axis along which the neighbor is one block above the chunk.
        """
        target = tuple(i + u for i, u in zip(chunk.index, up, strict=True))
        block = chunk.block
        start = tuple(
            high if u else low for u, low, high in zip(up, block.start, block.stop, strict=True)
        )
        stop = tuple(
            high + overlap if u else high
            for u, high, overlap in zip(up, block.stop, chunk.overlap, strict=True)
        )
        return target, Box(start, stop)


def _patch(g: int, along: Sequence[AxisPatch]) -> Patch:
    """Return the patch of a grid that lies so along each axis."""
    numbers, starts, stops, lows, highs = zip(*along, strict=True)
    return Patch(g, numbers, Box(starts, stops), Box(lows, highs))
