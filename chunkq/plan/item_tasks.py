"""Which chunks and blocks of an item are tasks: those that are not known to be empty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from chunkq.geometry.padding import IntArray
from chunkq.plan.chunk import Index
from chunkq.plan.costs import Costs
from chunkq.plan.empty_rule import Bools
from chunkq.plan.plan import Plan

if TYPE_CHECKING:
    from chunkq.plan.object_sizes import Along, ObjectSizes, StoredSize
    from chunkq.plan.patch_counts import Counts


@dataclass(frozen=True)
class ItemTasks:
    """The tasks of an item.

    `counts` says how many patches of each chunk can run, uint32 of the shape of
    `plan.index_bounds`. A chunk without any is *skipped*: it is no task and has no commit record.
    None if every active chunk of the plan is a task.
    """

    plan: Plan
    counts: Counts | None = None

    def is_task(self, index: Index) -> bool:
        """Return whether a chunk is a task of the stage `infer`."""
        if not self.plan.is_active(index):
            return False
        return self.counts is None or bool(self.counts[self._position(index)])

    def chunks(self) -> Iterator[Index]:
        """Yield the chunks that are tasks in C order (last axis fastest)."""
        if self.counts is None:
            return self.plan.active_indices()
        return self._indices(self._is_task)

    def contributors(self, index: Index) -> list[Index]:
        """Return the tasks that must be committed before the block can be finalized."""
        active = self.plan.contributors(index)
        return active if self.counts is None else [one for one in active if self.is_task(one)]

    def blocks(self) -> Iterator[Index]:
        """Yield the blocks with a band and a contributor, in C order (last axis fastest)."""
        if self.counts is None:
            return self.plan.to_finalize()
        return self._indices(self._is_finalized)

    def count_patches(self, chunks: Sequence[Index]) -> int:
        """Return the number of patches of tasks that can run; other chunks have none."""
        if self.counts is None:
            return self.plan.count_patches(chunks)
        return sum(int(self.counts[self._position(i)]) for i in chunks if self.is_task(i))

    @cached_property
    def costs(self) -> Costs:
        """Exact totals over all tasks, as `Plan.costs`."""
        if self.counts is None:
            return self.plan.costs
        tasks, finalized = self._is_task, self._is_finalized
        views = (
            self if view is self.plan else ItemTasks(view, self.counts) for view in self.plan.views
        )
        stored = [view.stored(tasks, finalized) for view in views]
        finalized_voxels, output_bytes, piece_bytes = map(sum, zip(*stored, strict=True))
        return Costs(
            chunks=int(tasks.sum()),
            blocks=self.plan.block_indices.size,
            finalized_blocks=int(finalized.sum()),
            finalized_voxels=finalized_voxels,
            patches=int(self.counts.sum(dtype=np.int64)),
            input_bytes=self._total(tasks, "read") * self.plan.volume.voxel_bytes,
            output_bytes=output_bytes,
            piece_bytes=piece_bytes,
        )

    def stored(self, tasks: Bools, finalized: Bools) -> tuple[int, int, int]:
        """Return what is stored of the only output of the plan, as `Costs` count it.

        These are the voxels that are finalized, the bytes of the output and those of its pieces.
        `tasks` are the chunks that are tasks, `finalized` the blocks that are.
        """
        rank, output = self.plan.rank, self.plan.output
        length, core = self._total(tasks, "length"), self._total(tasks, "core")
        interior = self._total(tasks, "interior")
        outgoing = sum(
            self._total(tasks, *("upper_overlap" if up else "length" for up in ups))
            for ups in list(product((0, 1), repeat=rank))[1:]
        )
        pieces = (outgoing + length - interior) * output.sums_bytes
        return (
            self._total(finalized, "length") - self._total(finalized, "core"),
            self._total(tasks | finalized, "length") * output.voxel_bytes,
            pieces + (interior - core) * output.voxel_bytes,
        )

    def stored_size(self, output: int, sizes: ObjectSizes) -> StoredSize:
        """Return the size of what the tasks store of level 0 of an output, by its number."""
        view, blocks = ItemTasks(self.plan.of_output(output), self.counts), self.written_blocks

        def total(along: Along) -> int:
            numbers = [along(a, lengths["length"]) for a, lengths in enumerate(view._lengths)]
            return sum_of_products(blocks, numbers)

        return sizes.stored(total)

    def is_written(self, index: Index) -> bool:
        """Return whether a block is one that a task writes."""
        return self.is_task(index) or (self.plan.has_band(index) and bool(self.contributors(index)))

    @cached_property
    def written_blocks(self) -> Bools | None:
        """Which blocks tasks write, of the shape of `plan.index_bounds`; None if all are."""
        return None if self.counts is None else self._is_task | self._is_finalized

    @cached_property
    def _is_task(self) -> Bools:
        if self.counts is None:
            raise ValueError("every chunk that owns a patch is a task")
        return self.counts > 0

    @cached_property
    def _is_finalized(self) -> Bools:
        """Whether each block has a band and a contributor that is a task."""
        rank, shape = self.plan.rank, self._is_task.shape
        bands = [(along["length"] > along["interior"]) for along in self._lengths]
        contributed, has_band = self._is_task.copy(), np.zeros(shape, np.bool_)
        for ups in list(product((0, 1), repeat=rank))[1:]:
            targets = tuple(slice(1, None) if up else slice(None) for up in ups)
            sources = tuple(slice(None, -1) if up else slice(None) for up in ups)
            reach = np.ones((1,) * rank, np.bool_)
            for a, up in enumerate(ups):
                if up:
                    reach = reach & _along(bands[a], a, rank)
            reach = np.broadcast_to(reach, shape)
            has_band |= reach
            contributed[targets] |= self._is_task[sources] & reach[targets]
        for a, along in enumerate(self._lengths):
            has_band &= _along(along["length"] > 0, a, rank)
        return contributed & has_band

    def _position(self, index: Index) -> Index:
        return tuple(i - o for i, o in zip(index, self.plan.index_bounds.start, strict=True))

    def _indices(self, blocks: Bools) -> Iterator[Index]:
        """Yield the indices of the blocks that are true, in C order."""
        origin = np.array(self.plan.index_bounds.start)
        return map(tuple, (np.argwhere(blocks) + origin).tolist())

    def _total(self, blocks: Bools, *keys: str) -> int:
        """Return the sum over blocks of the product of one length per axis."""
        names = keys if len(keys) > 1 or self.plan.rank == 1 else keys * self.plan.rank
        numbers = [along[key] for along, key in zip(self._lengths, names, strict=True)]
        return sum_of_products(blocks, numbers)

    @cached_property
    def _lengths(self) -> list[dict[str, IntArray]]:
        """The lengths that costs are made of, for each block along each axis, in voxels."""
        lengths, bounds = [], self.plan.index_bounds
        for axis, low, high in zip(self.plan.axes, bounds.start, bounds.stop, strict=True):
            blocks = np.arange(low, high, dtype=np.int64)
            length, band = axis.stop(blocks) - axis.start(blocks), axis.band(blocks)
            first, stop = axis.read(blocks)
            lengths.append(
                {
                    "length": length,
                    "interior": length - band,
                    "core": length - axis.aligned_band(blocks),
                    "upper_overlap": axis.upper_overlap(blocks),
                    "read": stop - first,
                }
            )
        return lengths


def _along(values: Bools, axis: int, rank: int) -> Bools:
    """Return values along one axis, to be broadcast over the others."""
    return values.reshape([-1 if a == axis else 1 for a in range(rank)])


def sum_of_products(boxes: Bools | None, numbers: Sequence[IntArray]) -> int:
    """Return the sum over the boxes that are true, or all, of the product of one number per axis.

    `numbers` has for each axis those of its positions.
    """
    if boxes is None:
        return prod(int(along.sum()) for along in numbers)
    total = boxes.astype(np.float64)
    for along in reversed(numbers):
        total = total @ along.astype(np.float64)
    return round(float(total))
