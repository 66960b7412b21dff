"""One chunk's arithmetic: predictions in, what it stores and what it leaves for others out.

Pure: arrays in, arrays out. Sums are taken in the order of `Plan.patches` and of
`Plan.awaits`, so the same job gives the same bytes whoever computes it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq import buffers
from chunkq.box import Box
from chunkq.combine import Array, add_weighted, cast_output, copy_into, reduce, to_numpy
from chunkq.plan import Chunk, Patch, Piece, Plan
from chunkq.weights import Neighbors, Weights, neighbors

WEIGHT_CACHE_BYTES = 256 << 20
NeighborsPerAxis = tuple[Neighbors, ...]
"""Which patches meet one patch, an entry per axis."""


@dataclass(frozen=True)
class OwnBlock:
    """What a chunk keeps for the finalizing of its own block.

    `band` holds float32 sums (C, *box) for `Chunk.band_boxes`, `rest` values in the output's
    dtype, ([C,] *box), for `Chunk.rest_boxes`.
    """

    band: tuple[npt.NDArray[np.float32], ...]
    rest: tuple[npt.NDArray[Any], ...]


@dataclass(frozen=True)
class Contribution:
    """All that comes out of one chunk.

    `core` is final, in the output's dtype, ([C,] *chunk.core.shape); `own` is None where no
    band touches the block; `pieces` holds float32 sums (C, *piece.box.shape) for the
    neighbours above.
    """

    core: npt.NDArray[Any]
    own: OwnBlock | None
    pieces: tuple[tuple[Piece, npt.NDArray[np.float32]], ...]


class WeightCache:
    """Normalised patch weights, kept while they fit; most patches of a grid share theirs.

    Not thread-safe: it belongs to whoever holds the device.
    """

    def __init__(self, plan: Plan, weights: Weights, place: Callable[[Any], Array]) -> None:
        self._plan, self._weights, self._place = plan, weights, place
        self._kept: OrderedDict[tuple[int, NeighborsPerAxis], Array] = OrderedDict()
        self._bytes = 0

    def prepare(self, patches: Iterable[Patch]) -> None:
        """Make the weights of patches that are to come, as many as are kept at once.

        Small things that stay, made among a network's batches, would break up the heap.
        """
        wanted, room = set(), WEIGHT_CACHE_BYTES
        for patch in patches:
            key = patch.grid, self._neighbors(patch)
            if key in wanted or _has_no_overlap(key[1]):
                continue
            wanted.add(key)
            room -= patch.target.size * 4
            if room < 0:
                return
            self._get(key)

    def weights(self, patch: Patch) -> Array:
        """Return w / Σw over the patch's target: shape `patch.target.shape`, float32."""
        return self._get((patch.grid, self._neighbors(patch)))

    def has_no_overlap(self, patch: Patch) -> bool:
        """Tell whether no other patch has a say over the patch's target: its weights are all 1."""
        return _has_no_overlap(self._neighbors(patch))

    def _get(self, key: tuple[int, NeighborsPerAxis]) -> Array:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        weights = self._place(self._weights.normalized(*key))
        self._kept[key] = weights
        self._bytes += prod(weights.shape) * 4
        while self._bytes > WEIGHT_CACHE_BYTES and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= prod(dropped.shape) * 4
        return weights

    def _neighbors(self, patch: Patch) -> NeighborsPerAxis:
        return tuple(
            neighbors(axis, patch.grid, number)
            for axis, number in zip(self._plan.axes, patch.numbers, strict=True)
        )


def _has_no_overlap(around: NeighborsPerAxis) -> bool:
    starts = zip(*(near.starts for near in around), strict=True)
    return sum(prod(map(len, of_grid)) for of_grid in starts) == 1


