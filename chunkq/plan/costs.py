"""Work and data volume of a plan: exact totals, from sums along single axes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Protocol

import numpy as np

from chunkq.geometry.box import Box
from chunkq.geometry.grids import AxisGeometry
from chunkq.geometry.padding import IntArray
from chunkq.plan.batches import needed_totals
from chunkq.plan.chunk import shared_offsets

if TYPE_CHECKING:
    from chunkq.plan.plan import Plan

BLOCKS_PER_BATCH = 1 << 16
"""Blocks of one axis that are summed in one array operation; bounds the planner's memory."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Work and data volume of a job; bytes count uncompressed voxels.

    `chunks` compute a patch and are tasks. `blocks` also counts those without patches. Of a region
    there can be more chunks than blocks, because chunks outside of it reach into it.
    """

    chunks: int
    blocks: int
    finalized_blocks: int
    finalized_voxels: int
    patches: int
    input_bytes: int
    output_bytes: int
    piece_bytes: int

    @property
    def store_bytes(self) -> int:
        """Bytes read and written: input with halos, output, and each piece twice."""
        return self.input_bytes + self.output_bytes + 2 * self.piece_bytes


class HasCosts(Protocol):
    """A plan, or the tasks of one."""

    @property
    def costs(self) -> Costs:
        """Its costs."""


def total_costs(parts: Iterable[HasCosts]) -> Costs:
    """Return the sums of the costs of several plans, or of their tasks."""
    rows = [astuple(part.costs) for part in parts]
    return Costs(*map(sum, zip(*rows, strict=True)))


class _AxisTotals:
    """Sums over the blocks `[first, stop)` of one axis.

    A total over a box of blocks is a product of such sums.
    """

    def __init__(self, axis: AxisGeometry, first: int, stop: int) -> None:
        self.sums = dict.fromkeys(
            ("length", "interior", "core", "without_band", "upper_overlap", "read"), 0
        )
        self.patches = [0] * len(axis.grids)
        for low in range(first, stop, BLOCKS_PER_BATCH):
            high = min(low + BLOCKS_PER_BATCH, stop)
            self._add(axis, np.arange(low, high, dtype=np.int64))

    def _add(self, axis: AxisGeometry, blocks: IntArray) -> None:
        length = axis.stop(blocks) - axis.start(blocks)
        band = axis.band(blocks)
        read_low, read_high = axis.read(blocks)
        sums = {
            "length": length,
            "interior": length - band,
            "core": length - axis.aligned_band(blocks),
            "without_band": band == 0,
            "upper_overlap": axis.upper_overlap(blocks),
            "read": read_high - read_low,
        }
        for key, values in sums.items():
            self.sums[key] += int(values.sum())
        for g, grid in enumerate(axis.grids):
            low, high = grid.owned(blocks, axis.chunk)
            self.patches[g] += int((high - low).sum())


def _ends(numbers: range) -> tuple[int, int]:
    return numbers.start, numbers.stop


class _Totals:
    """Exact totals over the blocks of a plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._totals = plan, cache(_AxisTotals)

    def over(self, boxes: Iterable[Box], *keys: str) -> int:
        """Return the total over boxes of blocks of the product of one sum per axis."""
        return sum(
            prod(
                self._totals(axis, low, high).sums[key]
                for axis, low, high, key in zip(
                    self._plan.axes, box.start, box.stop, keys, strict=True
                )
            )
            for box in boxes
        )

    def patches(self) -> int:
        """Return the number of patches that all blocks own."""
        axes = self._plan.axes
        per_axis = [self._totals(axis, *_ends(axis.numbers)).patches for axis in axes]
        return sum(map(prod, zip(*per_axis, strict=True)))


def costs_of(plan: Plan) -> Costs:
    """Return the exact totals over all chunks. Takes time linear in the blocks along one axis."""
    totals, rank = _Totals(plan), plan.rank
    every, active = (plan.block_indices,), plan.active
    if plan.is_whole:
        patches, voxels_read = totals.patches(), totals.over(active, *["read"] * rank)
    else:
        patches, voxels_read = needed_totals(plan.axes, plan.grid.batch)
    stored = [_stored(view, totals if view is plan else _Totals(view)) for view in plan.views]
    finalized_voxels, output_bytes, piece_bytes = (
        map(sum, zip(*stored, strict=True)) if stored else (0, 0, 0)
    )
    return Costs(
        chunks=sum(box.size for box in active),
        blocks=plan.block_indices.size,
        finalized_blocks=plan.block_indices.size - totals.over(every, *["without_band"] * rank),
        finalized_voxels=finalized_voxels,
        patches=patches,
        input_bytes=voxels_read * plan.volume.voxel_bytes,
        output_bytes=output_bytes,
        piece_bytes=piece_bytes,
    )


def _stored(plan: Plan, totals: _Totals) -> tuple[int, int, int]:
    """Return what is stored of one output: voxels that are finalized, bytes, bytes of pieces."""
    every, active, rank = (plan.block_indices,), plan.active, plan.rank
    interior = totals.over(every, *["interior"] * rank)
    length = totals.over(every, *["length"] * rank)
    core = totals.over(every, *["core"] * rank)
    piece_voxels = sum(
        totals.over(active, *("upper_overlap" if u else "length" for u in up))
        for up in shared_offsets([1] * rank)
    )
    band_voxels = totals.over(active, *["length"] * rank) - interior
    sums_bytes, stored_bytes = plan.output.sums_bytes, plan.output.voxel_bytes
    return (
        length - core,
        plan.region.size * stored_bytes,
        (piece_voxels + band_voxels) * sums_bytes + (interior - core) * stored_bytes,
    )