class Accumulator:
    """Weighted sums over one chunk's region, float32 (C, *region)."""

    def __init__(self, plan: Plan, chunk: Chunk, weights: WeightCache, zeros: Array) -> None:
        """Start from `zeros`, an array of zeros of shape (C, *chunk.region.shape)."""
        self._plan, self._chunk, self._weights, self._sums = plan, chunk, weights, zeros

    def add(self, patch: Patch, prediction: Array) -> None:
        """Add one prediction (C, *output patch), activated and voted, float32."""
        offset = [
            (p - q) // 2
            for p, q in zip(self._plan.input_patch, self._plan.output_patch, strict=True)
        ]
        origin = [s + o for s, o in zip(patch.source.start, offset, strict=True)]
        used = prediction[(slice(None), *patch.target.slices(origin))]
        sums = self._view(patch.target)
        if self._weights.has_no_overlap(patch):
            copy_into(sums, used)
        else:
            add_weighted(sums, self._weights.weights(patch), used)

    def sums(self) -> list[Array]:
        """Return what `contribution` is made of, where the sums lie; views of them among it."""
        plan, chunk = self._plan, self._chunk
        interior = reduce(self._view(chunk.interior), plan.job.combine)
        return [interior, *map(self._view, _shared_boxes(plan, chunk))]

    def contribution(self) -> Contribution:
        """Return what the sums mean for this chunk and its neighbours; on the host."""
        return contribution(self._plan, self._chunk, [to_numpy(part) for part in self.sums()])

    def _view(self, box: Box) -> Array:
        return self._sums[(slice(None), *box.slices(self._chunk.region.start))]


def contribution(plan: Plan, chunk: Chunk, results: Sequence[npt.NDArray[Any]]) -> Contribution:
    """Return what a chunk's `Accumulator.results` come to, once they are on the host."""
    interior = _stored(plan, results[0])
    sums = [buffers.contiguous(part) for part in results[1:]]
    own, bands = None, len(chunk.band_boxes) if chunk.has_band else 0
    if chunk.has_band:
        rest = (_cut(plan, interior, chunk.interior, box) for box in chunk.rest_boxes)
        own = OwnBlock(tuple(sums[:bands]), tuple(rest))
    return Contribution(
        core=_cut(plan, interior, chunk.interior, chunk.core),
        own=own,
        pieces=tuple(zip(plan.outgoing_pieces(chunk), sums[bands:], strict=True)),
    )


def _shared_boxes(plan: Plan, chunk: Chunk) -> list[Box]:
    """Return the boxes whose sums a chunk leaves to others: its bands, then its pieces."""
    bands = chunk.band_boxes if chunk.has_band else ()
    return [*bands, *(piece.box for piece in plan.outgoing_pieces(chunk))]


def finalize_sums(
    plan: Plan,
    chunk: Chunk,
    own: OwnBlock | None,
    pieces: Mapping[Piece, npt.NDArray[np.float32]],
) -> Iterator[tuple[Box, npt.NDArray[Any]]]:
    """Yield the final voxels of every storage chunk that the block's band touches.

    `own` is None for a chunk that owns no patch; `pieces` are those of `Plan.awaits`. Each box
    is one of `chunk.touched_boxes`, its array ([C,] *box.shape) in the output's dtype.
    """
    channels = (plan.channels,) if plan.channel_axis else ()
    block = buffers.zeros((*channels, *chunk.block.shape), plan.output_dtype)
    if own is not None:
        for box, values in zip(chunk.rest_boxes, own.rest, strict=True):
            _cut(plan, block, chunk.block, box)[...] = values
    for number, box in enumerate(chunk.band_boxes):
        total = buffers.zeros((plan.channels, *box.shape), np.float32)
        if own is not None:
            total += own.band[number]
        for piece in plan.incoming_pieces(chunk):
            shared = box & piece.box
            if shared.size:
                here = (slice(None), *shared.slices(box.start))
                there = (slice(None), *shared.slices(piece.box.start))
                total[here] += pieces[piece][there]
        _cut(plan, block, chunk.block, box)[...] = _to_stored(plan, total)
    for box in chunk.touched_boxes:
        yield box, _cut(plan, block, chunk.block, box)


def _to_stored(plan: Plan, average: Array) -> npt.NDArray[Any]:
    """Return the stored form ([C,] *S) of an average (C, *S)."""
    return _stored(plan, to_numpy(reduce(average, plan.job.combine)))


def _stored(plan: Plan, result: npt.NDArray[Any]) -> npt.NDArray[Any]:
    final = cast_output(result, plan.job.combine, plan.output_dtype)
    drop_channel = plan.job.combine == "weighted_avg" and not plan.channel_axis
    return final[0] if drop_channel else final


def _cut(plan: Plan, values: npt.NDArray[Any], around: Box, box: Box) -> npt.NDArray[Any]:
    """Return the view of `box` in stored values ([C,] *around.shape)."""
    spatial = box.slices(around.start)
    return values[(slice(None), *spatial) if plan.channel_axis else spatial]
